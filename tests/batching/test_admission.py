"""Who is let in: those that can be answered in time, as far as the pace of answers tells."""

import asyncio
import time
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.admission import FEWEST, MARGIN, ServiceRate, seconds_late
from batching.errors import TooBusy
from batching.events import Outcome, Rejected, RowEnded
from tests.batching.conftest import Runner, all_tokens, request
from tests.batching.test_batcher import serving, start
from tests.fakes import INFO, ScriptedEngine


@pytest.fixture
def rate(monkeypatch: pytest.MonkeyPatch) -> ServiceRate:
    """Two answers a second."""
    found, now = ServiceRate(), 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    found.resume()
    for _ in range(FEWEST):
        now += 0.5
        found.ended(RowEnded("r", Outcome.ANSWERED, "stop", 1, 1, 0.0, 0.0, 0.0, 1))
    return found


def test_a_request_is_late_by_what_the_pace_says(rate: ServiceRate) -> None:
    limit = [request(time_limit=10.0 / MARGIN)]
    assert (
        seconds_late(limit, ahead=15, running=4, at_once=1, rate=rate, joins=False) == 0.0
    )  # the 20th after 10 seconds
    assert seconds_late(limit, ahead=16, running=4, at_once=1, rate=rate, joins=False) == pytest.approx(0.5)
    assert seconds_late(limit * 3, ahead=16, running=4, at_once=1, rate=rate, joins=False) == pytest.approx(1.5)


def test_where_rows_join_nobody_is_refused_whom_the_pace_would_answer_in_time(rate: ServiceRate) -> None:
    limit = [request(time_limit=10.0)]
    assert (
        seconds_late(limit, ahead=15, running=4, at_once=1, rate=rate, joins=True) == 0.0
    )  # the 20th after 10 seconds
    assert seconds_late(limit, ahead=16, running=4, at_once=1, rate=rate, joins=True) == pytest.approx(0.5)


def test_the_shortest_limit_of_several_counts(rate: ServiceRate) -> None:
    several = [request(time_limit=limit / MARGIN) for limit in (100.0, 1.0, 10.0)]
    assert seconds_late(several, ahead=1, running=0, at_once=1, rate=rate, joins=False) == pytest.approx(1.0)


def test_where_nobody_waits_everyone_is_let_in(rate: ServiceRate) -> None:
    assert seconds_late([request(time_limit=0.001)], ahead=0, running=1000, at_once=1, rate=rate, joins=False) == 0.0


def test_before_there_is_a_pace_everyone_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = ServiceRate()
    rate.resume()
    for _ in range(FEWEST - 1):
        assert (
            seconds_late([request(time_limit=0.0)], ahead=1000, running=1000, at_once=1, rate=rate, joins=False) == 0.0
        )
        rate.ended(RowEnded("r", Outcome.ANSWERED, "stop", 1, 1, 0.0, 0.0, 0.0, 1))


def test_what_cannot_be_in_time_is_refused_at_once_and_by_its_own_place_in_line(run_async: Runner) -> None:
    async def main() -> None:
        engine = ScriptedEngine(stepped=True)
        async with serving(engine, rows=1) as (batcher, log):
            engine.release(FEWEST)
            for n in range(FEWEST):
                await all_tokens(batcher.submit(request(id=str(n), max_tokens=1)))
            await start(batcher, log)
            waiting = batcher.submit(request(id="waiting", client="a"))
            soon = batcher._rate.expected(3) / 2
            with pytest.raises(TooBusy) as refusal:
                batcher.submit(request(id="late", client="a", time_limit=soon))
            assert 1.0 <= refusal.value.retry_after <= 60.0
            assert log.of(Rejected) == [Rejected("too_busy")]
            # Another client's shorter request would be served before the one that waits.
            other = batcher.submit(request(id="other", client="b", time_limit=600.0, max_tokens=1))
            assert batcher._queue.ahead_of(request(client="c", max_tokens=1)) == 1
            assert batcher._queue.ahead_of(request(client="c", max_tokens=1, weight=100.0)) == 0
            assert batcher.submit(request(id="heavy", client="c", time_limit=soon, max_tokens=1, weight=100.0))
            for stream in (waiting, other):
                stream.cancel()
            await asyncio.sleep(0)
            assert batcher.submit(request(id="let in", client="a", time_limit=600.0))

    run_async(main)


@dataclass
class Padded:
    """A server that runs one batch after another, in a time that grows with its rows at most in proportion."""

    alone: float
    each: float
    capacity: int

    def seconds(self, rows: int) -> float:
        return self.alone + self.each * rows

    def answered(self, waiting: int, running: int) -> float:
        """Seconds until one behind so many rows is answered, if a batch has just begun and the next ones are full."""
        return self.seconds(running) + (waiting // self.capacity + 1) * self.seconds(self.capacity)

    def refusals(self, clients: int, burst: int, limit: float, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """How many waited ahead of each that was refused, in a burst that comes while `clients` keep it busy."""
        now, rate = 1000.0, ServiceRate()
        monkeypatch.setattr(time, "monotonic", lambda: now)
        rate.resume()
        for _ in range(1 + FEWEST // clients + 1):
            now += self.seconds(clients)
            for _ in range(clients):
                rate.ended(RowEnded("r", Outcome.ANSWERED, "stop", 1, 1, 0.0, 0.0, 0.0, clients))
        asked = [request(time_limit=limit)]
        return [
            ahead
            for ahead in range(burst)
            if seconds_late(asked, ahead, clients, min(ahead + 1, self.capacity), rate, joins=False)
        ]


servers = st.builds(Padded, alone=st.floats(0.1, 10), each=st.floats(0, 1), capacity=st.integers(1, 200))
shares = st.floats(0, 1)
limits = st.floats(0.1, 300)


@given(servers, shares, st.integers(1, 200), limits)
def test_who_is_refused_would_have_been_late_however_few_were_served_before(
    server: Padded, busy: float, burst: int, limit: float
) -> None:
    clients = max(1, round(busy * server.capacity))
    with pytest.MonkeyPatch.context() as patch:
        refused = server.refusals(clients, burst, limit, patch)
    assert all(server.answered(ahead, clients) > 0.999 * MARGIN * limit for ahead in refused)


@given(servers, st.integers(1, 200), limits)
def test_who_would_be_late_by_more_than_a_batch_is_refused_by_a_full_server(
    server: Padded, burst: int, limit: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        refused = server.refusals(server.capacity, burst, limit, patch)
    batch = server.seconds(server.capacity)
    assert {ahead for ahead in range(1, burst) if server.answered(ahead, server.capacity) - batch > limit} <= set(
        refused
    )


@given(st.integers(1, 100), st.integers(1, 100))
def test_more_at_once_are_never_expected_to_take_longer(requests: int, at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        now, rate = 1000.0, ServiceRate()
        patch.setattr(time, "monotonic", lambda: now)
        rate.resume()
        for rows in (1, 4, 2, 8) * 8:
            now += 0.5
            rate.ended(RowEnded("r", Outcome.ANSWERED, "stop", 1, 1, 0.0, 0.0, 0.0, rows))
        assert rate.expected(requests, at_once + 1) <= rate.expected(requests, at_once) <= rate.expected(requests)
        assert rate.expected(requests) == pytest.approx(0.5 * requests)


class Pace(ServiceRate):
    """A second an answer to each that is served alone."""

    @property
    def answers(self) -> int:
        return FEWEST

    def expected(self, requests: int, at_once: int = 1) -> float:
        return requests / at_once


@pytest.mark.parametrize("joins", [False, True])
def test_what_might_be_served_together_is_not_expected_one_after_the_other(run_async: Runner, joins: bool) -> None:
    async def main() -> None:
        async with serving(ScriptedEngine(info=replace(INFO, joins=joins), stepped=True), rows=4) as (batcher, log):
            await start(batcher, log)
            batcher._rate = Pace()
            limit = 1.5 / MARGIN
            for n in range(3):  # the last is the fourth of four, of which three are served at once
                batcher.submit(request(id=str(n), time_limit=limit))
            with pytest.raises(TooBusy):
                batcher.submit(request(id="late", time_limit=0.5))

    run_async(main)
