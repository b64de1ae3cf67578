"""The rows' shares of the key and value pool, and what finished rows left there for others to begin with.

Worker thread only. Numbers alone: no tensor is touched here. Prompts often begin alike (instructions, a conversation's
earlier turns). What was computed for such a beginning stays until its room is needed, and is found by its tokens, in
blocks of `BLOCK`.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

BLOCK = 64
"""Tokens in a step of the search: shorter beginnings are cheaper to compute than to look for."""


class Extents:
    """First fit over `capacity` slots, with holes kept in order and neighbours joined (Knuth, TAOCP 1, section 2.5).

    Every slot is in exactly one hole or one extent that was given out.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._holes: list[tuple[int, int]] = [(0, capacity)] if capacity else []

    @property
    def free(self) -> int:
        """How many slots are in holes."""
        return sum(length for _, length in self._holes)

    def take(self, length: int) -> int | None:
        """The start of a new extent, or None if no hole is long enough."""
        for place, (start, room) in enumerate(self._holes):
            if room >= length:
                self._holes[place : place + 1] = [(start + length, room - length)] if room > length else []
                return start
        return None

    def give_back(self, start: int, length: int) -> None:
        """Make a hole of slots that were taken: of an extent or of a part of one."""
        if length == 0:
            return
        place = bisect_left(self._holes, (start, 0))
        first, last = start, start + length
        if place < len(self._holes) and self._holes[place][0] == last:
            last += self._holes.pop(place)[1]
        if place and sum(self._holes[place - 1]) == first:
            place -= 1
            first = self._holes.pop(place)[0]
        self._holes.insert(place, (first, last - first))


@dataclass(eq=False, slots=True)
class Extent:
    """`length` slots from `start` on. The first `len(tokens)` hold the keys and values of these tokens."""

    start: int
    length: int
    salt: str
    tokens: Sequence[int] = ()
    keys: list[int] = field(default_factory=list)


class Pool:
    """Extents for rows, and beginnings to be shared. `sharing` False: nothing is kept."""

    def __init__(self, capacity: int, *, sharing: bool = True) -> None:
        self._extents = Extents(capacity)
        self._sharing = sharing
        self._known: dict[int, Extent] = {}
        self._left: dict[Extent, None] = {}  # of finished rows, the one used longest ago first

    @property
    def capacity(self) -> int:
        return self._extents.capacity

    @property
    def kept(self) -> int:
        """Slots that hold what finished rows left."""
        return sum(extent.length for extent in self._left)

    @property
    def used(self) -> int:
        """Slots that rows have."""
        return self.capacity - self._extents.free - self.kept

    def reserve(self, length: int, salt: str) -> Extent | None:
        """Room for a row, or None until others have ended. What was left by finished rows makes room, oldest first."""
        while (start := self._extents.take(length)) is None:
            if not self._left:
                return None
            self._drop(next(iter(self._left)))
        return Extent(start, length, salt)

    def beginning(self, salt: str, prompt: Sequence[int]) -> tuple[Extent, int] | None:
        """The extent that has the longest known beginning of `prompt`, and that many tokens: whole blocks, not all."""
        found = None
        for key, end in _keys(salt, prompt[:-1]):
            extent = self._known.get(key)
            if extent is None:
                break
            found = extent, end
        if found is None or tuple(found[0].tokens[: found[1]]) != tuple(prompt[: found[1]]):  # a hash may collide
            return None
        if found[0] in self._left:
            self._left[found[0]] = self._left.pop(found[0])
        return found

    def share(self, extent: Extent, tokens: Sequence[int]) -> None:
        """`tokens` are in this extent now, for others to begin with."""
        if self._sharing:
            extent.tokens = tokens
            for key, _ in _keys(extent.salt, tokens):
                if key not in self._known:
                    self._known[key] = extent
                    extent.keys.append(key)

    def release(self, extent: Extent, tokens: Sequence[int]) -> None:
        """The row is over. Its `tokens` stay for others, if any of them can be found."""
        self.share(extent, tokens)
        if not extent.keys:
            self._extents.give_back(extent.start, extent.length)
            return
        self._extents.give_back(extent.start + len(tokens), extent.length - len(tokens))
        extent.length = len(tokens)
        self._left[extent] = None

    def _drop(self, extent: Extent) -> None:
        del self._left[extent]
        for key in extent.keys:
            del self._known[key]
        self._extents.give_back(extent.start, extent.length)


def _keys(salt: str, tokens: Sequence[int]) -> list[tuple[int, int]]:
    """A key for each whole block, of it and all before it; and where the block ends."""
    key = hash(salt)
    found = []
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        key = hash((key, *tokens[end - BLOCK : end]))
        found.append((key, end))
    return found
