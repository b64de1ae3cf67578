"""The feed of `/internal/live`: ticks and rows as they happen. Runs on the event loop's thread.

The last minutes are always kept, so that a new listener starts with them; nothing is encoded without listeners.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

import orjson

from batching.events import (
    BatchEnded,
    BatchStarted,
    Event,
    MemoryHeld,
    PromptScored,
    QueueChanged,
    RowEnded,
    RowsJoined,
    RowStarted,
    State,
    StateChanged,
    Stepped,
)
from server import sse

PERIOD = 0.5
"""Seconds per tick."""

RECENT = 256
RECENT_FOR = 30.0
"""Answers are judged by the last 256 that ended within 30 seconds; a single tick has too few."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Half a second, which ended at monotonic time `at`.

    `queued` and `running` are maximum numbers of rows; `batches` and `batch_rows` count batches that started and their
    rows, the two fields after them the prompt tokens of all rows that started. Times to first token are in seconds,
    None if no answer ended recently; `tokens_per_step` is a row's mean in a decode step, None if nothing was drafted
    lately; `memory` is in bytes, None until the model is loaded.
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
    tokens_per_step: float | None
    memory: int | None


class Peak:
    """A level and its maximum since it was last taken."""

    def __init__(self) -> None:
        self._level = self._highest = 0

    def set(self, level: int) -> None:
        self._level = level
        self._highest = max(self._highest, level)

    def take(self) -> int:
        highest, self._highest = self._highest, self._level
        return highest


class Meter:
    """Counts events from monotonic time `now` on."""

    def __init__(self, now: float) -> None:
        self._end = now + PERIOD
        self._queued, self._running = Peak(), Peak()
        self._memory: int | None = None
        self._recent: deque[tuple[float, RowEnded]] = deque(maxlen=RECENT)  # answers, with the time of their end
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
            case BatchEnded(running=running):
                self._running.set(running)
            case MemoryHeld(memory=memory):
                self._memory = memory
            case RowEnded(ttft=float()):
                self._recent.append((now, event))

    def advance(self, now: float, most: int) -> Sequence[Tick]:
        """The ticks that ended since the last call, up to `now`; at most the last `most` of them."""
        if now < self._end:
            return ()
        ended = math.floor((now - self._end) / PERIOD) + 1
        if ended > most:
            self._end += (ended - most) * PERIOD
            self._restart()
        return [self._tick() for _ in range(min(ended, most))]

    def _tick(self) -> Tick:
        while self._recent and self._recent[0][0] < self._end - RECENT_FOR:
            self._recent.popleft()
        answers = [answer for _, answer in self._recent]
        seconds = sorted(answer.ttft for answer in answers if answer.ttft is not None)
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
            tokens_per_step=tokens_per_step(answers),
            memory=self._memory,
        )
        self._restart()
        self._end += PERIOD
        return tick


def tokens_per_step(answers: Sequence[RowEnded]) -> float | None:
    """Of all these answers; None if nothing was drafted for them."""
    if not any(answer.num_drafted_tokens for answer in answers):
        return None
    tokens = sum(answer.output_tokens for answer in answers)
    accepted = sum(answer.num_accepted_tokens for answer in answers)
    return round(tokens / max(1, tokens - accepted), 3)


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that at least a `share` of all values do not exceed; None if there are none."""
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else None


TICKS_KEPT = 600  # five minutes
ROWS_KEPT = 256  # starts and ends of rows
MOST_LISTENERS = 32
MOST_OF_A_CLIENT = 8  # so that one API key cannot keep the others out
MOST_WAITING = 1024
"""Messages that may wait for a slow listener; beyond that its stream ends, and it can reconnect for the history."""

FINAL = (State.STOPPED, State.FAILED)

Message = dict[str, Any]


class Listener:
    """Messages waiting for one viewer, who sees only `client`'s rows, or all rows if None."""

    def __init__(self, client: str | None = None, *, over: bool) -> None:
        self.client = client
        self._waiting: list[bytes] = []
        self._news = asyncio.Event()
        self.over = over

    def hears(self, owner: str) -> bool:
        return self.client is None or self.client == owner

    def tell(self, message: bytes) -> None:
        if len(self._waiting) == MOST_WAITING:
            self.end()
        else:
            self._waiting.append(message)
            self._news.set()

    def end(self) -> None:
        self.over = True
        self._news.set()

    async def take(self) -> bytes:
        """Wait for messages and return all of them; empty at the end of the stream."""
        if not self.over:
            await self._news.wait()
            self._news.clear()
        taken = b"".join(self._waiting)
        self._waiting.clear()
        return taken


class TooManyListeners(Exception):
    """There are already `MOST_LISTENERS`, or `MOST_OF_A_CLIENT` for this client's rows."""


class LiveFeed:
    """An observer of the batcher."""

    def __init__(self) -> None:
        self._meter = Meter(time.monotonic())
        self._ticks: deque[Tick] = deque(maxlen=TICKS_KEPT)
        self._rows: deque[tuple[str, Message]] = deque(maxlen=ROWS_KEPT)  # (client, message)
        self._listeners: set[Listener] = set()
        self._state = State.STARTING
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._batch = 0

    def __call__(self, event: Event) -> None:
        """Handle one event."""
        now = time.monotonic()
        self._advance(now)
        self._meter.note(event, now)
        match event:
            case BatchStarted():
                self._batch += 1
            case RowStarted():
                self._tell_row(event.client, {"started": event, "batch": self._batch})
            case RowEnded():
                self._tell_row(event.client, {"ended": event, "at": now})
            case StateChanged(state=state):
                self._state = state
                self._tell({"state": state})
                if state in FINAL:
                    self.close()

    @property
    def listeners(self) -> int:
        return len(self._listeners)

    def listen(self, client: str | None = None) -> AsyncIterator[bytes]:
        """The frames for a new listener, with the rows of one client, or of all if None.

        Raises `TooManyListeners`.
        """
        if self._is_full_for(client):
            raise TooManyListeners
        return self._frames(client)

    def _is_full_for(self, client: str | None) -> bool:
        own = sum(listener.client == client for listener in self._listeners)
        return len(self._listeners) == MOST_LISTENERS or (client is not None and own == MOST_OF_A_CLIENT)

    async def _frames(self, client: str | None) -> AsyncIterator[bytes]:
        listener, history = Listener(client, over=self._closed), self.history(client)
        if self._is_full_for(client):
            return  # others came in since `listen` checked
        self._listeners.add(listener)
        if self._timer is None:
            self._beat()
        try:
            yield frame(history)
            while frames := await listener.take():
                yield frames
        finally:
            self._listeners.discard(listener)

    def close(self) -> None:
        """End all streams, and new ones at once, because an open stream would delay the process's exit."""
        self._closed = True
        for listener in self._listeners:
            listener.end()

    def _beat(self) -> None:
        """Keeps ticks coming while nothing happens, as long as there are listeners."""
        self._advance(time.monotonic())
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(PERIOD, self._beat) if self._listeners else None

    def _advance(self, now: float) -> None:
        for tick in self._meter.advance(now, TICKS_KEPT):
            self._ticks.append(tick)
            self._tell({"tick": tick})

    def _tell_row(self, owner: str, message: Message) -> None:
        self._rows.append((owner, message))
        self._send(message, [listener for listener in self._listeners if listener.hears(owner)])

    def _tell(self, message: Message) -> None:
        self._send(message, self._listeners)

    @staticmethod
    def _send(message: Message, listeners: Collection[Listener]) -> None:
        if listeners:
            encoded = frame(message)
            for listener in listeners:
                listener.tell(encoded)

    def history(self, client: str | None = None) -> Message:
        """A new listener's first message: ticks by column, and rows' starts and ends."""
        now = time.monotonic()
        self._advance(now)
        columns = {field.name: [getattr(tick, field.name) for tick in self._ticks] for field in fields(Tick)}
        rows = [message for owner, message in self._rows if client in (None, owner)]
        return {"now": now, "period": PERIOD, "state": self._state, "ticks": columns, "rows": rows}


def frame(message: Message) -> bytes:
    return sse.event(orjson.dumps(message))
