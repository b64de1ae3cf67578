"""Laws of `/metrics`: however many ask, little is written, and none of it on the event loop."""

import asyncio
import threading
from typing import cast

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from batching.progress import Progress
from server.observe.metrics import Metrics, Scrapes


class Written:
    """Metrics that are written once they may be, as how often they were."""

    def __init__(self) -> None:
        self.times = 0
        self.begun, self.may = asyncio.Event(), asyncio.Event()

    async def exposition(self) -> bytes:
        self.times += 1
        found = b"%d" % self.times
        self.begun.set()
        await self.may.wait()
        return found


def test_all_who_ask_while_one_is_written_share_the_next() -> None:
    async def main() -> None:
        written = Written()
        scrapes = Scrapes(cast(Metrics, written))
        first = asyncio.create_task(scrapes.take())
        await written.begun.wait()
        others = [asyncio.create_task(scrapes.take()) for _ in range(100)]
        await asyncio.sleep(0)
        others[0].cancel()  # who leaves takes nothing from the rest
        written.may.set()
        assert await first == b"1"
        assert await asyncio.gather(*others[1:]) == [b"2"] * 99
        assert written.times == 2

    asyncio.run(main())


def test_they_are_written_on_a_helper_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def noted(registry: CollectorRegistry) -> bytes:
        threads.append(threading.get_ident())
        return generate_latest(registry)

    monkeypatch.setattr("server.observe.metrics.generate_latest", noted)
    assert b"microbatch_state" in asyncio.run(Metrics(Progress()).exposition())
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()
