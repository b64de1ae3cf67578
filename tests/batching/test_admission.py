"""Who is let in: those that can be answered in time, as far as the pace of answers tells."""

import asyncio
import time

import pytest

from batching.admission import FEWEST, MARGIN, ServiceRate, seconds_late
from batching.errors import TooBusy
from batching.events import Outcome, Rejected, RowEnded
from tests.batching.conftest import Runner, all_tokens, request
from tests.batching.test_batcher import serving, start
from tests.fakes import ScriptedEngine


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
    assert seconds_late(limit, ahead=15, running=4, rate=rate) == 0.0  # the 20th after 10 seconds
    assert seconds_late(limit, ahead=16, running=4, rate=rate) == pytest.approx(0.5)
    assert seconds_late(limit * 3, ahead=16, running=4, rate=rate) == pytest.approx(1.5)


def test_the_shortest_limit_of_several_counts(rate: ServiceRate) -> None:
    several = [request(time_limit=limit / MARGIN) for limit in (100.0, 1.0, 10.0)]
    assert seconds_late(several, ahead=1, running=0, rate=rate) == pytest.approx(1.0)


def test_where_nobody_waits_everyone_is_let_in(rate: ServiceRate) -> None:
    assert seconds_late([request(time_limit=0.001)], ahead=0, running=1000, rate=rate) == 0.0


def test_before_there_is_a_pace_everyone_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = ServiceRate()
    rate.resume()
    for _ in range(FEWEST - 1):
        assert seconds_late([request(time_limit=0.0)], ahead=1000, running=1000, rate=rate) == 0.0
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
