"""Who has which part of the KV cache, and what finished rows left there for prompts that share a prefix with theirs.

Worker thread only. Bookkeeping alone: no tensor is touched here. A KV slot is one token position of the cache tensor.
Prompts often share a prefix (instructions, a conversation's earlier turns). The keys and values computed for it stay
until their room is needed, and are looked up by token ids, in blocks of `BLOCK_SIZE`.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

BLOCK_SIZE = 64
"""Tokens in a block of the prefix cache: a shorter prefix is cheaper to compute than to look up."""


class KVAllocator:
    """First fit over `capacity` KV slots, with holes kept in order and neighbours joined (Knuth, TAOCP 1, section 2.5).

    Every KV slot is in exactly one hole or one allocation.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._holes: list[tuple[int, int]] = [(0, capacity)] if capacity else []

    @property
    def num_free(self) -> int:
        """How many KV slots are in holes."""
        return sum(length for _, length in self._holes)

    def allocate(self, length: int) -> int | None:
        """The first of `length` neighbouring KV slots, or None if no hole is long enough."""
        for place, (start, room) in enumerate(self._holes):
            if room >= length:
                self._holes[place : place + 1] = [(start + length, room - length)] if room > length else []
                return start
        return None

    def free(self, start: int, length: int) -> None:
        """Make a hole of KV slots that were allocated: a whole allocation or a part of one."""
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
class KVAllocation:
    """`length` KV slots from `start` on. The first `len(tokens)` hold the keys and values of these tokens."""

    start: int
    length: int
    salt: str
    tokens: Sequence[int] = ()
    hashes: list[int] = field(default_factory=list)


class PrefixCache:
    """Allocates KV slots to rows, and finds prefixes that were computed before. Not `enabled`: nothing is kept."""

    def __init__(self, capacity: int, *, enabled: bool = True) -> None:
        self._allocator = KVAllocator(capacity)
        self._enabled = enabled
        self._blocks: dict[int, KVAllocation] = {}
        self._evictable: dict[KVAllocation, None] = {}  # of finished rows, least recently used first

    @property
    def capacity(self) -> int:
        return self._allocator.capacity

    @property
    def num_evictable(self) -> int:
        """KV slots that hold what finished rows left."""
        return sum(allocation.length for allocation in self._evictable)

    @property
    def num_used(self) -> int:
        """KV slots that running rows have."""
        return self.capacity - self._allocator.num_free - self.num_evictable

    def allocate(self, length: int, salt: str) -> KVAllocation | None:
        """Room for a row, or None until others finish. Evicts what finished rows left, least recently used first."""
        while (start := self._allocator.allocate(length)) is None:
            if not self._evictable:
                return None
            self._evict(next(iter(self._evictable)))
        return KVAllocation(start, length, salt)

    def match_prefix(self, salt: str, prompt: Sequence[int]) -> tuple[KVAllocation, int] | None:
        """The allocation with the longest cached prefix of `prompt`, and its length: whole blocks, never all of it."""
        found = None
        for key, end in _block_hashes(salt, prompt[:-1]):
            allocation = self._blocks.get(key)
            if allocation is None:
                break
            found = allocation, end
        if found is None or tuple(found[0].tokens[: found[1]]) != tuple(prompt[: found[1]]):  # a hash may collide
            return None
        if found[0] in self._evictable:
            self._evictable[found[0]] = self._evictable.pop(found[0])
        return found

    def insert(self, allocation: KVAllocation, tokens: Sequence[int]) -> None:
        """The keys and values of `tokens` are in this allocation now, for later prompts to match."""
        if self._enabled:
            allocation.tokens = tokens
            for key, _ in _block_hashes(allocation.salt, tokens):
                if key not in self._blocks:
                    self._blocks[key] = allocation
                    allocation.hashes.append(key)

    def release(self, allocation: KVAllocation, tokens: Sequence[int]) -> None:
        """The row has finished. Its `tokens` stay cached, if any prompt can still match them."""
        self.insert(allocation, tokens)
        if not allocation.hashes:
            self._allocator.free(allocation.start, allocation.length)
            return
        self._allocator.free(allocation.start + len(tokens), allocation.length - len(tokens))
        allocation.length = len(tokens)
        self._evictable[allocation] = None

    def _evict(self, allocation: KVAllocation) -> None:
        del self._evictable[allocation]
        for key in allocation.hashes:
            del self._blocks[key]
        self._allocator.free(allocation.start, allocation.length)


def _block_hashes(salt: str, tokens: Sequence[int]) -> list[tuple[int, int]]:
    """For each whole block a hash of it and all before it, and where the block ends."""
    key = hash(salt)
    found = []
    for end in range(BLOCK_SIZE, len(tokens) + 1, BLOCK_SIZE):
        key = hash((key, *tokens[end - BLOCK_SIZE : end]))
        found.append((key, end))
    return found
