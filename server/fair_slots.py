"""Places to work in that clients share: one each at a time, and their turns come round. Event loop only."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Full(Exception):
    """So many of this client's own wait already that another would not be served in time."""


class FairSlots:
    """So many may work at once, each of another client. Whose client was served longest ago goes first."""

    def __init__(self, slots: int, waiting: int) -> None:
        """`waiting`: how many of one client may wait."""
        self._free = slots
        self._most = waiting
        self._busy: set[str] = set()
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def of(self, client: str) -> AsyncIterator[None]:
        """Hold a place for as long as this lasts. Raises `Full`."""
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
        """Give free places to clients that have none, in turn. A client that waits no more has no turn."""
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
