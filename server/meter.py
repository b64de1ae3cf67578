"""Events -> ticks: what the service did in each half second. On the event loop's thread.

Keeps counters only, so a decode step costs a few additions whether or not somebody looks.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from batching.events import (
    BatchEnded,
    BatchStarted,
    Event,
    PromptScored,
    QueueChanged,
    RowEnded,
    RowsJoined,
    Stepped,
)

PERIOD = 0.5
"""Seconds of a tick."""

FIRST_TOKENS = 256
FIRST_TOKENS_FOR = 30.0
"""Percentiles are of the last so many answers that ended within so many seconds: one tick has too few."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A half second that ended at monotonic time `at`.

    `queued` and `running` are the most rows there were at a time; `batches` and `batch_rows` count batches that
    started, the two after them the prompts of all rows that did. Times to first token are in seconds, None if no
    answer ended lately; `memory` in bytes, None before the first batch's end.
    """

    at: float
    queued: int
    running: int
    tokens: int
    batches: int
    batch_rows: int
    prompt_tokens: int
    padded_tokens: int
    ttft_p50: float | None
    ttft_p95: float | None
    memory: int | None


class Peak:
    """A level, and the highest it was since it was last asked."""

    def __init__(self) -> None:
        self._level = self._highest = 0

    def set(self, level: int) -> None:
        self._level = level
        self._highest = max(self._highest, level)

    def take(self) -> int:
        highest, self._highest = self._highest, self._level
        return highest


class Meter:
    """Counts from monotonic time `now` on."""

    def __init__(self, now: float) -> None:
        self._end = now + PERIOD
        self._queued, self._running = Peak(), Peak()
        self._memory: int | None = None
        self._first_tokens: deque[tuple[float, float]] = deque(maxlen=FIRST_TOKENS)  # ended at, seconds
        self._restart()

    def _restart(self) -> None:
        self._tokens = self._batches = self._batch_rows = self._prompt_tokens = self._padded_tokens = 0

    def note(self, event: Event, now: float) -> None:
        """Count one event."""
        match event:
            case Stepped(tokens=tokens, running=running):
                self._tokens += tokens
                self._running.set(running)
            case PromptScored(running=running):
                self._running.set(running)
            case QueueChanged(rows=rows):
                self._queued.set(rows)
            case BatchStarted(rows=rows, prompt_tokens=prompt_tokens, padded_tokens=padded_tokens):
                self._running.set(rows)
                self._batches += 1
                self._batch_rows += rows
                self._prompt_tokens += prompt_tokens
                self._padded_tokens += padded_tokens
            case RowsJoined(running=running, prompt_tokens=prompt_tokens):
                self._running.set(running)
                self._prompt_tokens += prompt_tokens
                self._padded_tokens += prompt_tokens
            case BatchEnded(running=running, memory=memory):
                self._running.set(running)
                self._memory = memory
            case RowEnded(ttft=float(seconds)):
                self._first_tokens.append((now, seconds))

    def advance(self, now: float, most: int) -> Sequence[Tick]:
        """The ticks that ended by `now` since the last call; only the last `most` of them after a long silence."""
        if now < self._end:
            return ()
        ended = math.floor((now - self._end) / PERIOD) + 1
        if ended > most:
            self._end += (ended - most) * PERIOD
            self._restart()
        return [self._tick() for _ in range(min(ended, most))]

    def _tick(self) -> Tick:
        while self._first_tokens and self._first_tokens[0][0] < self._end - FIRST_TOKENS_FOR:
            self._first_tokens.popleft()
        seconds = sorted(seconds for _, seconds in self._first_tokens)
        tick = Tick(
            at=round(self._end, 3),
            queued=self._queued.take(),
            running=self._running.take(),
            tokens=self._tokens,
            batches=self._batches,
            batch_rows=self._batch_rows,
            prompt_tokens=self._prompt_tokens,
            padded_tokens=self._padded_tokens,
            ttft_p50=percentile(seconds, 0.5),
            ttft_p95=percentile(seconds, 0.95),
            memory=self._memory,
        )
        self._restart()
        self._end += PERIOD
        return tick


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of all do not exceed; None of nothing."""
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else None
