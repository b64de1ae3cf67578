"""Who has which part of the key and value pool: every row has one extent, a run of neighbouring slots.

Worker thread only. Numbers alone: no tensor is touched here.
"""

from bisect import bisect_left


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
