"""Laws of the loops and of the search for the capacity."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import closing
from itertools import pairwise
from statistics import mean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.capacity import find, search
from benchmarks.client import ChatClient, Record
from benchmarks.loops import ClosedLoop, Loop, OpenLoop, arrivals
from benchmarks.run import Level, Run
from benchmarks.workloads import WORKLOADS
from tests.benchmarks.figures import level, run
from tests.benchmarks.scripted import ScriptedServer, serving

SEED = 0


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 16.0])
def test_arrivals_keep_rate_and_burstiness(burstiness: float) -> None:
    due = arrivals(20_000, rate=4.0, burstiness=burstiness, seed=SEED)
    gaps = [later - earlier for earlier, later in pairwise(due)]
    assert due[0] == 0.0
    assert due == sorted(due)
    assert mean(gaps) == pytest.approx(1 / 4.0, rel=0.05)
    assert stdev(gaps) / mean(gaps) == pytest.approx(burstiness**-0.5, rel=0.05)


def test_the_same_seed_gives_the_same_arrivals() -> None:
    assert arrivals(50, 2.0, 1.0, seed=1) == arrivals(50, 2.0, 1.0, seed=1) != arrivals(50, 2.0, 1.0, seed=2)


class Meeting(ScriptedServer):
    """Answers nobody until `guests` requests are here, and notes how many were here at most."""

    def __init__(self, guests: int) -> None:
        super().__init__()
        self.here = self.most = 0
        self._guests = guests
        self._complete = asyncio.Event()

    async def chat(self, request: Request) -> Response:
        self.here += 1
        self.most = max(self.most, self.here)
        if self.here == self._guests:
            self._complete.set()
        await self._complete.wait()
        return await super().chat(request)

    async def _events(self, tokens: int, failure: str) -> AsyncIterator[bytes]:
        self.here -= 1
        async for event in super()._events(tokens, failure):
            yield event


def send(loop: Loop, server: ScriptedServer, count: int) -> list[Record]:
    async def main(url: str) -> list[Record]:
        with closing(client(url)) as chat:
            return await loop.send(chat, WORKLOADS["short"].draw(count, seed=SEED), SEED, lambda: None)

    with serving(server) as url:
        return asyncio.run(main(url))


def client(url: str) -> ChatClient:
    return ChatClient(url, "tiny", timeout=60.0, fields={}, full_length=True, api_key=None)


def test_a_closed_loop_has_as_many_requests_under_way_as_it_has_clients() -> None:
    server = Meeting(guests=3)
    records = send(ClosedLoop(3), server, count=7)
    assert server.most == 3
    assert sorted(record.serial for record in records) == list(range(7))
    assert not any(record.error for record in records)


def test_an_open_loop_waits_for_no_answer() -> None:
    server = Meeting(guests=20)
    records = send(OpenLoop(rate=200.0), server, count=20)
    assert server.most == 20
    assert not any(record.error for record in records)
    assert sorted(record.due for record in records) == arrivals(20, 200.0, 1.0, SEED)
    assert all(record.sent >= record.due for record in records)


def test_latency_counts_from_when_a_request_was_due_however_late_it_was_sent() -> None:
    async def main(url: str) -> Record:
        with closing(client(url)) as chat:
            (job,) = WORKLOADS["short"].draw(1, seed=SEED)
            return await chat.ask(job, began=time.perf_counter() - 100.0, due=60.0)

    with serving(ScriptedServer()) as url:
        record = asyncio.run(main(url))
    assert record.error is None
    assert record.sent >= 100.0
    assert record.ttft is not None
    assert 40.0 <= record.ttft <= record.latency


def found_capacity(true: float, first: float, precision: float) -> tuple[float | None, list[float]]:
    probes: list[float] = []

    async def holds(rate: float) -> bool:
        probes.append(rate)
        return rate <= true

    return asyncio.run(search(holds, first, precision)), probes


@given(st.floats(0.01, 300), st.floats(0.1, 30), st.floats(0.02, 0.5))
def test_the_capacity_is_found_to_the_precision_asked_for(true: float, first: float, precision: float) -> None:
    found, probes = found_capacity(true, first, precision)
    assert found is not None
    assert found <= true
    assert found * (1 + precision) >= true or len(probes) == 16
    assert len(set(probes)) == len(probes)


def test_a_server_that_never_holds_has_no_capacity() -> None:
    found, probes = found_capacity(0.0, 1.0, 0.1)
    assert found is None
    assert len(probes) == 16


def test_a_server_that_always_holds_is_tried_faster_and_faster() -> None:
    found, probes = found_capacity(float("inf"), 1.0, 0.1)
    assert found is None
    assert probes[-1] == 2.0**15


def test_no_slower_rate_is_tried_once_requests_that_are_alone_fail() -> None:
    probes: list[float] = []

    async def holds(rate: float) -> bool | None:
        probes.append(rate)
        return None if rate <= 0.25 else False

    assert asyncio.run(search(holds, 1.0, 0.1)) is None
    assert probes == [1.0, 0.5, 0.25]


def test_the_capacity_is_the_highest_rate_that_held_though_requests_that_were_alone_failed_at_another() -> None:
    async def holds(rate: float) -> bool | None:
        return True if rate <= 3.0 else None

    assert asyncio.run(search(holds, 1.0, 0.1)) == pytest.approx(3.0, rel=0.1)


def test_requests_that_fail_at_once_are_alone_and_those_that_wait_for_others_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where nothing answers at the address, or the model or key is unknown there: for slower and slower requests."""
    levels: list[Level] = []

    async def measure(self: Run, loop: Loop, requests: int) -> Level:
        made = level(loop, error="connection")
        for record in made.records:
            record.latency = 0.001 if len(levels) == 2 else 1.0
        levels.append(made)
        return made

    monkeypatch.setattr(Run, "measure", measure)
    made = run()
    asyncio.run(find(made, first=1.0, share=0.95, precision=0.1))
    assert made.capacity is None
    assert [each.loop for each in levels] == [OpenLoop(1.0), OpenLoop(0.5), OpenLoop(0.25)]
