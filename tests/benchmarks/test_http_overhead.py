"""Laws of the HTTP layer's benchmark: its arithmetic, and one small run of it."""

import asyncio
from dataclasses import replace

import pytest
import uvloop

from benchmarks import http_overhead
from benchmarks.http_overhead import (
    Answer,
    Measured,
    broken_limits,
    measure,
    server,
    times_bare,
    tokens_for,
)
from benchmarks.scripted_server import Mode

BARE = Measured(
    mode="bare",
    streams=64,
    tokens=6400,
    events=6400,
    seconds=2.0,
    cpu=0.064,
    loop_cpu=0.032,
    lags=(0.0,),
    empty_memory=100_000_000,
    idle_memory=103_200_000,
)


def test_costs_are_of_a_token_a_step_and_a_stream() -> None:
    assert BARE.tokens_per_second == 3200
    assert BARE.cpu_per_token == pytest.approx(10e-6)
    assert BARE.loop_cpu_per_step == pytest.approx(0.32e-3)  # 100 steps of 64 tokens
    assert BARE.memory_per_stream == 50_000


def test_a_token_is_compared_with_the_bare_one_that_is_written_the_same_way_at_as_many_streams() -> None:
    others = [
        BARE,
        replace(BARE, mode="bare at once", cpu=0.032),
        replace(BARE, streams=1, cpu=0.001),
    ]
    assert times_bare(replace(BARE, mode="in step", cpu=0.16), others) == pytest.approx(2.5)
    assert times_bare(replace(BARE, mode="at once", cpu=0.16), others) == pytest.approx(5.0)
    assert times_bare(BARE, others) == 1.0


def test_a_limit_that_is_not_kept_is_told() -> None:
    bares = [replace(BARE, idle_memory=10**9), replace(BARE, mode="bare at once"), replace(BARE, streams=1)]
    ours = replace(BARE, mode="in step", cpu=BARE.cpu * 2.9)
    assert broken_limits([*bares, ours]) == []
    assert "cost" in broken_limits([*bares, replace(ours, cpu=BARE.cpu * 3.1)])[0]
    assert "310 MB" in broken_limits([*bares, replace(ours, idle_memory=310_000_000)])[0]
    assert len(broken_limits([*bares, replace(ours, mode="at once", cpu=BARE.cpu * 3.1)])) == 1
    assert broken_limits([*bares, replace(ours, streams=1, cpu=BARE.cpu * 9)]) == []  # its way between threads


def test_few_streams_get_long_answers_and_many_short_ones() -> None:
    assert [tokens_for(streams) for streams in (1, 64, 2000, 5000)] == [20_000, 3125, 100, 100]


def test_events_are_counted_wherever_they_are_cut_and_the_first_is_told() -> None:
    async def main() -> None:
        answer = Answer()
        answer.receive(200, b"data: 1\n")
        assert not answer.begun.done()
        answer.receive(200, b"\ndata: 2\n\n")
        assert answer.begun.done()
        answer.receive(200, b"data: 3")
        answer.receive(200, b"\n\n")
        assert answer.events == 3

    asyncio.run(main())


def test_an_answer_that_is_not_whole_is_an_error() -> None:
    async def main() -> None:
        answer = Answer()
        answer.receive(200, b'data: {"usage":{"completion_tokens":19}}\n\ndata: [DONE]\n\n')
        http_overhead.check(answer, "in step", 19)
        with pytest.raises(ValueError, match="20 tokens"):
            http_overhead.check(answer, "in step", 20)
        http_overhead.check(answer, "bare", 2)
        with pytest.raises(ValueError, match="bare"):
            http_overhead.check(answer, "bare", 3)

    asyncio.run(main())


@pytest.mark.parametrize(("mode", "last_events"), [("bare", 0), ("in step", 2)])
def test_a_small_run(mode: Mode, last_events: int) -> None:
    with server(mode, streams=3, tokens=20) as url:
        measured = uvloop.run(measure(url, mode, 3, 20))
    assert measured.tokens == 3 * 19
    # Each token after the first in an event of its own; then of the service the usage and the end of each stream.
    assert measured.events == 3 * (19 + last_events)
    assert 0 < measured.loop_cpu <= measured.cpu + 0.001  # two clocks, read one after the other
    assert measured.idle_memory > 10_000_000
