import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.admission import ServiceRate
from batching.events import Outcome, RowEnded


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def ended(outcome: Outcome = Outcome.ANSWERED) -> RowEnded:
    return RowEnded("r", outcome, "stop", 1, 1, 0.0, 0.0, 0.0, 1)


def answer_every(seconds: float, times: int, rate: ServiceRate, clock: Clock) -> None:
    for _ in range(times):
        clock.now += seconds
        rate.ended(ended())


def test_without_two_answers_there_is_no_rate_and_the_wait_is_one_second(clock: Clock) -> None:
    rate = ServiceRate()
    assert rate.seconds_for(1000) == 1.0
    rate.resume()
    answer_every(30.0, 1, rate, clock)
    assert rate.seconds_for(1000) == 1.0


def test_the_wait_is_requests_times_the_mean_pace(clock: Clock) -> None:
    rate = ServiceRate()
    rate.resume()
    answer_every(2.0, 10, rate, clock)
    assert rate.seconds_for(5) == pytest.approx(10.0)


def test_answers_that_end_together_are_counted_over_the_time_between_them(clock: Clock) -> None:
    rate = ServiceRate()
    rate.resume()
    for _ in range(20):
        clock.now += 4.0
        for _ in range(8):
            rate.ended(ended())
    assert rate.expected(8) == pytest.approx(4.0)


@given(rows=st.integers(1, 256), batches=st.integers(2, 8))
def test_a_pace_is_known_however_many_answers_end_together(rows: int, batches: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(time, "monotonic", clock)
        rate = ServiceRate()
        rate.resume()
        for _ in range(batches):
            clock.now += 4.0
            for _ in range(rows):
                rate.ended(ended())
        assert rate.expected(rows) == pytest.approx(4.0)


def test_only_answers_count(clock: Clock) -> None:
    rate = ServiceRate()
    rate.resume()
    for outcome in set(Outcome) - {Outcome.ANSWERED}:
        clock.now += 1.0
        rate.ended(ended(outcome))
    assert rate.seconds_for(30) == 1.0


def test_time_in_which_nobody_asks_does_not_count(clock: Clock) -> None:
    rate = ServiceRate()
    rate.resume()
    answer_every(2.0, 3, rate, clock)
    rate.pause()
    clock.now += 10_000.0
    rate.resume()
    answer_every(2.0, 3, rate, clock)
    assert rate.seconds_for(5) == pytest.approx(10.0)


def test_a_second_resume_or_pause_changes_nothing(clock: Clock) -> None:
    rate = ServiceRate()
    rate.pause()
    rate.resume()
    answer_every(2.0, 3, rate, clock)
    rate.resume()
    answer_every(2.0, 3, rate, clock)
    rate.pause()
    clock.now += 50.0
    rate.pause()
    assert rate.seconds_for(5) == pytest.approx(10.0)


def test_a_stall_makes_the_expected_wait_longer(clock: Clock) -> None:
    rate = ServiceRate()
    rate.resume()
    answer_every(1.0, 5, rate, clock)
    before = rate.seconds_for(4)
    clock.now += 8.0
    assert rate.seconds_for(4) > before


def test_an_old_pace_is_forgotten(clock: Clock) -> None:
    rate = ServiceRate()
    rate.resume()
    answer_every(50.0, 100, rate, clock)
    answer_every(2.0, 64, rate, clock)
    assert rate.seconds_for(5) == pytest.approx(10.0)


@given(st.lists(st.floats(0.0, 1e6), max_size=100), st.integers(0, 10**6))
def test_the_wait_is_always_from_one_second_to_sixty(pauses: list[float], requests: int) -> None:
    times = itertools.accumulate(pauses, initial=0.0)
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(time, "monotonic", clock)
        rate = ServiceRate()
        rate.resume()
        for at in times:
            clock.now = at
            rate.ended(ended())
        assert 1.0 <= rate.seconds_for(requests) <= 60.0
