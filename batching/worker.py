"""The worker thread: the only one that touches the device. It builds the engine, then runs one batch after another.

It gets whole batches through a thread-safe queue and reports to the event loop through `post`: one
`call_soon_threadsafe` a decode step, carrying every row's tokens.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol

from batching.engine import NO_LOGPROBS, Engine
from batching.errors import UNWINDING, BatchingError, EngineError, OutOfMemory, is_sticky
from batching.stream import Row
from batching.types import Finish, ModelInfo, PromptLogprob, TokenLogprob

logger = logging.getLogger(__name__)

NewTokens = list[tuple[Row, int, Finish | None, TokenLogprob | None]]
"""For each row that got a token: the token, the finish reason if it finished, and log probabilities if wanted."""


class Listener(Protocol):
    """The worker's reports. Each call is made on the event loop's thread."""

    def on_built(self, info: ModelInfo) -> None: ...
    def on_step(self, tokens: NewTokens, running: int, at: float) -> None: ...
    def on_prompt(
        self, row: Row, logprobs: Sequence[PromptLogprob | None], finish: Finish | None, running: int
    ) -> None: ...
    def on_rows_failed(self, rows: Sequence[Row], error: BatchingError) -> None: ...
    def on_batch_over(self, duration: float) -> None: ...
    def on_memory(self, memory: int) -> None: ...
    def on_worker_died(self, error: BaseException) -> None: ...


MEMORY_SECONDS = 1.0
"""How often the memory is told while a batch runs, which may be for days where rows join it."""

Post = Callable[..., object]
"""`loop.call_soon_threadsafe`, or a stand-in for it."""


class Worker:
    """Owns the thread. `start` it once, `give` it batches, and `finish` to end it after the running batch."""

    def __init__(self, build: Callable[[], Engine], listener: Listener, post: Post) -> None:
        self._build = build
        self._listener = listener
        self._post = post
        self._batches: queue.SimpleQueue[list[Row] | None] = queue.SimpleQueue()
        self._memory_due = 0.0  # when the memory is told next
        # A daemon, so that a hung kernel cannot keep the process alive.
        self._thread = threading.Thread(target=self._main, name="gpu-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def give(self, rows: list[Row]) -> None:
        self._batches.put(rows)

    def finish(self) -> None:
        self._batches.put(None)

    def _main(self) -> None:
        try:
            engine = self._build()
            self._tell(self._listener.on_built, engine.info)
            self._tell_memory(engine)
            while (rows := self._batches.get()) is not None:
                started = time.monotonic()
                self._run(engine, rows)
                self._tell(self._listener.on_batch_over, time.monotonic() - started)
                self._tell_memory(engine)
        except BaseException as error:
            if not isinstance(error, BatchingError):
                logger.exception("the worker thread died")
            self._tell(self._listener.on_worker_died, error)

    def _run(self, engine: Engine, rows: Sequence[Row]) -> None:
        """Run one batch, with the rows that join it."""
        rows = [row for row in rows if not row.cancelled]
        if not rows:
            return
        steps = BatchSteps(partial(self._report, engine), rows, self._joining, self._report_prompt)
        try:
            engine.run(rows, steps)
            return
        except OutOfMemory as error:
            shortage = OutOfMemory(*error.args)
        except UNWINDING:
            raise
        except BaseException as error:
            if is_sticky(error):
                raise  # no further batch can succeed, so the thread and with it the process end
            logger.exception("a batch of %d rows failed", len(steps.rows))
            self._fail(steps.rows, EngineError(f"the batch failed with {type(error).__name__}"))
            return
        # Done here, after the caught error is gone, because its traceback holds the batch's allocations.
        self._split(engine, list(steps.rows), shortage)

    def _joining(self) -> list[Row]:
        """Rows that were given during the running batch."""
        joining: list[Row] = []
        while not self._batches.empty():
            rows = self._batches.get()
            if rows is None:
                self._batches.put(None)  # end after this batch
                break
            joining += rows
        return joining

    def _split(self, engine: Engine, rows: Sequence[Row], error: OutOfMemory) -> None:
        """Retry in two halves the rows that have no tokens yet; the others cannot be restarted."""
        again = [row for row in rows if not row.num_output_tokens]
        self._fail([row for row in rows if row.num_output_tokens], error)
        if len(again) == len(rows) == 1:
            self._fail(again, error)
            return
        logger.warning("out of memory with %d rows in a batch, retrying %d in halves", len(rows), len(again))
        half = (len(again) + 1) // 2
        self._run(engine, again[:half])
        self._run(engine, again[half:])

    def _fail(self, rows: Iterable[Row], error: BatchingError) -> None:
        failed = [row for row in rows if not row.over]
        for row in failed:
            row.over = True
        if failed:
            self._tell(self._listener.on_rows_failed, failed, error)

    def _report(self, engine: Engine, tokens: NewTokens, running: int) -> None:
        at = time.monotonic()
        self._tell(self._listener.on_step, tokens, running, at)
        if at >= self._memory_due:
            self._tell_memory(engine)

    def _report_prompt(
        self, row: Row, logprobs: Sequence[PromptLogprob | None], finish: Finish | None, running: int
    ) -> None:
        self._tell(self._listener.on_prompt, row, logprobs, finish, running)

    def _tell_memory(self, engine: Engine) -> None:
        self._memory_due = time.monotonic() + MEMORY_SECONDS
        self._tell(self._listener.on_memory, engine.memory())

    def _tell(self, callback: Callable[..., object], *arguments: object) -> None:
        try:
            self._post(callback, *arguments)
        except RuntimeError:
            logger.debug("event loop closed; dropped %s", callback.__name__)


def no_report(*arguments: object) -> None:
    """For a batch without prompt log probabilities."""


class BatchSteps:
    """`Steps` of one batch: counts each row's tokens, and sends one report per step and per piece of a prompt.

    `rows` are the batch's unfinished rows, including those that joined.
    """

    def __init__(
        self,
        report: Callable[[NewTokens, int], None],
        rows: Sequence[Row] = (),
        joining: Callable[[], list[Row]] = list,
        report_prompt: Callable[[Row, Sequence[PromptLogprob | None], Finish | None, int], None] = no_report,
    ) -> None:
        self.rows = dict.fromkeys(rows)
        self._report = report
        self._joining = joining
        self._report_prompt = report_prompt

    def admit(self) -> list[Row]:
        joined = self._joining()
        if joined:
            # A row cancelled before its first token is never emitted, and a batch that runs for days must drop it here.
            self.rows = dict.fromkeys(row for row in [*self.rows, *joined] if not (row.over or row.cancelled))
        return joined

    def emit(
        self, rows: Sequence[Row], tokens: Sequence[int], logprobs: Mapping[int, TokenLogprob] = NO_LOGPROBS
    ) -> list[bool]:
        new_tokens: NewTokens = []
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if row.cancelled:
                row.over = True
            if not row.over:
                new_tokens.append((row, token, row.push(token), logprobs.get(place)))
            if row.over:
                self.rows.pop(row, None)
        self._report(new_tokens, self._num_running)
        return [row.over for row in rows]

    def emit_prompt(self, row: Row, start: int, logprobs: Sequence[PromptLogprob | None]) -> bool:
        fresh = logprobs[row.num_prompt_logprobs - start :]
        if row.cancelled:
            row.over = True
        elif fresh:
            finish = row.push_prompt(len(fresh))
            self._report_prompt(row, fresh, finish, self._num_running)
        if row.over:
            self.rows.pop(row, None)
        return row.over

    @property
    def _num_running(self) -> int:
        """Without rows that were cancelled, whose end the engine may not report."""
        return sum(not (row.over or row.cancelled) for row in self.rows)
