"""Cancels what is done for a client when it goes away."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

T = TypeVar("T")

CLIENT_CLOSED = 499
"""nginx's status for a client that left; nobody receives it, but logs and tests see it."""


async def until_disconnect(request: Request, work: Awaitable[Response]) -> Response:
    """The response that `work` makes, or a 499 if the client leaves first. The body must have been read."""
    return await while_connected(request.receive, work) or Response(status_code=CLIENT_CLOSED)


async def while_connected(receive: Receive, work: Awaitable[T]) -> T | None:
    """What `work` gives, or None if the client leaves first. The body must have been read."""
    with anyio.CancelScope() as scope:
        watcher = asyncio.create_task(_watch(receive, scope))
        try:
            return await work
        finally:
            watcher.cancel()
    return None


async def _watch(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
