"""How load is put on: a closed loop keeps a number of clients busy, an open loop sends at times of its own.

Arrivals that wait for answers hide how long the server made others wait (coordinated omission). An open loop's do not,
and its times count from when a request was due, so a client that is late itself is not mistaken for a quick server.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from random import Random

from benchmarks.client import ChatClient, Record
from benchmarks.workloads import Job

Progress = Callable[[], None]


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """`concurrency` clients, each sending its next request when its last answer ended."""

    concurrency: int

    @property
    def label(self) -> str:
        return "1 client" if self.concurrency == 1 else f"{self.concurrency} clients"

    async def send(self, client: ChatClient, jobs: list[Job], seed: int, progress: Progress) -> list[Record]:
        """Send all jobs; their records in the order in which they ended. `progress` is called at each end."""
        waiting, records, began = iter(jobs), list[Record](), time.perf_counter()

        async def one_client() -> None:
            for job in waiting:
                records.append(await client.ask(job, began, time.perf_counter() - began))
                progress()

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self.concurrency, len(jobs))):
                group.create_task(one_client())
        return records


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """`rate` requests a second on average, however the answers come. Of `burstiness` see `arrivals`."""

    rate: float
    burstiness: float = 1.0

    @property
    def label(self) -> str:
        kind = "" if self.burstiness == 1 else f", burstiness {self.burstiness:g}"
        return f"{self.rate:g}/s{kind}"

    async def send(self, client: ChatClient, jobs: list[Job], seed: int, progress: Progress) -> list[Record]:
        """As a closed loop's; the seed decides the arrivals."""
        records, began = list[Record](), time.perf_counter()

        async def one_request(job: Job, due: float) -> None:
            records.append(await client.ask(job, began, due))
            progress()

        async with asyncio.TaskGroup() as group:
            for job, due in zip(jobs, arrivals(len(jobs), self.rate, self.burstiness, seed), strict=True):
                # A loop, because uvloop's timers are whole milliseconds and may end early.
                while (early := began + due - time.perf_counter()) > 0:  # noqa: ASYNC110
                    await asyncio.sleep(early)
                group.create_task(one_request(job, due))
        return records


Loop = ClosedLoop | OpenLoop
"""One level of load. Its `label` is what a table calls it."""


def arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """When requests are due, in seconds: the first at 0, then gaps of a gamma law with mean 1 / rate.

    `burstiness` is the law's shape, as in vLLM's `bench serve`: 1 is Poisson's exponential gaps, below 1 requests come
    in bursts (the gaps' deviation is their mean over the shape's root), towards infinity they come evenly.
    """
    random = Random(f"{seed}/arrivals")
    gaps = (random.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(count - 1))
    return list(accumulate(gaps, initial=0.0))
