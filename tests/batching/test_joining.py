"""The batcher with an engine whose running batch rows can join. Steps are released one by one; nothing sleeps."""

import asyncio
from dataclasses import replace

from batching.events import BatchEnded, BatchStarted, Outcome, RowEnded, RowsJoined, RowStarted, State, Stepped
from batching.queue import FIRST_OUTPUT, MAX_PASSED_OVER, BatchLimits, select
from tests.batching.conftest import Runner, all_tokens, loose_row, request
from tests.batching.test_batcher import NEVER, serving
from tests.fakes import INFO, ScriptedEngine

JOINS = replace(INFO, joins=True)


def test_a_row_joins_the_running_batch_and_need_not_wait_for_its_longest_answer(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True, info=JOINS)
        async with serving(engine) as (batcher, log):
            long = batcher.submit(request(id="long", max_tokens=50))
            engine.release()
            await log.count(Stepped, 1)
            short = batcher.submit(request(id="short", max_tokens=2))
            [joined] = await log.count(RowsJoined, 1)
            assert (joined.rows, joined.running) == (1, 2)
            engine.release(4)
            assert await all_tokens(short) == [1, 2]
            assert not long.over
            engine.release(50)
            assert len(await all_tokens(long)) == 50
            [ended] = await log.count(BatchEnded, 1)
            assert ended.running == 0
        assert engine.batches == [["long", "short"]]
        assert len(log.of(BatchStarted)) == 1

    run_async(main)


def test_rows_join_as_far_as_lanes_and_tokens_last(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True, info=replace(JOINS, token_budget=100))
        async with serving(engine, rows=3) as (batcher, log):
            streams = [batcher.submit(request(3, id=str(n), max_tokens=27)) for n in range(4)]  # 30 tokens each
            engine.release()
            await log.count(Stepped, 1)
            taken = [event.rows for event in log.of(BatchStarted)] + [event.rows for event in log.of(RowsJoined)]
            assert sum(taken) == 3
            streams[1].cancel()
            engine.release(60)
            answers = [await all_tokens(stream) for stream in streams if stream is not streams[1]]
            assert [len(answer) for answer in answers] == [27, 27, 27]
            assert log.outcomes() == {
                "0": Outcome.ANSWERED,
                "1": Outcome.CANCELLED,
                "2": Outcome.ANSWERED,
                "3": Outcome.ANSWERED,
            }

    run_async(main)


def test_as_many_rows_run_as_the_engine_names_unless_told_otherwise(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True, info=replace(JOINS, max_rows=2))
        async with serving(engine, rows=None) as (batcher, log):
            streams = [batcher.submit(request(id=str(n), max_tokens=3)) for n in range(3)]
            engine.release(20)
            for stream in streams:
                await all_tokens(stream)
            assert max(event.running for event in log.of(Stepped)) == 2

    run_async(main)


def test_a_row_is_counted_with_what_it_has_come_to_and_not_with_what_it_may_come_to(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True, info=replace(JOINS, token_budget=3 * (10 + FIRST_OUTPUT)))
        async with serving(engine, rows=8) as (batcher, log):
            asked = [request(10, id=str(n), max_tokens=FIRST_OUTPUT * 2) for n in range(3)]  # of them one would fit
            streams = [batcher.submit(each) for each in asked]
            engine.release()
            await log.count(RowStarted, 3)
            for _ in streams:
                engine.release(FIRST_OUTPUT * 2)
            assert [len(await all_tokens(stream)) for stream in streams] == [FIRST_OUTPUT * 2] * 3

    run_async(main)


def test_a_row_joins_once_it_is_known_how_much_the_running_ones_share(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True, info=replace(JOINS, token_budget=350))
        async with serving(engine, rows=8) as (batcher, log):
            streams = [batcher.submit(request(100, id=str(n), max_tokens=50)) for n in range(3)]
            await log.count(RowStarted, 2)
            assert len(log.of(RowStarted)) == 2
            streams[1].row.num_shared_tokens = 100  # as the engine sets it when the row starts
            engine.release()
            [joined] = await log.count(RowsJoined, 1)
            assert joined.running == 3
            engine.release(120)
            assert [len(await all_tokens(stream)) for stream in streams] == [50, 50, 50]

    run_async(main)


def test_a_failed_batch_fails_the_rows_that_joined_it_and_no_others(run_async: Runner) -> None:
    async def main() -> None:
        def fail(step: int) -> None:
            if step == 3:
                raise RuntimeError("scripted")

        engine = ScriptedEngine(stepped=True, info=JOINS, before_step=fail)
        async with serving(engine) as (batcher, log):
            first = batcher.submit(request(id="first", max_tokens=50))
            engine.release()
            await log.count(Stepped, 1)
            batcher.submit(request(id="second", max_tokens=50))
            await log.count(RowsJoined, 1)
            engine.release(3)
            await log.count(RowEnded, 2)
            assert log.outcomes() == {"first": Outcome.ERROR, "second": Outcome.ERROR}
            assert first.over
            engine.release(3)
            assert await all_tokens(batcher.submit(request(max_tokens=3))) == [1, 2, 3]

    run_async(main)


def test_a_drain_lets_rows_that_joined_finish(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True, info=JOINS)
        async with serving(engine) as (batcher, log):
            first = batcher.submit(request(id="first", max_tokens=5))
            engine.release()
            await log.count(Stepped, 1)
            second = batcher.submit(request(id="second", max_tokens=9))
            await log.count(RowsJoined, 1)
            draining = asyncio.create_task(batcher.drain(60))
            engine.release(20)
            await draining
            assert len(await all_tokens(first)) == 5
            assert len(await all_tokens(second)) == 9

    run_async(main)


def test_of_two_drains_the_one_that_ends_first_counts(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True, info=JOINS)
        async with serving(engine) as (batcher, log):
            batcher.submit(request(id="long", max_tokens=50))
            engine.release()
            await log.count(Stepped, 1)
            patient = asyncio.create_task(batcher.drain(NEVER))
            await log.until(lambda: batcher.state is State.DRAINING)
            await batcher.drain(0)
            await patient
            assert log.outcomes() == {"long": Outcome.DRAINED}
            engine.release()

    run_async(main)


def test_a_row_that_finds_no_room_is_passed_over_a_few_times_and_then_nothing_goes_before_it() -> None:
    large = loose_row(request(90, id="large", max_tokens=10))
    limits = BatchLimits(8, 50, padded=False)
    for _ in range(MAX_PASSED_OVER):
        small = loose_row(request(10, max_tokens=10))
        assert select([large, small], limits) == [small]
    assert select([large, loose_row(request(10, max_tokens=10))], limits) == []
    assert select([large, loose_row(request(10, max_tokens=10))], BatchLimits(8, 100, padded=False)) == [large]


def test_rows_are_taken_in_line_where_nothing_is_padded() -> None:
    rows = [loose_row(request(length, id=str(length), max_tokens=1)) for length in (5, 300, 6, 299)]
    assert select(rows, BatchLimits(2, 10_000, padded=False)) == rows[:2]
    assert select(rows, BatchLimits(2, 10_000)) == [rows[0], rows[2]]
