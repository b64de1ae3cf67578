"""Laws of the meter: every half second has its tick, and what happened is in exactly one of them."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.events import (
    BatchEnded,
    BatchStarted,
    Event,
    MemoryHeld,
    Outcome,
    QueueChanged,
    Rejected,
    RowEnded,
    RowsJoined,
    Stepped,
)
from server.observe.live import PERIOD, RECENT_FOR, Meter, Tick, percentile

MOST = 600


def started(rows: int, prompt_tokens: int = 10, padded_tokens: int = 16) -> BatchStarted:
    return BatchStarted(rows, prompt_tokens, padded_tokens, 0.0, (0.0,) * rows)


def ended(ttft: float | None) -> RowEnded:
    return RowEnded("r", Outcome.ANSWERED, "stop", 1, 1, 0.0, ttft, 1.0, 1)


def run(*events: tuple[float, Event], until: float, most: int = MOST) -> list[Tick]:
    """The ticks of a meter that was made at 0 and told of these events at these times."""
    meter = Meter(0.0)
    ticks: list[Tick] = []
    for now, event in events:
        ticks += meter.advance(now, most)
        meter.note(event, now)
    return [*ticks, *meter.advance(until, most)]


def column(ticks: list[Tick], name: str) -> list[Any]:
    return [getattr(tick, name) for tick in ticks]


def test_a_tick_has_the_most_rows_there_were_and_goes_on_with_the_last() -> None:
    queue = [(0.1, QueueChanged(5, 50)), (0.2, QueueChanged(0, 0))]
    ticks = run(*queue, (0.2, started(5)), (0.7, Stepped(5, 2, 5)), (1.2, BatchEnded(0, 1.0)), until=2.1)
    assert column(ticks, "at") == [0.5, 1.0, 1.5, 2.0]
    assert column(ticks, "queued") == [5, 0, 0, 0]
    assert column(ticks, "running") == [5, 5, 2, 0]


def test_a_tick_has_the_memory_that_was_told_last() -> None:
    ticks = run((0.7, MemoryHeld(5)), (1.1, MemoryHeld(9)), (1.2, MemoryHeld(7)), until=2.1)
    assert column(ticks, "memory") == [None, 5, 7, 7]


def test_a_tick_counts_tokens_and_batches_of_its_own_half_second() -> None:
    steps = [(0.1, Stepped(3, 3, 3)), (0.4, Stepped(2, 2, 2)), (0.6, Stepped(1, 1, 1))]
    ticks = run((0.05, started(3, 10, 16)), *steps, (0.6, started(1, 4, 4)), until=1.0)
    assert column(ticks, "tokens") == [5, 1]
    assert column(ticks, "batches") == [1, 1]
    assert column(ticks, "batch_rows") == [3, 1]
    assert [(tick.prompt_tokens, tick.padded_tokens) for tick in ticks] == [(10, 16), (4, 4)]


def test_rows_that_join_a_batch_run_with_it_and_need_no_padding() -> None:
    joined, over = RowsJoined(2, 5, 10, (0.0, 0.0)), BatchEnded(2, 1.0)
    ticks = run((0.1, started(3, 10, 16)), (0.2, joined), (0.3, Stepped(5, 5, 5)), (0.6, over), until=1.5)
    assert column(ticks, "running") == [5, 5, 2]
    assert [(tick.batches, tick.batch_rows) for tick in ticks] == [(1, 3), (0, 0), (0, 0)]
    assert (ticks[0].prompt_tokens, ticks[0].padded_tokens) == (20, 26)


def test_times_to_first_token_are_of_answers_that_ended_lately() -> None:
    events = [(0.1, ended(1.0)), (0.1, ended(2.0)), (0.2, ended(None)), (0.8, ended(9.0))]
    ticks = run(*events, until=RECENT_FOR + 2)
    assert [(tick.ttft_p50, tick.ttft_p95) for tick in ticks[:2]] == [(1.0, 2.0), (2.0, 9.0)]
    [last] = [tick for tick in ticks if tick.at == RECENT_FOR + 0.5]
    assert (last.ttft_p50, last.ttft_p95) == (9.0, 9.0)
    assert ticks[-1].ttft_p50 is None


def test_after_a_long_silence_only_the_last_ticks_are_made() -> None:
    ticks = run((0.1, Stepped(1, 1, 1)), until=10_000.0, most=4)
    assert column(ticks, "at") == [9998.5, 9999.0, 9999.5, 10_000.0]
    assert column(ticks, "tokens") == [0, 0, 0, 0]


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 9)), max_size=30), st.floats(0, 60))
def test_no_token_is_lost_or_counted_twice(steps: list[tuple[float, int]], silence: float) -> None:
    now, events = 0.0, []
    for wait, tokens in steps:
        now += wait
        events.append((now, Stepped(tokens, 1, 1)))
    ticks = run(*events, until=now + silence + PERIOD)
    assert sum(column(ticks, "tokens")) == sum(tokens for _, tokens in steps)
    assert column(ticks, "at") == pytest.approx([PERIOD * (n + 1) for n in range(len(ticks))])


def test_other_events_change_nothing() -> None:
    assert run((0.1, Rejected("queue_full")), until=0.5) == run(until=0.5)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_a_percentile_is_a_value_that_so_many_do_not_exceed(values: list[float], share: float) -> None:
    ordered = sorted(values)
    found = percentile(ordered, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9
    assert sum(value < found for value in values) <= share * len(values)


def test_nothing_has_no_percentile() -> None:
    assert percentile([], 0.5) is None


def drafted(output: int, drafted: int, accepted: int) -> RowEnded:
    plain = RowEnded("r", Outcome.ANSWERED, "stop", 1, output, 0.0, 1.0, 1.0, 1)
    return replace(plain, num_drafted_tokens=drafted, num_accepted_tokens=accepted)


def test_tokens_per_step_are_those_of_recent_answers_if_any_was_drafted() -> None:
    ticks = run((0.1, drafted(10, 0, 0)), (0.6, drafted(30, 30, 20)), until=40.0)
    assert [tick.tokens_per_step for tick in ticks[:2]] == [None, 2.0]
    assert ticks[-1].tokens_per_step is None
