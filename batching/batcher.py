"""The core of the service: accepts requests, forms batches, hands them to the worker, delivers the results.

Everything here runs on the event loop's thread. Life of a batcher:

    STARTING --engine built--> READY --drain--> DRAINING --all done or time up--> STOPPED
        \\--engine cannot be built, or the worker thread dies at any time--> FAILED

Only READY accepts requests. STOPPED and FAILED are final.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Never

from batching.admission import ServiceRate, seconds_late
from batching.engine import Engine
from batching.errors import BatchingError, Drained, EngineError, NotReady, QueueFull, TooBusy, TooLarge
from batching.events import (
    BatchEnded,
    BatchStarted,
    MemoryHeld,
    Observer,
    PromptScored,
    QueueChanged,
    Rejected,
    RowEnded,
    RowsJoined,
    RowStarted,
    State,
    StateChanged,
    Stepped,
    broadcast,
)
from batching.queue import BatchLimits, QueueLimits, RowQueue, growing_cost
from batching.stream import Row, Stream
from batching.types import Finish, ModelInfo, PromptLogprob, Request
from batching.worker import NewTokens, Worker

LATECOMERS = 0.25
"""Maximum seconds an open batch waits for requests being tokenized, which would otherwise wait for a whole batch."""


@dataclass(frozen=True, slots=True)
class BatchingConfig:
    """`max_batch_rows`: None for the engine's own limit. `window` in seconds: how long an idle device waits, from a
    batch's first row on, for others to join it."""

    max_batch_rows: int | None = 16
    window: float = 0.005
    queue: QueueLimits = field(default_factory=lambda: QueueLimits(rows=256))


class Batcher:
    """`build` creates the engine and runs on the worker thread; `observers` are called with every event."""

    def __init__(self, build: Callable[[], Engine], config: BatchingConfig, observers: Iterable[Observer] = ()) -> None:
        self._build = build
        self._config = config
        self._observe = broadcast(observers)
        self._queue = RowQueue(config.queue)
        self._running: dict[Row, None] = {}
        self._announced = 0
        self._rate = ServiceRate()
        self._decided = asyncio.Event()  # built, failed, or drained before either
        self._idle = asyncio.Event()
        self._idle.set()
        self.ended = asyncio.Event()
        self.state = State.STARTING
        self.error: BaseException | None = None

    async def start(self, beside: asyncio.Future[Any] | None = None) -> ModelInfo:
        """Start the worker and wait until the engine is built, and for `beside`, which runs meanwhile.

        Raises what building it raised; at once, what `beside` raised; or `NotReady` if the batcher was drained first.
        """
        if self.state is not State.STARTING:
            raise NotReady(self.state)
        loop = asyncio.get_running_loop()
        self._batch_over: asyncio.Future[None] = loop.create_future()
        self._worker = Worker(self._build, self, loop.call_soon_threadsafe)
        self._worker.start()
        decided = asyncio.ensure_future(self._decided.wait())
        done, _ = await asyncio.wait([decided, beside or decided], return_when=asyncio.FIRST_EXCEPTION)
        for future in done:
            future.result()
        if self.state is not State.STARTING:  # it failed or was drained
            self._worker.finish()
            raise self.error or NotReady(self.state)
        info = self._info
        self._limits = BatchLimits(
            self._config.max_batch_rows or info.max_rows,
            info.token_budget,
            padded=not info.joins,
            max_length=info.context_window,
        )
        self._collector = asyncio.create_task(self._collect(), name="collector")
        self._collector.add_done_callback(self._collector_ended)
        self._move(State.READY)
        return self._info

    def submit(self, request: Request) -> Stream:
        """Queue one request; raises as `submit_all` does."""
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request]) -> list[Stream]:
        """Queue one client's requests, all or none of them. Raises `TooLarge`, `NotReady`, `QueueFull` or `TooBusy`.

        The caller has checked them: prompt and output of each fit the context window and the token budget.
        """
        if not self._config.queue.allow(requests):
            raise TooLarge
        if self.state is not State.READY:
            self._observe(Rejected("not_ready"))
            raise NotReady(self.state)
        if not self._queue.has_room(requests):
            self._refuse_full()
        if (ahead := self._queue.ahead_of(requests[0])) and (late := self._seconds_late(requests, ahead)):
            self._observe(Rejected("too_busy"))
            raise TooBusy(min(60.0, max(1.0, late)))
        streams = [Stream(request, self._row_ended) for request in requests]
        for stream in streams:
            self._queue.push(stream.row)
        self._idle.clear()
        self._rate.resume()
        self._queue_changed()
        return streams

    def _refuse_full(self) -> Never:
        self._observe(Rejected("queue_full"))
        raise QueueFull(self._rate.seconds_for(len(self._queue)))

    async def drain(self, seconds: float) -> None:
        """Refuse new requests, finish the accepted ones within `seconds`, fail the rest, stop the worker.

        Of several drains the one that ends first counts.
        """
        if self.state is State.STARTING:
            self._move(State.STOPPED)
            self._decided.set()
            self.ended.set()
        if self.state is State.READY:
            self._move(State.DRAINING)
        if self.state is not State.DRAINING:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        if not self.ended.is_set():
            self._end(State.STOPPED, Drained("the service is stopping and the time to finish is over"))

    async def _collect(self) -> None:
        """Form one batch after another, and let rows join the running one if the engine can."""
        while True:
            while not self._queue:
                await self._queue.change()
            opened = time.monotonic()
            if not self._info.joins:
                await self._window()
            rows = self._take(opened)
            if rows:
                self._batch_over = asyncio.get_running_loop().create_future()
                self._worker.give(rows)
                if not self._info.joins:
                    await self._batch_over  # the next batch fills meanwhile
            elif self._queue:
                await self._queue.change()  # until a row ends and frees its room

    @contextlib.contextmanager
    def announce(self, client: str) -> Iterator[None]:
        """Inside the context a client's request is being prepared, and an open batch waits a little for it.

        Raises `QueueFull` if every request of this client would be refused now, so that none is prepared in vain.
        """
        if self.state is State.READY and self._queue.is_full_for(client):
            self._refuse_full()
        self._announced += 1
        try:
            yield
        finally:
            self._announced -= 1
            self._queue.wake()

    async def _window(self) -> None:
        """Wait until the batch is full, or its first row has waited for the window and for announced requests."""
        while self._queue and len(self._queue) < self._limits.max_rows:
            window = max(self._config.window, LATECOMERS) if self._announced else self._config.window
            left = self._queue.first_arrival + window - time.monotonic()
            if left <= 0:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._queue.change()

    def _take(self, opened: float) -> list[Row]:
        joining = len(self._running)
        rows = self._queue.take(self._room(), self._running)
        if not rows:
            return rows
        now = time.monotonic()
        self._running.update(dict.fromkeys(rows))
        for row in rows:
            row.stream.started(now, len(self._running))
        self._queue_changed()
        self._observe(self._handed_over(rows, now, None if joining else opened))
        for row in rows:
            request = row.request
            self._observe(RowStarted(request.id, now, now - row.arrived, len(self._running), request.client))
        return rows

    def _handed_over(self, rows: Sequence[Row], now: float, opened: float | None) -> BatchStarted | RowsJoined:
        """What to tell of rows that begin a batch, which was `opened` then, or join the running one."""
        prompts = [len(row.request.prompt) for row in rows]
        waits = tuple(now - row.arrived for row in rows)
        if opened is None:
            return RowsJoined(len(rows), len(self._running), sum(prompts), waits)
        padded = len(rows) * max(prompts) if self._limits.padded else sum(prompts)
        return BatchStarted(len(rows), sum(prompts), padded, now - opened, waits)

    def _seconds_late(self, requests: Sequence[Request], ahead: int) -> float:
        at_once = self._at_once(requests)
        return seconds_late(requests, ahead, len(self._running), at_once, self._rate, joins=self._info.joins)

    def _at_once(self, requests: Sequence[Request]) -> int:
        """How many of the waiting rows and these might be served together, in the running batch if rows can join it."""
        waiting = [*(row.request for row in self._queue), *requests]
        if not self._info.joins:
            return self._limits.hold(waiting)
        return len(self._running) + self._room().hold(waiting)

    def _room(self) -> BatchLimits:
        """What the running batch leaves of the limits."""
        tokens = 0 if self._limits.padded else sum(map(growing_cost, self._running))
        return self._limits.less(len(self._running), tokens)

    def _queue_changed(self) -> None:
        self._observe(QueueChanged(len(self._queue), self._queue.prompt_tokens))

    def _row_ended(self, row: Row, event: RowEnded) -> None:
        if self._queue.discard(row):
            self._queue_changed()
        if row in self._running:
            del self._running[row]
            self._queue.wake()
        self._rate.ended(event)
        self._observe(event)
        if not self._queue and not self._running:
            self._idle.set()
            self._rate.pause()

    def _move(self, state: State) -> None:
        self.state = state
        self._observe(StateChanged(state))

    def _end(self, state: State, error: BatchingError) -> None:
        """Enter a final state: every remaining row gets `error`, and the worker ends after the current step."""
        self._move(state)
        self._collector.cancel()
        for row in [*self._queue, *self._running]:
            row.cancelled = True
            row.stream.fail(error)
        self._worker.finish()
        self.ended.set()

    def _collector_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self.on_worker_died(error)

    # Reports from the worker, on the event loop's thread.

    def on_built(self, info: ModelInfo) -> None:
        self._info = info
        self._decided.set()

    def on_step(self, tokens: NewTokens, running: int, at: float) -> None:
        if self._queue and any(not row.stream.output_tokens for row, *_ in tokens):
            self._queue.wake()  # what a row shares with others is known once it has begun, and may leave room
        for row, token, finish, logprob in tokens:
            row.stream.feed(token, finish, at, logprob)
        self._observe(Stepped(len(tokens), running, rows=len({row for row, *_ in tokens})))

    def on_prompt(
        self, row: Row, logprobs: Sequence[PromptLogprob | None], finish: Finish | None, running: int
    ) -> None:
        row.stream.feed_prompt(logprobs, finish)
        self._observe(PromptScored(len(logprobs), running))

    def on_rows_failed(self, rows: Sequence[Row], error: BatchingError) -> None:
        for row in rows:
            row.stream.fail(error)

    def on_batch_over(self, duration: float) -> None:
        self._observe(BatchEnded(len(self._running), duration))
        if not self._batch_over.done():
            self._batch_over.set_result(None)

    def on_memory(self, memory: int) -> None:
        self._observe(MemoryHeld(memory))

    def on_worker_died(self, error: BaseException) -> None:
        if self.state is State.STARTING:
            self.error = error
            self._move(State.FAILED)
            self._decided.set()
        elif self.state in (State.READY, State.DRAINING):
            self.error = error
            self._end(State.FAILED, EngineError("the worker thread died"))
