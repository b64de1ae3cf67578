"""Helper threads for work that would block the event loop for too long: decoding bodies, templates, tokenizing."""

import asyncio
import os
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio
from anyio import to_thread

from server.callers import Caller
from server.http.errors import ApiError


class Full(Exception):
    """This client already has as many waiting as could be served in time."""


class FairSlots:
    """A semaphore of `slots` with at most one per client. The client served longest ago goes first."""

    def __init__(self, slots: int, waiting: int) -> None:
        """`waiting`: how many may wait per client."""
        self._free = slots
        self._most = waiting
        self._busy: set[str] = set()
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def of(self, client: str) -> AsyncIterator[None]:
        """Hold a slot inside the context. Raises `Full`."""
        await self._take(client)
        try:
            yield
        finally:
            self._give_back(client)

    async def _take(self, client: str) -> None:
        queue = self._queues.setdefault(client, deque())
        if len(queue) >= self._most:
            raise Full
        turn = asyncio.get_running_loop().create_future()
        queue.append(turn)
        self._serve()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # its turn came while it was being cancelled
                self._give_back(client)
            elif turn in queue:
                queue.remove(turn)
            raise

    def _give_back(self, client: str) -> None:
        self._free += 1
        self._busy.discard(client)
        self._serve()

    def _serve(self) -> None:
        """Give free slots in turn to waiting clients that hold none. Clients with nothing waiting are skipped."""
        for client in [client for client in self._queues if client not in self._busy]:
            queue = self._queues[client]
            while queue and queue[0].cancelled():
                queue.popleft()
            if queue and self._free:
                self._free -= 1
                self._busy.add(client)
                self._queues.move_to_end(client)
                queue.popleft().set_result(None)
            if not queue:
                del self._queues[client]


LONG_BYTES = 262_144
"""Bytes of a request that takes about a tenth of a second to tokenize. Larger ones have a queue of their own."""

WAITING = 1024
"""Requests per API key that may wait for a thread."""

T = TypeVar("T")


class Encoders:
    """Two queues, so that short requests never wait for long ones. In each, API keys take turns.

    Most of the work is done in Rust; running few threads leaves cores to the event loop and the worker.
    """

    def __init__(self) -> None:
        short = max(2, (os.cpu_count() or 1) // 4)
        self._short = FairSlots(short, WAITING)
        self._long = FairSlots(1, WAITING)
        self._threads = anyio.CapacityLimiter(short + 1)

    async def run(self, work: Callable[[], T], size: int, caller: Caller) -> T:
        """Run `work` for a request of `size` bytes. Raises what it raises, and `ApiError` 429."""
        slots = self._long if size > LONG_BYTES else self._short
        try:
            # Without API keys the client is unknown, so requests are served in order of arrival.
            async with slots.of(caller.name or caller.request_id):
                return await to_thread.run_sync(work, limiter=self._threads)
        except Full:
            message = "Too many requests of this key are being processed; try again in a few seconds."
            raise ApiError(429, message, "rate_limit_error", "tokenizer_busy", headers={"retry-after": "2"}) from None
