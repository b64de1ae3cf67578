"""Decides whether a request can be answered in time before it waits in vain. Event loop only."""

import time
from collections import deque
from collections.abc import Sequence
from itertools import pairwise

from batching.events import Outcome, RowEnded
from batching.types import Request

FEWEST = 16
"""Minimum number of answers for a rate. The first ones may have waited for the device to warm up."""

MARGIN = 0.8
"""Fraction of a time limit that the expected wait may take, because answers end in batches, not at an even pace."""

TOGETHER = 0.001
"""Seconds within which answers count as ending at the same step."""


class ServiceRate:
    """The pace of the last 64 answers, on a clock that runs only while there are requests.

    It counts row-seconds an answer: time between answers, times the rows that were served together. More rows at once
    answer faster, at most in proportion, so a pace that was measured with few rows refuses nobody whom more rows at
    once might serve in time.
    """

    def __init__(self) -> None:
        self._ended: deque[tuple[float, int]] = deque(maxlen=64)
        self._busy = 0.0
        self._since: float | None = None

    def _clock(self) -> float:
        """Busy seconds so far."""
        return self._busy if self._since is None else self._busy + time.monotonic() - self._since

    def resume(self) -> None:
        """A request is waiting or running."""
        if self._since is None:
            self._since = time.monotonic()

    def pause(self) -> None:
        """No request is left."""
        self._busy, self._since = self._clock(), None

    def ended(self, event: RowEnded) -> None:
        if event.outcome is Outcome.ANSWERED:
            self._ended.append((self._clock(), max(1, event.batch_size)))

    @property
    def answers(self) -> int:
        """How many answers the pace is computed from."""
        return len(self._ended)

    def expected(self, requests: int, at_once: int = 1) -> float:
        """Seconds until about `requests` more have been answered; 0 while the pace is unknown.

        `at_once` of them might be served together, or as many as were in the mean if those are more. Answers of one
        batch end together, so those at the window's first moment say nothing about the time after it.
        """
        if not self._ended:
            return 0.0
        first, _ = self._ended[0]
        later = sum(at - first > TOGETHER for at, _ in self._ended)
        if not later:
            return 0.0
        row_seconds = self._row_seconds()
        mean = row_seconds / (self._clock() - first)
        return requests * row_seconds / later / max(at_once, mean)

    def _row_seconds(self) -> float:
        """Since the window's first answer. Since the last one as many rows were served as with that."""
        ends = [*self._ended, (self._clock(), self._ended[-1][1])]
        return sum((later - earlier) * rows for (earlier, _), (later, rows) in pairwise(ends))

    def seconds_for(self, requests: int) -> float:
        """The same, clamped to 1 to 60: OpenAI's client waits no longer."""
        return min(60.0, max(1.0, self.expected(requests)))


def seconds_late(requests: Sequence[Request], ahead: int, running: int, at_once: int, rate: ServiceRate) -> float:
    """By how many seconds these requests would likely miss their time limit; 0 if they would not.

    A request with n others ahead of it is answered after about n + 1 intervals between answers (Little's law). `ahead`
    rows wait in front of these, `running` ones are being served, and those that wait might be served `at_once`. If no
    row waits ahead, a request is always accepted, so that an outdated pace refuses nothing; the same holds while there
    are too few answers for a pace.
    """
    if not ahead or rate.answers < FEWEST:
        return 0.0
    limit = MARGIN * min(request.time_limit for request in requests)
    return max(0.0, rate.expected(ahead + running + len(requests), at_once) - limit)
