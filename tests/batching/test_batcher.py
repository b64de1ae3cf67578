"""The batcher with an engine that follows a script. Nothing here sleeps: steps are released, clocks are moved."""

import asyncio
import contextlib
import gc
import random
import threading
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import pytest

from batching import worker
from batching.batcher import Batcher, BatchingConfig
from batching.engine import Engine, Steps
from batching.errors import (
    DeadlineExceeded,
    Drained,
    EngineError,
    ModelError,
    NotReady,
    OutOfMemory,
    QueueFull,
    TooBusy,
)
from batching.events import (
    BatchEnded,
    BatchStarted,
    Event,
    MemoryHeld,
    Observer,
    Outcome,
    PromptScored,
    QueueChanged,
    Rejected,
    RowEnded,
    RowStarted,
    State,
    StateChanged,
    Stepped,
)
from batching.queue import QueueLimits
from batching.stream import MOST_TOKENS, Row, Stream, with_deltas
from batching.types import Delta, Finish
from tests.batching.conftest import PATIENCE, Runner, all_tokens, request, skip
from tests.fakes import INFO, SCORED, ScriptedEngine, prompt_logprob

NEVER = 3600.0
"""A window that no test can outwait: a batch formed under it was full."""

Kind = TypeVar("Kind")


class Log:
    """An observer that keeps what it hears and lets a test wait for it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._news = asyncio.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self._news.set()

    def of(self, kind: type[Kind]) -> list[Kind]:
        return [event for event in self.events if isinstance(event, kind)]

    def but(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if not isinstance(event, kind)]

    async def until(self, true: Callable[[], bool]) -> None:
        while not true():
            self._news.clear()
            await self._news.wait()

    async def count(self, kind: type[Kind], number: int) -> list[Kind]:
        """Wait for so many events of a kind."""
        await self.until(lambda: len(self.of(kind)) >= number)
        return self.of(kind)

    def outcomes(self) -> dict[str, Outcome]:
        return {event.id: event.outcome for event in self.of(RowEnded)}


class CrampedEngine(ScriptedEngine):
    """Runs out of memory with more than `room` rows."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room

    def run(self, rows: Sequence[Row], steps: Steps) -> None:
        if len(rows) > self._room:
            self.batches.append([row.request.id for row in rows])
            raise OutOfMemory("scripted")
        super().run(rows, steps)


@pytest.fixture(autouse=True)
def no_worker_outlives_its_batcher() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE)
        assert not thread.is_alive()


@asynccontextmanager
async def serving(
    engine: ScriptedEngine,
    *,
    rows: int | None = 4,
    window: float = 0.0,
    queue: int = 64,
    observers: Sequence[Observer] = (),
) -> AsyncIterator[tuple[Batcher, Log]]:
    """A ready batcher and its log; at the end, what must hold of every log is checked."""
    log = Log()
    batcher = Batcher(lambda: engine, BatchingConfig(rows, window, QueueLimits(queue)), [*observers, log])
    assert await batcher.start() is engine.info
    try:
        yield batcher, log
    finally:
        await batcher.drain(0)
        if engine._gate is not None:
            engine.release(1000)
    assert batcher.ended.is_set()
    assert max(Counter(event.id for event in log.of(RowEnded)).values(), default=1) == 1
    depths = [(event.rows, event.prompt_tokens) for event in log.of(QueueChanged)]
    assert depths[-1:] in ([], [(0, 0)])


async def spin() -> None:
    """Let everything that is ready on the loop run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def start(batcher: Batcher, log: Log, id: str = "running") -> Stream:
    """Submit a request that occupies the (stepped) engine alone."""
    stream = batcher.submit(request(id=id))
    await log.count(BatchStarted, len(log.of(BatchStarted)) + 1)
    return stream


# Forming batches


def test_a_full_batch_does_not_wait_for_the_window(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with serving(engine, rows=3, window=NEVER) as (batcher, _):
            streams = [batcher.submit(request(id=id)) for id in "abc"]
            await asyncio.gather(*map(all_tokens, streams))
        assert engine.batches == [["a", "b", "c"]]

    run_async(main)


def test_an_idle_device_waits_for_others_to_join_the_first(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with serving(engine, rows=2, window=NEVER) as (batcher, log):
            first = batcher.submit(request(id="a"))
            await spin()
            assert not log.of(BatchStarted)
            second = batcher.submit(request(id="b"))
            await asyncio.gather(all_tokens(first), all_tokens(second))
        assert engine.batches == [["a", "b"]]

    run_async(main)


def test_a_batch_that_is_not_full_starts_when_the_window_has_passed(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with serving(engine, rows=4, window=0.05) as (batcher, _):
            streams = [batcher.submit(request(id=id)) for id in "ab"]
            await asyncio.gather(*map(all_tokens, streams))
        assert engine.batches == [["a", "b"]]

    run_async(main)


def test_a_lone_request_is_served_alone_once_the_window_has_passed(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with serving(engine, rows=4, window=0.05) as (batcher, log):
            assert await all_tokens(batcher.submit(request())) == [1, 2, 3, 4, 5, 6, 7, 8]
            assert log.of(BatchStarted)[0].rows == 1

    run_async(main)


def test_a_window_whose_only_row_left_is_closed_without_a_batch(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with serving(engine, rows=2, window=NEVER) as (batcher, _):
            batcher.submit(request(id="gone")).cancel()
            await spin()
            batcher.submit(request(id="gone too")).cancel()
            streams = [batcher.submit(request(id=id)) for id in "ab"]
            await asyncio.gather(*map(all_tokens, streams))
        assert engine.batches == [["a", "b"]]

    run_async(main)


def test_a_first_window_that_all_rows_leave_does_not_stop_the_batches(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with serving(engine, rows=2, window=NEVER) as (batcher, _):
            gone = batcher.submit(request(id="gone"))
            await spin()
            gone.cancel()
            await spin()
            streams = [batcher.submit(request(id=id)) for id in "ab"]
            await asyncio.gather(*map(all_tokens, streams))
        assert engine.batches == [["a", "b"]]

    run_async(main)


def test_the_next_batch_fills_while_one_runs_and_waits_for_no_window(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True)
        async with serving(engine, window=0.0) as (batcher, log):
            running = await start(batcher, log)
            waiting = [batcher.submit(request(id=id)) for id in "abc"]
            await spin()
            assert len(log.of(BatchStarted)) == 1
            engine.release(100)
            await asyncio.gather(*map(all_tokens, [running, *waiting]))
        assert engine.batches == [["running"], ["a", "b", "c"]]

    run_async(main)


def test_a_batch_holds_no_more_rows_than_allowed(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with serving(engine, rows=2, window=NEVER) as (batcher, _):
            streams = [batcher.submit(request(id=id)) for id in "abcdef"]
            await asyncio.gather(*map(all_tokens, streams))
        assert engine.batches == [["a", "b"], ["c", "d"], ["e", "f"]]

    run_async(main)


def test_a_batch_costs_no_more_padded_tokens_than_the_engine_has_room_for(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        half = INFO.token_budget // 2
        async with serving(engine, rows=3, window=NEVER) as (batcher, _):
            first, second, third = [batcher.submit(request(half - 8, id=id, max_tokens=8)) for id in "abc"]
            await asyncio.gather(all_tokens(first), all_tokens(second))
            third.cancel()
        assert engine.batches == [["a", "b"]]

    run_async(main)


# Rows and their streams


def test_a_row_ends_while_others_of_its_batch_run_on(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True)
        async with serving(engine, rows=2, window=NEVER) as (batcher, log):
            short = batcher.submit(request(id="short", max_tokens=1))
            long = batcher.submit(request(id="long", max_tokens=3))
            engine.release(1)
            assert await all_tokens(short) == [1]
            assert not long.over
            assert not log.of(BatchEnded)
            engine.release(2)
            assert await all_tokens(long) == [1, 2, 3]

    run_async(main)


def test_a_stop_token_ends_only_its_own_row(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with serving(engine, rows=2, window=NEVER) as (batcher, log):
            stopped = batcher.submit(request(id="stopped", stop_token_ids=frozenset({3})))
            other = batcher.submit(request(id="other", max_tokens=5))
            assert await all_tokens(stopped) == [1, 2, 3]
            assert await all_tokens(other) == [1, 2, 3, 4, 5]
            finishes = {event.id: event.finish for event in log.of(RowEnded)}
            assert finishes == {"stopped": Finish.STOP, "other": Finish.LENGTH}

    run_async(main)


def test_only_the_last_delta_says_why_the_row_is_over(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True)
        async with serving(engine) as (batcher, _):
            stream = batcher.submit(request(max_tokens=2))
            engine.release(1)
            assert await anext(stream) == Delta((1,))
            engine.release(1)
            assert await anext(stream) == Delta((2,), Finish.LENGTH)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    run_async(main)


def test_a_slow_reader_gets_several_tokens_at_once(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True)
        async with serving(engine) as (batcher, log):
            stream = batcher.submit(request(max_tokens=5))
            engine.release(3)
            await log.count(Stepped, 3)
            assert await anext(stream) == Delta((1, 2, 3))
            engine.release(2)
            await log.count(Stepped, 5)
            assert await anext(stream) == Delta((4, 5), Finish.LENGTH)

    run_async(main)


def test_what_waits_for_a_slow_reader_comes_in_pieces_between_which_others_get_a_turn(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True)
        async with serving(engine) as (batcher, log):
            count = 3 * MOST_TOKENS + 1
            stream = batcher.submit(request(max_tokens=count))
            engine.release(count)
            await log.count(Stepped, count)
            turns: list[int] = []
            deltas: list[Delta] = []
            for piece in range(4):
                asyncio.get_running_loop().call_soon(turns.append, piece)
                deltas.append(await anext(stream))
                assert turns == list(range(min(piece + 1, 3))), "the last piece is no longer than any"
            assert [len(delta.tokens) for delta in deltas] == [MOST_TOKENS] * 3 + [1]
            assert [token for delta in deltas for token in delta.tokens] == list(range(1, count + 1))
            assert [delta.finish for delta in deltas] == [None] * 3 + [Finish.LENGTH]
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    run_async(main)


@pytest.mark.parametrize(("top", "named"), [(0, ()), (3, ()), (20, (7,))])
def test_a_delta_has_fewer_tokens_the_more_log_probabilities_are_beside_each(
    run_async: Runner, top: int, named: tuple[int, ...]
) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True)
        async with serving(engine) as (batcher, log):
            stream = batcher.submit(request(max_tokens=MOST_TOKENS, top_logprobs=top, logprob_token_ids=named))
            engine.release(MOST_TOKENS)
            await log.count(Stepped, MOST_TOKENS)
            deltas = [delta async for delta in stream]
            assert max(len(delta.tokens) for delta in deltas) == MOST_TOKENS // (1 + top + len(named))
            assert [token for delta in deltas for token in delta.tokens] == list(range(1, MOST_TOKENS + 1))

    run_async(main)


def test_rows_of_which_much_waits_are_read_one_by_one_with_turns_for_others_between(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True)
        async with serving(engine, rows=3, window=NEVER) as (batcher, log):
            streams = [batcher.submit(request(id=id, max_tokens=MOST_TOKENS)) for id in "abc"]
            engine.release(MOST_TOKENS)
            await log.count(Stepped, MOST_TOKENS)
            turns: list[str] = []
            for place, stream in enumerate(streams):
                asyncio.get_running_loop().call_soon(turns.append, stream.row.request.id)
                assert await with_deltas(streams[place:]) == [stream]
                assert turns[-1] == stream.row.request.id
                delta = stream.take()
                assert delta is not None
                assert len(delta.tokens) == MOST_TOKENS
                assert stream.take() is None

    run_async(main)


def test_a_reader_that_has_all_it_needs_gets_nothing_that_still_waits(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True)
        async with serving(engine) as (batcher, log):
            count = 2 * MOST_TOKENS
            stream = batcher.submit(request(max_tokens=count))
            engine.release(count)
            await log.count(Stepped, count)
            assert len((await anext(stream)).tokens) == MOST_TOKENS
            stream.stop()
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    run_async(main)


def test_one_wait_for_several_streams_gives_those_that_have_news(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True)
        async with serving(engine, rows=3, window=NEVER) as (batcher, log):
            lengths = {"short": 1, "long": 3, "gone": 3}
            streams = [batcher.submit(request(id=id, max_tokens=length)) for id, length in lengths.items()]
            short, long, gone = streams
            waiting = asyncio.ensure_future(with_deltas(streams))
            await asyncio.sleep(0)
            gone.cancel()
            assert await waiting == [gone]
            assert gone.take() is None
            engine.release(1)
            assert await with_deltas([short, long]) == [short, long]
            assert (short.take(), long.take()) == (Delta((1,), Finish.LENGTH), Delta((1,)))
            assert await with_deltas([short, long]) == [short]  # that it is over
            assert short.take() is None
            engine.release(1)
            assert await with_deltas([long]) == [long]
            engine.release(1)
            await log.count(Stepped, 3)
            assert long.take() == Delta((2, 3), Finish.LENGTH)

    run_async(main)


@pytest.mark.parametrize("max_tokens", [0, 2])
@pytest.mark.parametrize("prompt", [1, SCORED, 2 * SCORED + 1])
def test_what_a_prompt_was_told_comes_in_pieces_before_the_first_token(
    prompt: int, max_tokens: int, run_async: Runner
) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with serving(engine) as (batcher, log):
            asked = request(prompt, prompt_logprobs=1, max_tokens=max_tokens)
            stream = batcher.submit(asked)
            await log.count(RowEnded, 1)  # all of it is there before any of it is read
            deltas = [delta async for delta in stream]
        pieces = [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs]
        told = [entry for piece in pieces for entry in piece]
        assert told == [None, *(prompt_logprob(token, 1) for token in asked.prompt[1:])]
        assert max(map(len, pieces)) <= SCORED
        assert all(not delta.tokens for delta in deltas[: len(pieces)])
        assert [token for delta in deltas[len(pieces) :] for token in delta.tokens] == [1, 2][:max_tokens]
        assert [delta.finish for delta in deltas] == [None] * (len(deltas) - 1) + [Finish.LENGTH]
        assert sum(event.tokens for event in log.of(PromptScored)) == prompt
        [end] = log.of(RowEnded)
        assert (end.outcome, end.output_tokens) == (Outcome.ANSWERED, max_tokens)

    run_async(main)


def test_others_have_a_turn_between_the_pieces_of_a_prompt(run_async: Runner) -> None:
    async def main() -> None:
        async with serving(ScriptedEngine()) as (batcher, log):
            stream = batcher.submit(request(10 * SCORED, prompt_logprobs=0, max_tokens=0))
            await log.count(RowEnded, 1)
            turns = 0

            async def other() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            task = asyncio.create_task(other())
            seen = [turns async for _ in stream]
            task.cancel()
        assert seen == sorted(set(seen)), "a turn before each piece"

    run_async(main)


@pytest.mark.parametrize("end", [Stream.cancel, Stream.stop, lambda stream: stream.fail(EngineError("x"))])
def test_pieces_that_come_after_the_end_are_dropped(end: Callable[[Stream], None], run_async: Runner) -> None:
    async def main() -> None:
        async with serving(ScriptedEngine(stepped=True)) as (batcher, log):
            stream = await start(batcher, log)
            stream.feed_prompt([None], None)
            end(stream)
            stream.feed_prompt([prompt_logprob(5, 0)], Finish.LENGTH)
            first = stream.take()
            assert first is not None
            assert first.prompt_logprobs == (None,)
            with contextlib.suppress(EngineError):
                assert stream.take() is None
            assert len(log.of(RowEnded)) == 1

    run_async(main)


def test_what_came_before_an_error_is_taken_before_it_is_raised(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True)
        async with serving(engine) as (batcher, log):
            stream = batcher.submit(request(time_limit=30.0))
            engine.release(1)
            await log.count(Stepped, 1)
            skip(31.0)
            await log.count(RowEnded, 1)
            assert await with_deltas([stream]) == [stream]
            assert stream.take() == Delta((1,))
            with pytest.raises(DeadlineExceeded):
                stream.take()
            engine.release(1)

    run_async(main)


# Ending early


def test_a_request_cancelled_in_the_queue_never_reaches_the_engine(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True)
        async with serving(engine) as (batcher, log):
            running = await start(batcher, log)
            waiting = batcher.submit(request(id="waiting"))
            waiting.cancel()
            assert log.outcomes() == {"waiting": Outcome.CANCELLED}
            assert log.of(QueueChanged)[-1] == QueueChanged(0, 0)
            engine.release(8)
            await all_tokens(running)
        assert engine.batches == [["running"]]

    run_async(main)


def test_a_reader_that_leaves_frees_the_device_at_the_next_step(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True)
        async with serving(engine) as (batcher, log):
            async with await start(batcher, log) as stream:
                engine.release(1)
                assert await anext(stream) == Delta((1,))
            assert log.outcomes() == {"running": Outcome.CANCELLED}
            engine.release(1)
            await log.count(BatchEnded, 1)
            assert engine.steps == 2
            assert stream.output_tokens == 1

    run_async(main)


def test_a_row_that_leaves_its_batch_does_not_disturb_the_others(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True)
        async with serving(engine, rows=2, window=NEVER) as (batcher, log):
            leaving, staying = batcher.submit(request(id="leaving")), batcher.submit(request(id="staying"))
            engine.release(2)
            await log.count(Stepped, 2)
            leaving.cancel()
            engine.release(6)
            assert await all_tokens(staying) == [1, 2, 3, 4, 5, 6, 7, 8]
            assert leaving.output_tokens == 2

    run_async(main)


@pytest.mark.parametrize("end", [Stream.cancel, Stream.stop])
def test_a_stream_ended_from_elsewhere_wakes_its_reader(end: Callable[[Stream], None], run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True)
        async with serving(engine) as (batcher, log):
            stream = await start(batcher, log)
            reader = asyncio.create_task(all_tokens(stream))
            await spin()
            end(stream)
            assert await reader == []

    run_async(main)


def test_a_reader_that_has_enough_is_answered(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True)
        async with serving(engine) as (batcher, log):
            async with await start(batcher, log) as stream:
                engine.release(2)
                await log.count(Stepped, 2)
                stream.stop()
            engine.release(1)
            await log.count(BatchEnded, 1)
            (ended,) = log.of(RowEnded)
            assert (ended.outcome, ended.finish, ended.output_tokens) == (Outcome.ANSWERED, Finish.STOP, 2)
            assert engine.steps == 3

    run_async(main)


def test_ending_a_stream_that_is_over_changes_nothing(run_async: Runner) -> None:
    async def main() -> None:
        async with serving(ScriptedEngine()) as (batcher, log):
            stream = batcher.submit(request())
            await log.count(RowEnded, 1)
            stream.cancel()
            stream.fail(EngineError("late"))
            assert await anext(stream) == Delta((1, 2, 3, 4, 5, 6, 7, 8), Finish.LENGTH)
            stream.stop()
            assert log.outcomes() == {"r": Outcome.ANSWERED}

    run_async(main)


def test_a_request_whose_time_is_over_in_the_queue_never_reaches_the_engine(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True)
        async with serving(engine) as (batcher, log):
            running = await start(batcher, log)
            waiting = batcher.submit(request(id="waiting", time_limit=20.0))
            reader = asyncio.create_task(all_tokens(waiting))
            await spin()
            skip(21.0)
            with pytest.raises(DeadlineExceeded):
                await reader
            assert log.outcomes() == {"waiting": Outcome.DEADLINE}
            engine.release(8)
            await all_tokens(running)
        assert engine.batches == [["running"]]

    run_async(main)


def test_a_request_whose_time_is_over_in_its_batch_keeps_the_tokens_that_came(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True)
        async with serving(engine) as (batcher, log):
            stream = batcher.submit(request(time_limit=20.0))
            engine.release(2)
            await log.count(Stepped, 2)
            skip(21.0)
            await log.count(RowEnded, 1)
            assert await anext(stream) == Delta((1, 2))
            with pytest.raises(DeadlineExceeded):
                await anext(stream)
            engine.release(1)
            await log.count(BatchEnded, 1)
            assert log.outcomes() == {"r": Outcome.DEADLINE}
            assert engine.steps == 3

    run_async(main)


def test_an_answer_that_came_in_time_may_be_read_later(run_async: Runner) -> None:
    async def main() -> None:
        async with serving(ScriptedEngine()) as (batcher, log):
            stream = batcher.submit(request(time_limit=20.0, max_tokens=2))
            await log.count(RowEnded, 1)
            skip(21.0)
            await spin()
            assert await anext(stream) == Delta((1, 2), Finish.LENGTH)

    run_async(main)


# Refusing


def test_a_full_queue_refuses_and_says_when_to_come_back(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True)
        async with serving(engine, queue=2) as (batcher, log):
            await start(batcher, log)
            first, _ = batcher.submit(request(id="a")), batcher.submit(request(id="b"))
            with pytest.raises(QueueFull) as refusal:
                batcher.submit(request(id="c"))
            assert 1.0 <= refusal.value.retry_after <= 60.0
            assert log.of(Rejected) == [Rejected("queue_full")]
            first.cancel()
            batcher.submit(request(id="d"))
            assert "c" not in log.outcomes()

    run_async(main)


def test_no_work_is_taken_before_the_engine_is_built(run_async: Runner) -> None:
    async def main() -> None:
        built = threading.Event()

        def build() -> Engine:
            built.wait(PATIENCE)
            return ScriptedEngine()

        log = Log()
        batcher = Batcher(build, BatchingConfig(), [log])
        starting = asyncio.create_task(batcher.start())
        await spin()
        with pytest.raises(NotReady) as refusal:
            batcher.submit(request())
        assert refusal.value.state == State.STARTING
        assert log.events == [Rejected("not_ready")]
        built.set()
        await starting
        assert len(await all_tokens(batcher.submit(request()))) == 8
        await batcher.drain(0)

    run_async(main)


# The end of a batcher


def test_a_drain_finishes_what_was_accepted_and_takes_nothing_new(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True)
        async with serving(engine) as (batcher, log):
            running = await start(batcher, log)
            waiting = batcher.submit(request(id="waiting"))
            drain = asyncio.create_task(batcher.drain(NEVER))
            await spin()
            with pytest.raises(NotReady, match="draining"):
                batcher.submit(request(id="late"))
            assert not batcher.ended.is_set()
            engine.release(16)
            assert await all_tokens(running) == await all_tokens(waiting) == [1, 2, 3, 4, 5, 6, 7, 8]
            await drain
            assert batcher.state is State.STOPPED
            assert batcher.ended.is_set()
            with pytest.raises(NotReady, match="stopped"):
                batcher.submit(request(id="later"))

    run_async(main)


def test_what_a_drain_cannot_finish_in_time_is_told_so(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True)
        async with serving(engine) as (batcher, log):
            running = await start(batcher, log)
            waiting = batcher.submit(request(id="waiting"))
            engine.release(1)
            await log.count(Stepped, 1)
            drain = asyncio.create_task(batcher.drain(20.0))
            await spin()
            assert not drain.done()
            skip(21.0)
            await drain
            assert await anext(running) == Delta((1,))
            for stream in (running, waiting):
                with pytest.raises(Drained):
                    await anext(stream)
            assert log.outcomes() == {"running": Outcome.DRAINED, "waiting": Outcome.DRAINED}
            assert batcher.state is State.STOPPED
        assert engine.batches == [["running"]]

    run_async(main)


def test_a_second_drain_changes_nothing(run_async: Runner) -> None:
    async def main() -> None:
        async with serving(ScriptedEngine()) as (batcher, log):
            await batcher.drain(1.0)
            await batcher.drain(1.0)
            assert [event.state for event in log.of(StateChanged)] == [State.READY, State.DRAINING, State.STOPPED]

    run_async(main)


def test_a_drain_before_the_start_is_the_end(run_async: Runner) -> None:
    async def main() -> None:
        batcher = Batcher(ScriptedEngine, BatchingConfig())
        await batcher.drain(1.0)
        assert batcher.state is State.STOPPED
        assert batcher.ended.is_set()
        with pytest.raises(NotReady, match="stopped"):
            await batcher.start()

    run_async(main)


@pytest.mark.parametrize("broken", [False, True], ids=["built in the end", "not built in the end"])
def test_a_drain_while_the_engine_is_built_does_not_wait_for_it(broken: bool, run_async: Runner) -> None:
    async def main() -> None:
        built = threading.Event()

        def build() -> Engine:
            built.wait(PATIENCE)
            if broken:
                raise ModelError("there is no such model")
            return ScriptedEngine()

        log = Log()
        others = set(threading.enumerate())  # another test's worker may not have ended
        batcher = Batcher(build, BatchingConfig(), [log])
        starting = asyncio.create_task(batcher.start())
        await spin()
        await batcher.drain(NEVER)
        with pytest.raises(NotReady, match="stopped"):
            await starting
        assert batcher.ended.is_set()
        (worker,) = [thread for thread in set(threading.enumerate()) - others if thread.name == "gpu-worker"]
        built.set()
        await asyncio.to_thread(worker.join, PATIENCE)
        await spin()
        assert not worker.is_alive()
        assert batcher.state is State.STOPPED
        assert log.but(MemoryHeld) == [StateChanged(State.STOPPED)]

    run_async(main)


def test_a_drain_at_the_moment_the_engine_is_built_wins(run_async: Runner) -> None:
    async def main() -> None:
        built = threading.Event()

        def build() -> Engine:
            built.wait(PATIENCE)
            return ScriptedEngine()

        batcher = Batcher(build, BatchingConfig())
        starting = asyncio.create_task(batcher.start())
        await spin()
        batcher.on_built(INFO)  # the news is here, but `start` has not run on yet
        await batcher.drain(NEVER)
        built.set()
        with pytest.raises(NotReady, match="stopped"):
            await starting
        assert batcher.state is State.STOPPED

    run_async(main)


def test_an_engine_that_cannot_be_built_fails_the_start(run_async: Runner) -> None:
    async def main() -> None:
        reason = ModelError("there is no such model")

        def build() -> Engine:
            raise reason

        log = Log()
        batcher = Batcher(build, BatchingConfig(), [log])
        with pytest.raises(ModelError) as raised:
            await batcher.start()
        assert raised.value is reason
        assert batcher.state is State.FAILED
        assert log.events == [StateChanged(State.FAILED)]
        with pytest.raises(NotReady, match="failed"):
            batcher.submit(request())
        await batcher.drain(1.0)
        assert batcher.state is State.FAILED

    run_async(main)


def test_a_worker_that_dies_fails_everything_at_once(run_async: Runner) -> None:
    def die(step: int) -> None:
        if step == 1:
            raise SystemExit("scripted")

    async def main() -> None:
        engine = ScriptedEngine(stepped=True, before_step=die)
        async with serving(engine) as (batcher, log):
            running = await start(batcher, log)
            waiting = batcher.submit(request(id="waiting"))
            engine.release(2)
            await batcher.ended.wait()
            assert batcher.state is State.FAILED
            assert isinstance(batcher.error, SystemExit)
            assert await anext(running) == Delta((1,))
            for stream in (running, waiting):
                with pytest.raises(EngineError):
                    await anext(stream)
            assert log.outcomes() == {"running": Outcome.ERROR, "waiting": Outcome.ERROR}
            with pytest.raises(NotReady, match="failed"):
                batcher.submit(request(id="late"))

    run_async(main)


def test_a_worker_that_dies_while_draining_ends_the_drain(run_async: Runner) -> None:
    def die(step: int) -> None:
        raise SystemExit("scripted")

    async def main() -> None:
        engine = ScriptedEngine(stepped=True, before_step=die)
        async with serving(engine) as (batcher, log):
            running = await start(batcher, log)
            drain = asyncio.create_task(batcher.drain(NEVER))
            await spin()
            engine.release(1)
            await drain
            with pytest.raises(EngineError):
                await anext(running)
            assert batcher.state is State.FAILED

    run_async(main)


def test_a_loop_that_closed_does_not_hurt_the_worker(run_async: Runner) -> None:
    engine = ScriptedEngine(stepped=True)

    async def main() -> None:
        log = Log()
        batcher = Batcher(lambda: engine, BatchingConfig(), [log])
        await batcher.start()
        await start(batcher, log)
        engine.release(1)
        await log.count(Stepped, 1)
        await batcher.drain(0)

    run_async(main)
    engine.release(1)  # what the worker tells now nobody hears; that its thread ends is checked for every test


# Failing engines


def test_a_batch_that_fails_hurts_only_its_own_rows(run_async: Runner, caplog: pytest.LogCaptureFixture) -> None:
    faults = [ValueError("scripted")]

    def fail(step: int) -> None:
        if step == 2 and faults:
            raise faults.pop()

    async def main() -> None:
        engine = ScriptedEngine(before_step=fail)
        async with serving(engine, rows=2, window=NEVER) as (batcher, log):
            failing = [batcher.submit(request(id=id)) for id in "ab"]
            await log.count(RowEnded, 2)
            for stream in failing:
                assert await anext(stream) == Delta((1, 2))
                with pytest.raises(EngineError, match="ValueError"):
                    await anext(stream)
            fine = [batcher.submit(request(id=id)) for id in "cd"]
            assert await asyncio.gather(*map(all_tokens, fine)) == [[1, 2, 3, 4, 5, 6, 7, 8]] * 2
            assert log.outcomes() == {
                "a": Outcome.ERROR,
                "b": Outcome.ERROR,
                "c": Outcome.ANSWERED,
                "d": Outcome.ANSWERED,
            }
            assert len(await log.count(BatchEnded, 2)) == 2

    run_async(main)
    assert "a batch of 2 rows failed" in caplog.text


def test_rows_that_ended_before_their_batch_failed_keep_their_answer(run_async: Runner) -> None:
    def fail(step: int) -> None:
        if step == 2:
            raise ValueError("scripted")

    async def main() -> None:
        async with serving(ScriptedEngine(before_step=fail), rows=2, window=NEVER) as (batcher, log):
            done = batcher.submit(request(id="done", max_tokens=2))
            cut = batcher.submit(request(id="cut"))
            assert await all_tokens(done) == [1, 2]
            with pytest.raises(EngineError):
                await all_tokens(cut)
            assert log.outcomes() == {"done": Outcome.ANSWERED, "cut": Outcome.ERROR}

    run_async(main)


def test_a_batch_too_large_for_the_memory_is_answered_in_parts(run_async: Runner) -> None:
    async def main() -> None:
        engine = CrampedEngine(room=2)
        async with serving(engine, rows=5, window=NEVER) as (batcher, log):
            streams = [batcher.submit(request(id=id)) for id in "abcde"]
            answers = await asyncio.gather(*map(all_tokens, streams))
            assert answers == [[1, 2, 3, 4, 5, 6, 7, 8]] * 5
            await log.count(BatchEnded, 1)
        assert engine.batches == [list("abcde"), list("abc"), list("ab"), list("c"), list("de")]

    run_async(main)


def test_a_row_too_large_for_the_memory_fails_and_the_next_is_tried(run_async: Runner) -> None:
    async def main() -> None:
        engine = CrampedEngine(room=0)
        async with serving(engine, rows=2, window=NEVER) as (batcher, log):
            streams = [batcher.submit(request(id=id)) for id in "ab"]
            for stream in streams:
                with pytest.raises(OutOfMemory):
                    await all_tokens(stream)
            assert set(log.outcomes().values()) == {Outcome.ERROR}
        assert engine.batches == [["a", "b"], ["a"], ["b"]]

    run_async(main)


def test_rows_that_sent_nothing_are_tried_again_when_memory_runs_out_later(run_async: Runner) -> None:
    class Late(ScriptedEngine):
        """Runs out of memory in its first batch, after a token of the first row."""

        def run(self, rows: Sequence[Row], steps: Steps) -> None:
            if not self.batches:
                self.batches.append([row.request.id for row in rows])
                steps.emit(rows[:1], [77])
                raise OutOfMemory("scripted")
            super().run(rows, steps)

    async def main() -> None:
        engine = Late()
        async with serving(engine, rows=3, window=NEVER) as (batcher, log):
            begun, *others = [batcher.submit(request(id=id)) for id in "abc"]
            answers = await asyncio.gather(*map(all_tokens, others))
            assert answers == [[1, 2, 3, 4, 5, 6, 7, 8]] * 2
            assert await anext(begun) == Delta((77,))
            with pytest.raises(OutOfMemory):
                await anext(begun)
            assert log.outcomes()["a"] is Outcome.ERROR
        assert engine.batches == [["a", "b", "c"], ["b"], ["c"]]

    run_async(main)


def test_rows_cancelled_meanwhile_are_not_tried_again(run_async: Runner) -> None:
    class Waits(CrampedEngine):
        """Runs out of memory only once it is told to."""

        def __init__(self) -> None:
            super().__init__(room=1)
            self.begun = threading.Event()
            self.go = threading.Event()

        def run(self, rows: Sequence[Row], steps: Steps) -> None:
            self.begun.set()
            self.go.wait(PATIENCE)
            super().run(rows, steps)

    async def main() -> None:
        engine = Waits()
        async with serving(engine, rows=2, window=NEVER) as (batcher, _):
            gone, stays = [batcher.submit(request(id=id)) for id in "ab"]
            await asyncio.to_thread(engine.begun.wait, PATIENCE)
            gone.cancel()
            engine.go.set()
            assert await all_tokens(stays) == [1, 2, 3, 4, 5, 6, 7, 8]
        assert engine.batches == [["a", "b"], ["b"]]

    run_async(main)


def test_what_a_failed_batch_held_is_free_before_the_next_try(run_async: Runner) -> None:
    class Held:
        """Stands for the tensors of a batch, which live as long as the frame that made them."""

    class Hungry(ScriptedEngine):
        def __init__(self) -> None:
            super().__init__()
            self.held: list[weakref.ref[Held]] = []
            self.alive: list[int] = []

        def run(self, rows: Sequence[Row], steps: Steps) -> None:
            self.alive.append(sum(reference() is not None for reference in self.held))
            if len(rows) > 1:
                self.allocate()
            super().run(rows, steps)

        def allocate(self) -> None:
            tensors = Held()
            self.held.append(weakref.ref(tensors))
            raise OutOfMemory("scripted")

    async def main() -> None:
        engine = Hungry()
        async with serving(engine, rows=4, window=NEVER) as (batcher, _):
            streams = [batcher.submit(request(id=id)) for id in "abcd"]
            await asyncio.gather(*map(all_tokens, streams))
        assert len(engine.held) == 3
        assert engine.alive == [0] * 7

    gc.disable()  # the collector must not be what frees them
    try:
        run_async(main)
    finally:
        gc.enable()


# Events


def test_the_life_of_a_request_is_told_in_order(run_async: Runner) -> None:
    async def main() -> None:
        async with serving(ScriptedEngine()) as (batcher, log):
            await all_tokens(batcher.submit(request((5, 6, 7), id="only", max_tokens=2)))
            await log.count(BatchEnded, 1)
        kinds = [type(event) for event in log.but(MemoryHeld)]
        queued, served = [StateChanged, QueueChanged], [QueueChanged, BatchStarted, RowStarted]
        steps = [Stepped, RowEnded, Stepped, BatchEnded]
        assert kinds == [*queued, *served, *steps, StateChanged, StateChanged]
        assert log.of(QueueChanged) == [QueueChanged(1, 3), QueueChanged(0, 0)]
        (started,) = log.of(RowStarted)
        (ended,) = log.of(RowEnded)
        assert (started.id, started.batch_size, started.queue_wait) == ("only", 1, ended.queue_wait)
        assert (ended.id, ended.outcome, ended.finish) == ("only", Outcome.ANSWERED, Finish.LENGTH)
        assert (ended.prompt_tokens, ended.output_tokens, ended.batch_size) == (3, 2, 1)
        assert ended.queue_wait is not None
        assert ended.ttft is not None
        assert 0 <= ended.queue_wait <= ended.ttft <= ended.duration

    run_async(main)


def test_memory_is_told_before_the_first_batch_and_while_one_runs(
    run_async: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Growing(ScriptedEngine):
        def memory(self) -> int:
            return self.steps

    async def main() -> None:
        engine = Growing(stepped=True)
        async with serving(engine) as (batcher, log):
            assert await log.count(MemoryHeld, 1) == [MemoryHeld(0)]
            answer = batcher.submit(request(max_tokens=3))
            engine.release(2)
            assert await log.count(MemoryHeld, 3) == [MemoryHeld(0), MemoryHeld(0), MemoryHeld(1)]
            assert not log.of(BatchEnded)
            engine.release()
            assert await all_tokens(answer) == [1, 2, 3]
            assert (await log.count(MemoryHeld, 5))[-1] == MemoryHeld(3)

    monkeypatch.setattr(worker, "MEMORY_SECONDS", 0.0)
    run_async(main)


def test_a_batch_is_told_with_its_counts(run_async: Runner) -> None:
    async def main() -> None:
        async with serving(ScriptedEngine(), rows=2, window=NEVER) as (batcher, log):
            streams = [batcher.submit(request(3, id="a", max_tokens=1)), batcher.submit(request(5, id="b"))]
            await asyncio.gather(*map(all_tokens, streams))
            (ended,) = await log.count(BatchEnded, 1)
            (started,) = log.of(BatchStarted)
            assert (started.rows, started.prompt_tokens, started.padded_tokens) == (2, 8, 10)
            assert len(started.queue_waits) == 2
            assert all(wait >= 0 for wait in (*started.queue_waits, started.window_wait, ended.duration))
            steps = [(event.tokens, event.running) for event in log.of(Stepped)]
            assert steps == [(2, 1)] + [(1, 1)] * 6 + [(1, 0)]

    run_async(main)


class Drafting(ScriptedEngine):
    """Gives every row two tokens a step, as speculation may."""

    def run(self, rows: Sequence[Row], steps: Steps) -> None:
        while not all(row.over for row in rows):
            steps.emit([row for row in rows for _ in range(2)], [1, 2] * len(rows))


def test_rows_that_get_several_tokens_in_a_step_are_counted_once(run_async: Runner) -> None:
    async def main() -> None:
        async with serving(Drafting(), rows=2, window=NEVER) as (batcher, log):
            streams = [batcher.submit(request(id="a", max_tokens=2)), batcher.submit(request(id="b", max_tokens=4))]
            await asyncio.gather(*map(all_tokens, streams))
            await log.count(BatchEnded, 1)
            assert log.of(Stepped) == [Stepped(4, running=1, rows=2), Stepped(2, running=0, rows=1)]

    run_async(main)


def test_a_request_that_never_ran_has_no_waits_to_tell(run_async: Runner) -> None:
    async def main() -> None:
        async with serving(ScriptedEngine(), rows=2, window=NEVER) as (batcher, log):
            batcher.submit(request()).cancel()
            (ended,) = log.of(RowEnded)
            assert (ended.queue_wait, ended.ttft, ended.batch_size) == (None, None, 0)

    run_async(main)


def test_an_observer_that_raises_hurts_nobody(run_async: Runner, caplog: pytest.LogCaptureFixture) -> None:
    def raising(event: Event) -> None:
        raise ValueError("scripted")

    async def main() -> None:
        async with serving(ScriptedEngine(), observers=[raising]) as (batcher, log):
            assert len(await all_tokens(batcher.submit(request()))) == 8
            assert log.outcomes() == {"r": Outcome.ANSWERED}
            await log.count(BatchEnded, 1)

    run_async(main)
    for kind in (StateChanged, QueueChanged, BatchStarted, Stepped, RowEnded, BatchEnded):
        assert f"an observer failed on {kind.__name__}" in caplog.text


@pytest.mark.parametrize("seed", range(8))
def test_every_accepted_request_has_exactly_one_outcome(seed: int, run_async: Runner) -> None:
    dice = random.Random(seed)
    expected: dict[str, Outcome] = {}

    def fail(step: int) -> None:
        if step == 7 and dice.random() < 0.3:
            raise ValueError("scripted")

    async def client(batcher: Batcher, id: str, after: int, ending: str, tokens: int) -> None:
        for _ in range(after):
            await asyncio.sleep(0)
        limit = 0.0 if ending == "deadline" else 600.0
        try:
            stream = batcher.submit(request(after + 1, id=id, max_tokens=tokens, time_limit=limit))
        except TooBusy:
            assert ending == "deadline"
            return
        read_to_the_end = True
        try:
            async with stream:
                async for _ in stream:
                    if ending == "leave" and not stream.over:
                        read_to_the_end = False
                        break
                    if ending == "stop":
                        stream.stop()
        except DeadlineExceeded:
            expected[id] = Outcome.DEADLINE
        except EngineError:
            expected[id] = Outcome.ERROR
        else:
            expected[id] = Outcome.ANSWERED if read_to_the_end else Outcome.CANCELLED

    async def main() -> None:
        engine = ScriptedEngine(before_step=fail)
        async with serving(engine, rows=3) as (batcher, log):
            async with asyncio.TaskGroup() as clients:
                for number in range(40):
                    ending = dice.choice(["read", "read", "leave", "stop", "deadline"])
                    clients.create_task(client(batcher, str(number), dice.randrange(30), ending, dice.randint(1, 10)))
            assert len(log.of(RowEnded)) == len(expected) == 40 - len(log.of(Rejected))
            assert log.outcomes() == expected
            await log.until(lambda: len(log.of(BatchEnded)) == len(log.of(BatchStarted)))

    run_async(main)


def test_a_batch_waits_past_its_window_for_requests_that_are_being_prepared(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with serving(engine, rows=8, window=0.0) as (batcher, _log):
            with batcher.announce(""):
                first = batcher.submit(request(id="first"))
                await spin()
                second = batcher.submit(request(id="second"))
            await all_tokens(first)
            await all_tokens(second)
        assert engine.batches == [["first", "second"]]

    run_async(main)
