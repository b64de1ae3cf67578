"""Cancels a handler when its client goes away. Starlette does so only for streamed answers."""

import asyncio
from collections.abc import Awaitable

import anyio
from starlette.requests import Request
from starlette.responses import Response

CLIENT_CLOSED = 499
"""nginx's status for a client that left; nobody receives it, but logs and tests see it."""


async def until_disconnect(request: Request, work: Awaitable[Response]) -> Response:
    """The response that `work` makes, or a 499 if the client leaves first. The body must have been read."""
    with anyio.CancelScope() as scope:
        watcher = asyncio.create_task(_watch(request, scope))
        try:
            return await work
        finally:
            watcher.cancel()
    return Response(status_code=CLIENT_CLOSED)


async def _watch(request: Request, scope: anyio.CancelScope) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
