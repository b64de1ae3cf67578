"""What applies to every request: ids, API keys, budgets of memory, browser checks. Plain ASGI: streams pass through."""

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from ipaddress import ip_address
from typing import Any, cast

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batching.errors import UNWINDING
from server.callers import Caller, Key
from server.http.errors import ApiError

logger = logging.getLogger(__name__)


class NativeFault(Exception):
    """Wraps a failure that is not an `Exception`, such as a panic in a Rust library, so that handlers see one."""


REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)


class RequestId:
    """Gives each request an id, the client's `X-Request-Id` if it is safe to log, and returns it in a header.

    Also names the request's ignored fields in a header, if there were any.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        wanted = headers.get("x-request-id", "")
        request_id = wanted if REQUEST_ID.fullmatch(wanted) else secrets.token_hex(8)
        scope.setdefault("state", {})["caller"] = Caller(request_id, trace=trace_of(headers))

        def send_with_id(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                added = MutableHeaders(scope=message)
                added["x-request-id"] = request_id
                if ignored := scope["state"].get("ignored"):
                    added["x-ignored-fields"] = ignored
            return send(message)

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
    """Requires a key on every path outside `open_paths`; `refuse` answers requests without one.

    It comes as `Authorization: Bearer KEY`, or as `x-api-key: KEY`, as clients of Anthropic send it.

    Handlers find the key's name in the request's state.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Collection[Key],
        open_paths: frozenset[str],
        refuse: Callable[[Request, ApiError], Awaitable[Response]],
    ) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # With a slash too many it is redirected to one of them.
        if scope["type"] != "http" or {scope["path"], scope["path"].removesuffix("/")} & self._open_paths:
            return await self._app(scope, receive, send)
        key = next(filter(None, (key_of(self._keys, secret) for secret in secrets_in(dict(scope["headers"])))), None)
        if key is not None:
            state = scope["state"]
            state["caller"] = replace(state["caller"], name=key.name, share=key.share)
            return await self._app(scope, receive, send)
        error = ApiError(
            401,
            "A valid API key is required, as Authorization: Bearer KEY or x-api-key: KEY.",
            "authentication_error",
            "unknown_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        response = await self._refuse(Request(scope), error)
        await response(scope, receive, send)


def key_of(keys: Iterable[Key], secret: bytes) -> Key | None:
    """The key with this secret. Compares all keys, each in constant time, so that timing reveals nothing."""
    digest = sha256(secret).digest()
    matches = [key for key in keys if hmac.compare_digest(digest, key.digest)]
    return matches[0] if matches else None


def secrets_in(headers: Mapping[bytes, bytes]) -> Iterator[bytes]:
    """What may be an API key: of a client that sends both headers, either counts."""
    scheme, _, secret = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        yield secret.strip()
    if b"x-api-key" in headers:
        yield headers[b"x-api-key"].strip()


UNCOUNTED_BYTES = 65_536
"""Bytes of each body that are not counted, so that ordinary requests are read whatever others send."""


class BodyBudget:
    """ASGI middleware that bounds the bodies of all requests in flight to `limit` bytes. A request's share is released
    once it is answered, because its content is kept in some form until then."""

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
        """Raises `ApiError` 503 if less than that is left."""
        if self._taken + size > self._limit:
            message = "Too many large request bodies are in flight; try again in 1 s."
            raise ApiError(503, message, "server_error", "service_bodies_full", headers={"retry-after": "1"})
        self._taken += size


class BodyPart:
    """One request's share of the budget."""

    def __init__(self, budget: BodyBudget) -> None:
        self.counted = 0
        self._budget = budget
        self._size = 0

    def take(self, size: int) -> None:
        """Raises `ApiError` 503 if the budget is exhausted."""
        self._size += size
        counted = max(0, self._size - UNCOUNTED_BYTES)
        self._budget.take(counted - self.counted)
        self.counted = counted


PATIENT_SECONDS = 1.0
"""Time that a client has to read its answer, however large, before the answer may have to make room."""


@dataclass(frozen=True, slots=True, eq=False)
class Unread:
    """A large answer, or a part of one, that its client has not taken yet. Cancelling its task breaks it off."""

    client: str
    size: int
    begun: float
    task: asyncio.Task[Any]


class AnswerBudget:
    """ASGI middleware that bounds the answers of all requests that clients are slow to read to `limit` bytes.

    Beyond that, the key that has the most loses the one that it has been reading for longest.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit
        self._unread: dict[Unread, None] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message, size: int) -> None:
            with self._counting(scope["state"]["caller"].name, size):
                await send(message)

        def send_counted(message: Message) -> Awaitable[None]:
            size = len(message.get("body", b""))
            return counted(message, size) if size > UNCOUNTED_BYTES else send(message)

        await self._app(scope, receive, send_counted)

    @contextmanager
    def _counting(self, client: str, size: int) -> Iterator[None]:
        task = cast("asyncio.Task[Any]", asyncio.current_task())  # the request's own
        answer = Unread(client, size, time.monotonic(), task)
        self._unread[answer] = None
        self._make_room()
        try:
            yield
        finally:
            self._unread.pop(answer, None)

    def _make_room(self) -> None:
        held = Counter[str]()
        for answer in self._unread:
            held[answer.client] += answer.size
        before = time.monotonic() - PATIENT_SECONDS
        slow = [answer for answer in self._unread if answer.begun < before]
        while held.total() > self._limit and slow:
            most = max((answer.client for answer in slow), key=lambda client: held[client])
            broken = next(answer for answer in slow if answer.client == most)
            logger.info("a client read its answer of %d bytes too slowly when others needed memory", broken.size)
            held[most] -= broken.size
            slow.remove(broken)
            del self._unread[broken]
            broken.task.cancel()


LOOPBACK = frozenset(["localhost", "127.0.0.1", "[::1]"])
EXEMPT = frozenset(["/health", "/health/live", "/health/ready", "/metrics"])
"""Probes and scrapers may use any host name, and these paths reveal nothing of value to a web page."""


def allowed_hosts(host: str, names: Collection[str]) -> frozenset[str]:
    """The accepted host names, or `*`: by default any, or only loopback names if bound to loopback."""
    if names:
        return LOOPBACK | {host_name(name) for name in names}
    return LOOPBACK | {host.lower()} if is_loopback(host) else frozenset(["*"])


def host_name(host: str) -> str:
    """A host of a request or a setting as it is compared: lower case, no port, an IPv6 address in brackets."""
    name = host.lower()
    if name.count(":") > 1 and not name.startswith("["):
        return f"[{name}]"
    return name if name.endswith("]") else name.rsplit(":", 1)[0]


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class BrowserGuard:
    """Refuses requests to an unknown host name and requests from pages of unknown origins.

    `origins` are allowed, `*` for all; the service's own pages always are. `refuse` answers refused requests.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: frozenset[str],
        origins: Collection[str],
        refuse: Callable[[Request, ApiError], Awaitable[Response]],
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._origins = origins
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in EXEMPT and (error := self._fault(Headers(scope=scope))):
            response = await self._refuse(Request(scope), error)
            return await response(scope, receive, send)
        await self._app(scope, receive, send)

    def _fault(self, headers: Headers) -> ApiError | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if host and not self._knows(host):
            message = "This host name is not allowed; the operator can add it to --allowed-hosts."
            return ApiError(421, message, code="unknown_host")
        if origin is not None and not self._may(origin, host):
            message = "Pages of this origin may not call this API; the operator can add it to --cors-origins."
            return ApiError(403, message, code="unknown_origin")
        return None

    def _knows(self, host: str) -> bool:
        return "*" in self._hosts or host_name(host) in self._hosts

    def _may(self, origin: str, host: str) -> bool:
        return "*" in self._origins or origin in self._origins or is_own(origin, host)


def is_own(origin: str, host: str) -> bool:
    """Whether a page of this origin came from this host. Some proxies add the port that browsers leave out."""
    scheme, _, name = origin.lower().partition("://")
    return host.lower() in (name, name + {"http": ":80", "https": ":443"}.get(scheme, ""))
