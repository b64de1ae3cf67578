"""A limit for the time between two tokens of a row, kept by how much of other rows' prompts is computed in between.

Worker thread only.
"""

import time
from collections import deque
from collections.abc import Callable

WEIGHT = 0.25
"""Of the newest pass in what is known of passes: high enough to follow contexts that grow."""


class GapLimit:
    """Learns from passes as they end what a step without prompts takes, and what each prompt token adds."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._seconds = seconds
        self._clock = clock
        self._step: float | None = None
        self._per_token: float | None = None
        self._in_flight: deque[int] = deque()  # prompt tokens of passes whose output is not read yet
        self._read_at = clock()

    def begin(self) -> None:
        """A batch begins: the time since the last one is no pass's."""
        self._in_flight.clear()
        self._read_at = self._clock()

    def launched(self, num_prompt_tokens: int) -> None:
        self._in_flight.append(num_prompt_tokens)

    def read(self) -> None:
        """The oldest output was read, as soon as it was there."""
        now = self._clock()
        seconds, self._read_at = now - self._read_at, now
        tokens = self._in_flight.popleft()
        if not tokens:
            if self._step is None:
                self._per_token = None  # the step was counted as the tokens'
            self._step = _mean(self._step, seconds)
        elif seconds > (self._step or 0.0):
            self._per_token = _mean(self._per_token, (seconds - (self._step or 0.0)) / tokens)

    def room(self, most: int, least: int) -> int:
        """How many prompt tokens the next pass may have: `least` if even that is too many, or nothing is known yet."""
        if self._per_token is None:
            return least
        return max(least, min(most, int((self._seconds - (self._step or 0.0)) / self._per_token)))


def _mean(known: float | None, newest: float) -> float:
    return newest if known is None else known + WEIGHT * (newest - known)
