"""The real batcher under any order of submit, cancel, deadline, step, finish, fail and drain, against a small model.

The engine waits for a command at each step, so that between two rules nothing moves and the model can be compared.
"""

import asyncio
import os
import queue
import threading
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from batching.batcher import Batcher, BatchingConfig
from batching.engine import Steps
from batching.errors import (
    BatchingError,
    DeadlineExceeded,
    Drained,
    EngineError,
    NotReady,
    OutOfMemory,
    QueueFull,
    TooBusy,
)
from batching.events import Event, Outcome, RowEnded, State
from batching.progress import Progress
from batching.queue import MAX_PASSED_OVER, QueueLimits
from batching.stream import Row, Stream
from server.observe.metrics import Metrics
from tests.batching.conftest import PATIENCE, SkippingLoop, request
from tests.fakes import INFO

LONG, SHORT = 36_000.0, 20.0
DRAIN = 3600.0
ERRORS: dict[Outcome, type[BatchingError]] = {
    Outcome.DEADLINE: DeadlineExceeded,
    Outcome.DRAINED: Drained,
    Outcome.ERROR: EngineError,
}


class Commanded:
    """`Engine` that does one command a step: None is a token for each row, an error is raised.

    `current` is the ids of the batch that runs but for those that are over, `waiting` whether it waits for a command.
    """

    def __init__(self, joins: bool) -> None:
        self.info = replace(INFO, joins=joins)
        self.batches: list[list[str]] = []
        self.current: list[str] = []
        self.waiting = False
        self._commands: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def command(self, error: BaseException | None = None) -> None:
        self.waiting = False
        self._commands.put(error)

    def run(self, rows: Sequence[Row], steps: Steps) -> None:
        rows = list(rows)
        self.batches.append([row.request.id for row in rows])
        while not all(row.over for row in rows):
            self.current = [row.request.id for row in rows if not row.over]
            self.waiting = True
            if error := self._commands.get():
                raise error
            steps.emit(rows, [row.num_output_tokens + 1 for row in rows])
            if self.info.joins:
                rows += steps.admit()

    def memory(self) -> int:
        return 0


class Watched(queue.SimpleQueue[list[Row] | None]):
    """The worker's queue, which knows whether the worker waits at it."""

    idle = False

    def get(self, block: bool = True, timeout: float | None = None) -> list[Row] | None:
        self.idle = True
        found = super().get(block, timeout)
        self.idle = False
        return found


@dataclass
class Asked:
    """What the model knows of a request."""

    stream: Stream
    max_tokens: int
    time_limit: float
    sent: int = 0
    outcome: Outcome | None = None
    passed_over: int = 0
    read: list[int] = field(default_factory=list)

    @property
    def row(self) -> Row:
        return self.stream.row


class Interleavings(RuleBasedStateMachine):
    @initialize(rows=st.integers(1, 3), room=st.integers(1, 8), joins=st.booleans())
    def begin(self, rows: int, room: int, joins: bool) -> None:
        self.descriptors = len(os.listdir("/proc/self/fd"))
        self.threads = set(threading.enumerate())
        self.loop = SkippingLoop()
        self.unheard: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda loop, context: self.unheard.append(context))
        self.engine = Commanded(joins)
        self.events: list[Event] = []
        self.progress = Progress()
        self.metrics = Metrics(self.progress)
        self.asked: dict[str, Asked] = {}
        self.started = 0
        self.drain: asyncio.Task[None] | None = None
        self.do(self.start(BatchingConfig(rows, 0.0, QueueLimits(room))))

    async def start(self, config: BatchingConfig) -> None:
        self.batcher = Batcher(lambda: self.engine, config, [self.events.append, self.progress, self.metrics])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("batching.worker.queue.SimpleQueue", Watched)
            await self.batcher.start()

    def do(self, work: Coroutine[Any, Any, None]) -> None:
        """Run it, and then all that follows from it until the engine waits for a command or has nothing to do."""

        async def settled() -> None:
            async with asyncio.timeout(PATIENCE / 2):
                await work
                while not (await self.is_still() and await self.is_still()):
                    pass

        self.loop.run_until_complete(settled())
        self.note_batches()

    async def is_still(self) -> bool:
        for _ in range(10):
            await asyncio.sleep(0)
        if self.batcher.state in (State.FAILED, State.STOPPED):
            return True
        return self.engine.waiting or (self.idle and not self.batcher._queue)

    @property
    def idle(self) -> bool:
        """Whether the worker has nothing to do."""
        batches = self.batcher._worker._batches
        assert isinstance(batches, Watched)
        return batches.idle and batches.empty()

    def note_batches(self) -> None:
        """Rows that waited while ones behind them were taken were passed over."""
        for batch in self.engine.batches[self.started :]:
            taken = [self.asked[id].row.virtual_finish for id in batch]
            for one in self.asked.values():
                behind = one.row in self.batcher._queue and one.row.virtual_finish < max(taken)
                one.passed_over += behind and not self.engine.info.joins
        self.started = len(self.engine.batches)

    def living(self) -> list[Asked]:
        """Those of the batch at hand that are not over."""
        if not self.engine.waiting:
            return []
        return [self.asked[id] for id in self.engine.current if self.asked[id].outcome is None]

    def one(self, data: st.DataObject) -> Asked:
        return self.asked[data.draw(st.sampled_from(sorted(self.asked)))]

    # Rules

    @rule(
        tokens=st.lists(st.integers(1, 4), min_size=1, max_size=3),
        prompt=st.integers(1, 40),
        client=st.sampled_from("ab"),
        priority=st.sampled_from([0, 0, -2]),
        limit=st.sampled_from([LONG, SHORT]),
    )
    def submit(self, tokens: list[int], prompt: int, client: str, priority: int, limit: float) -> None:
        start = len(self.asked)
        requests = [
            request(prompt, id=f"{start + n:03}", max_tokens=most, time_limit=limit, client=client, priority=priority)
            for n, most in enumerate(tokens)
        ]

        async def work() -> None:
            try:
                streams = self.batcher.submit_all(requests)
            except NotReady:
                assert self.batcher.state is not State.READY
            except (QueueFull, TooBusy):
                assert self.batcher._queue, "an empty queue has room"
            else:
                for one, stream in zip(requests, streams, strict=True):
                    self.asked[one.id] = Asked(stream, one.sampling.max_tokens, limit)

        if len(tokens) <= self.batcher._config.queue.rows:
            self.do(work())

    @precondition(lambda self: self.engine.waiting)
    @rule()
    def step(self) -> None:
        for one in self.living():
            one.sent += 1
            if one.sent == one.max_tokens:
                one.outcome = Outcome.ANSWERED
        self.do(self.command(None))

    @precondition(lambda self: self.engine.waiting)
    @rule()
    def fail(self) -> None:
        for one in self.living():
            one.outcome = Outcome.ERROR
        self.do(self.command(ValueError("scripted")))

    @precondition(lambda self: self.engine.waiting)
    @rule()
    def run_out_of_memory(self) -> None:
        alone = len(self.engine.current) == 1
        for one in self.living():
            if one.sent or alone:
                one.outcome = Outcome.ERROR
        self.do(self.command(OutOfMemory("scripted")))

    @precondition(lambda self: self.engine.waiting and len(self.asked) > 8)
    @rule()
    def die(self) -> None:
        for one in self.asked.values():
            one.outcome = one.outcome or Outcome.ERROR
        self.do(self.command(SystemExit("scripted")))

    async def command(self, error: BaseException | None) -> None:
        self.engine.command(error)

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), stop=st.booleans())
    def leave(self, data: st.DataObject, stop: bool) -> None:
        one = self.one(data)
        one.outcome = one.outcome or (Outcome.ANSWERED if stop else Outcome.CANCELLED)

        async def work() -> None:
            (one.stream.stop if stop else one.stream.cancel)()

        self.do(work())

    @rule()
    def let_time_pass(self) -> None:
        for one in self.asked.values():
            if one.time_limit == SHORT:
                one.outcome = one.outcome or Outcome.DEADLINE

        async def work() -> None:
            self.loop.skipped += SHORT + 1
            await asyncio.sleep(0)

        self.do(work())

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        """All that is there; the end of it is the row's outcome."""
        one = self.one(data)

        async def work() -> None:
            while one.stream._tokens:
                one.read += (await anext(one.stream)).tokens
            assert one.read == list(range(1, len(one.read) + 1))
            if error := ERRORS.get(one.outcome) if one.outcome else None:
                with pytest.raises(error):
                    await anext(one.stream)

        self.do(work())

    @precondition(lambda self: self.drain is None and len(self.asked) > 4)
    @rule(seconds=st.sampled_from([0.0, DRAIN]))
    def drained(self, seconds: float) -> None:
        if not seconds and self.batcher.state is State.READY:
            for one in self.asked.values():
                one.outcome = one.outcome or Outcome.DRAINED

        async def work() -> None:
            self.drain = asyncio.create_task(self.batcher.drain(seconds))
            await asyncio.sleep(0)

        self.do(work())

    # Laws

    @invariant()
    def outcomes_are_those_of_the_model_and_each_is_told_once(self) -> None:
        told = [(event.id, event.outcome) for event in self.events if isinstance(event, RowEnded)]
        assert dict(told) == {id: one.outcome for id, one in self.asked.items() if one.outcome}
        assert max(Counter(id for id, _ in told).values(), default=1) == 1

    @invariant()
    def rows_stand_in_line_and_are_not_passed_over_too_often(self) -> None:
        finishes = [row.virtual_finish for row in self.batcher._queue]
        assert finishes == sorted(finishes)
        assert all(max(one.passed_over, one.row.passed_over) <= MAX_PASSED_OVER for one in self.asked.values())
        flows: dict[tuple[str, int], list[str]] = {}
        for row in self.batcher._queue:
            flows.setdefault((row.request.client, row.request.priority), []).append(row.request.id)
        assert all(ids == sorted(ids) for ids in flows.values())

    @invariant()
    def gauges_tell_the_truth(self) -> None:
        value = self.metrics.registry.get_sample_value
        assert value("microbatch_queue_depth") == len(self.batcher._queue)
        if not self.engine.waiting or self.batcher.state in (State.FAILED, State.STOPPED):
            assert value("microbatch_running_rows") == 0

    def teardown(self) -> None:
        if self.drain is not None and not self.drain.done():
            for one in self.asked.values():
                one.outcome = one.outcome or (Outcome.DEADLINE if one.time_limit == SHORT else None)
            self.loop.skipped += DRAIN + 1
            self.loop.run_until_complete(self.drain)
        for one in self.asked.values():
            one.outcome = one.outcome or Outcome.DRAINED
        self.do(self.batcher.drain(0))
        if self.drain is not None:
            self.loop.run_until_complete(self.drain)
        for _ in range(9):  # so that a batch that was given up ends, also one that rows were about to join
            self.engine.command()
        for thread in set(threading.enumerate()) - self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        self.loop.run_until_complete(asyncio.sleep(0))
        assert not asyncio.all_tasks(self.loop)
        self.outcomes_are_those_of_the_model_and_each_is_told_once()
        self.gauges_tell_the_truth()
        assert not self.batcher._running
        self.loop.close()
        assert len(os.listdir("/proc/self/fd")) <= self.descriptors  # what an earlier test left may be closed meanwhile
        assert not self.unheard


TestInterleavings = Interleavings.TestCase
Interleavings.TestCase.settings = settings(
    max_examples=int(os.environ.get("INTERLEAVINGS", "60")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
