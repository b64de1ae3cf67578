"""What applies to every request: its id, and the API key. Plain ASGI, so streams pass through untouched."""

import re
import secrets
from collections.abc import Awaitable, Callable, Container
from dataclasses import replace

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batching.errors import UNWINDING
from server.caller import Caller
from server.errors import ApiError
from server.keys import Keys


class NativeFault(Exception):
    """Stands for a fault that is no `Exception`, such as a panic in a Rust library, where an `Exception` is handled."""


REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)


class RequestId:
    """Gives each request an id, the client's own `X-Request-Id` if it is fit for a log, and returns it.

    It also names the fields of the request that were ignored, if any were.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        request_id = asked if REQUEST_ID.fullmatch(asked) else secrets.token_hex(8)
        scope.setdefault("state", {})["caller"] = Caller(request_id, trace=trace_of(headers))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = MutableHeaders(scope=message)
                added["x-request-id"] = request_id
                if ignored := scope["state"].get("ignored"):
                    added["x-ignored-fields"] = ignored
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except (Exception, *UNWINDING):
            raise
        except BaseException as error:
            raise NativeFault("a library failed") from error


def trace_of(headers: Headers) -> tuple[tuple[str, str], ...]:
    """The W3C Trace Context headers of a request."""
    return tuple((name, headers[name]) for name in ("traceparent", "tracestate") if name in headers)


class ApiKey:
    """Asks for `Authorization: Bearer KEY` on every path that is not one of `open_paths`; `refuse` answers without.

    The handlers are told whose key it is.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        open_paths: Container[str],
        refuse: Callable[[Request, ApiError], Awaitable[Response]],
    ) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            return await self._app(scope, receive, send)
        scheme, _, secret = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        key = self._keys.find(secret.strip()) if scheme.lower() == b"bearer" else None
        if key is not None:
            state = scope["state"]
            state["caller"] = replace(state["caller"], name=key.name, share=key.share)
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
