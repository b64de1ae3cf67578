"""Closed-loop load: a fixed number of clients, each sending its next request when its last answer ended."""

import asyncio
import time
from collections.abc import Callable

from benchmarks.client import ChatClient, Record
from benchmarks.summary import Level
from benchmarks.workloads import Job


async def measure(
    client: ChatClient, jobs: list[Job], warm_up: list[Job], concurrency: int, progress: Callable[[], None]
) -> Level:
    """Send the warm-up and wait for it, then all jobs, `concurrency` at a time.

    `progress` is called whenever an answer ends.
    The clock stops at the last answer's end, so the tail, when fewer than `concurrency` are left, counts.
    """
    warmed = await closed_loop(client, warm_up, concurrency, progress)
    began, cpu = time.perf_counter(), time.process_time()
    records = await closed_loop(client, jobs, concurrency, progress)
    seconds = time.perf_counter() - began
    return Level(concurrency, seconds, (time.process_time() - cpu) / seconds, records, warmed)


async def closed_loop(
    client: ChatClient, jobs: list[Job], concurrency: int, progress: Callable[[], None]
) -> list[Record]:
    """The jobs' records, in the order in which they ended."""
    waiting, records, began = iter(jobs), list[Record](), time.perf_counter()

    async def one_client() -> None:
        for job in waiting:
            records.append(await client.ask(job, began))
            progress()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(jobs))):
            group.create_task(one_client())
    return records
