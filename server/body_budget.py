"""What the bodies of all requests may take together, so that no crowd fills the memory with them. Event loop only."""

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError

BODIES_FULL = "service_bodies_full"

UNCOUNTED_BYTES = 65_536
"""So much of each body counts as its connection's: ordinary requests are read whatever others send."""


class BodyBudget:
    """ASGI middleware around all that reads bodies: `limit` bytes of them at once. What a request took is free again
    once it is answered, because until then it is kept in one form or another."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit
        self._taken = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["body_part"] = part = BodyPart(self)
        try:
            await self._app(scope, receive, send)
        finally:
            self._taken -= part.counted

    def take(self, size: int) -> None:
        """Raises `ApiError` 503 if there is not so much left."""
        if self._taken + size > self._limit:
            message = "Too many large request bodies are in flight; try again in 1 s."
            raise ApiError(503, message, "server_error", BODIES_FULL, headers={"retry-after": "1"})
        self._taken += size


class BodyPart:
    """What one request took of the budget."""

    def __init__(self, budget: BodyBudget) -> None:
        self.counted = 0
        self._budget = budget
        self._size = 0

    def take(self, size: int) -> None:
        """Raises `ApiError` 503 if the budget does not have it."""
        self._size += size
        counted = max(0, self._size - UNCOUNTED_BYTES)
        self._budget.take(counted - self.counted)
        self.counted = counted
