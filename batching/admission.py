"""Decides whether a request can be answered in time before it waits in vain. Event loop only."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from batching.events import Outcome, RowEnded
from batching.types import Request

FEWEST = 16
"""Minimum number of answers for a rate. The first ones may have waited for the device to warm up."""

KEPT = 64
"""Answers that the pace is computed from; more where the answers of a batch end together."""

MARGIN = 0.8
"""Fraction of a time limit that the expected wait may take where answers end in batches, not at an even pace."""

TOGETHER = 0.001
"""Seconds within which answers count as ending at the same step."""


@dataclass(slots=True)
class End:
    """Answers that ended together, at `at` busy seconds, when `rows` rows were served."""

    at: float
    rows: int
    answers: int = 1


class ServiceRate:
    """The pace of the last `KEPT` answers, on a clock that runs only while there are requests.

    It counts row-seconds an answer: time between answers, times the rows that were served together. More rows at once
    answer faster, at most in proportion, so a pace that was measured with few rows refuses nobody whom more rows at
    once might serve in time.
    """

    def __init__(self) -> None:
        self._ends: deque[End] = deque()
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
        if event.outcome is not Outcome.ANSWERED:
            return
        now, rows = self._clock(), max(1, event.batch_size)
        if self._ends and now - self._ends[-1].at <= TOGETHER:
            self._ends[-1].answers += 1
        else:
            self._ends.append(End(now, rows))
        # Not among the kept: the first end, at which time begins, and the second, because the last may not be whole.
        while sum(end.answers for end in islice(self._ends, 2, None)) >= KEPT:
            self._ends.popleft()

    @property
    def answers(self) -> int:
        """How many answers the pace is computed from."""
        return sum(end.answers for end in self._ends)

    def expected(self, requests: int, at_once: int = 1) -> float:
        """Seconds until about `requests` more have been answered; 0 while the pace is unknown.

        `at_once` of them might be served together, or as many as were in the mean if those are more. Answers of one
        batch end together, so those at the window's first moment say nothing about the time after it.
        """
        if len(self._ends) < 2:
            return 0.0
        later = self.answers - self._ends[0].answers
        row_seconds = self._row_seconds()
        mean = row_seconds / (self._clock() - self._ends[0].at)
        return requests * row_seconds / later / max(at_once, mean)

    def _row_seconds(self) -> float:
        """Since the window's first answer. Since the last one as many rows were served as with that."""
        ends = [*self._ends, End(self._clock(), self._ends[-1].rows)]
        return sum((later.at - earlier.at) * later.rows for earlier, later in pairwise(ends))

    def seconds_for(self, requests: int) -> float:
        """The same, clamped to 1 to 60: OpenAI's client waits no longer."""
        return min(60.0, max(1.0, self.expected(requests)))


def seconds_late(
    requests: Sequence[Request], ahead: int, running: int, at_once: int, rate: ServiceRate, *, joins: bool
) -> float:
    """By how many seconds these requests would likely miss their time limit; 0 if they would not.

    A request with n others ahead of it is answered after about n + 1 intervals between answers (Little's law). `ahead`
    rows wait in front of these, `running` ones are being served, and those that wait might be served `at_once`. If no
    row waits ahead, a request is always accepted, so that an outdated pace refuses nothing; the same holds while there
    are too few answers for a pace. Where rows join a running batch (`joins`) answers end at an even pace, and the wait
    may take all of the limit.
    """
    if not ahead or rate.answers < FEWEST:
        return 0.0
    limit = (1.0 if joins else MARGIN) * min(request.time_limit for request in requests)
    return max(0.0, rate.expected(ahead + running + len(requests), at_once) - limit)
