"""What applies to every request: its id, and the API key. Plain ASGI, so streams pass through untouched."""

import hmac
import re
import secrets
from collections.abc import Awaitable, Callable, Container, Iterable
from hashlib import sha256

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError

REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)


class RequestId:
    """Gives each request an id, the client's own `X-Request-Id` if it is fit for a log, and returns it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if REQUEST_ID.fullmatch(asked) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class ApiKey:
    """Asks for `Authorization: Bearer KEY` on every path that is not one of `open_paths`; `refuse` answers without.

    Keys are compared as SHA-256 digests in constant time, all of them each time.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Iterable[str],
        open_paths: Container[str],
        refuse: Callable[[Request, ApiError], Awaitable[Response]],
    ) -> None:
        self._app = app
        self._digests = [sha256(key.encode()).digest() for key in keys]
        self._open_paths = open_paths
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths or self._known(scope):
            return await self._app(scope, receive, send)
        error = ApiError(
            401,
            "A known API key is needed, as Authorization: Bearer KEY.",
            "authentication_error",
            "unknown_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        response = await self._refuse(Request(scope), error)
        await response(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        digest = sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(matches)
