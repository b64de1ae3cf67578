"""`GET /metrics`. Anyone may ask for it, and writing it takes milliseconds: it is done once for all waiting."""

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from server.metrics import CONTENT_TYPE, Metrics


class Scrapes:
    """Gives every scrape what was written after it asked."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._writing = asyncio.Lock()
        self._next: asyncio.Task[bytes] | None = None

    async def take(self) -> bytes:
        if self._next is None:
            self._next = asyncio.create_task(self._write())
        return await asyncio.shield(self._next)

    async def _write(self) -> bytes:
        async with self._writing:
            self._next = None  # who asks from now on gets the one after this
            return await self._metrics.exposition()


async def scrape(request: Request) -> Response:
    return Response(await request.app.state.scrapes.take(), media_type=CONTENT_TYPE)
