"""Helper threads for what takes longer than the event loop may stand still: decoding bodies, templates, tokenizing."""

import os
from collections.abc import Callable
from typing import TypeVar

import anyio
from anyio import to_thread

from server.caller import Caller
from server.errors import ApiError
from server.fair_slots import FairSlots, Full

LONG_BYTES = 262_144
"""A request of this size takes about a tenth of a second to tokenize. Longer ones have a lane of their own."""

WAITING = 1024
"""Requests of one key that may wait for a thread."""

T = TypeVar("T")


class Encoders:
    """Two lanes, so that short requests never wait for long ones. In each, API keys take turns.

    The work is done in Rust for the most part: few threads at a time leave the event loop and the worker their cores.
    """

    def __init__(self) -> None:
        short = max(2, (os.cpu_count() or 1) // 4)
        self._short = FairSlots(short, WAITING)
        self._long = FairSlots(1, WAITING)
        self._threads = anyio.CapacityLimiter(short + 1)

    async def run(self, work: Callable[[], T], size: int, caller: Caller) -> T:
        """What `work` returns, done for a request of `size` bytes. Raises what it raises, and `ApiError` 429."""
        lane = self._long if size > LONG_BYTES else self._short
        try:
            # Without keys nobody knows whose request it is: then each is served as it came.
            async with lane.of(caller.name or caller.request_id):
                return await to_thread.run_sync(work, limiter=self._threads)
        except Full:
            message = "Too many requests of this key are being read; try again in a few seconds."
            raise ApiError(429, message, "rate_limit_error", "queue_full", headers={"retry-after": "2"}) from None
