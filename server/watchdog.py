"""Finds a worker that has work and makes no progress: a hung kernel, which no error ever tells."""

import asyncio

from batching.progress import Progress

LOOKS = 10
"""How often progress is looked for within the limit."""


async def stuck(progress: Progress, limit: float) -> None:
    """Return once the worker has work and has made no progress for `limit` seconds, at most a tenth more.

    Looks are counted, not seconds, so that a process that was stopped as a whole (a debugger, a suspended machine) is
    not taken for a stuck worker when it goes on.
    """
    looks, seen = 0, progress.at
    while looks < LOOKS:
        await asyncio.sleep(limit / LOOKS)
        looks = looks + 1 if progress.at is not None and progress.at == seen else 0
        seen = progress.at
