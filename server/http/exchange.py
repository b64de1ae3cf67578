"""One HTTP request and its response, as ASGI's scope, `receive` and `send`. Event loop only."""

import asyncio
import logging
from collections.abc import Iterable
from http import HTTPStatus
from typing import Protocol
from urllib.parse import unquote

import h11
from starlette.types import ASGIApp, Message, Scope

from server.http.errors import ApiError, internal

logger = logging.getLogger(__name__)

BODY_BYTES = 32_768
"""Bytes of a body that wait for the application before reading stops."""

PIECE_BYTES = 65_536
"""So much of an answer is written at a time."""

Headers = list[tuple[bytes, bytes]]


class Wire(Protocol):
    """What an exchange needs from its connection."""

    @property
    def default_headers(self) -> Headers: ...

    @property
    def client_waits(self) -> bool:
        """Whether the client waits for permission to send its body (`Expect: 100-continue`)."""
        ...

    @property
    def full(self) -> bool:
        """Whether the send buffer is full."""
        ...

    @property
    def stopping(self) -> bool:
        """Whether the connection closes after this answer."""
        ...

    def send(self, event: h11.Response | h11.InformationalResponse | h11.Data | h11.EndOfMessage) -> None: ...
    def write(self, data: bytes) -> None: ...
    async def writable(self) -> None: ...
    def regulate(self) -> None: ...
    def answered(self) -> None: ...
    def refuse(self, error: ApiError) -> None: ...
    def close(self) -> None: ...


class Exchange:
    """One request and its response. `run` it once; the connection feeds it with `take`, `end`, `leave` and `lose`."""

    def __init__(self, wire: Wire, scope: Scope) -> None:
        self._wire = wire
        self._scope = scope
        self._body = bytearray()
        self._whole = False  # the whole body has arrived
        self._read = False  # and the application has received it
        self._left = False  # the client sends nothing more
        self._lost = False  # and nothing can be sent to it
        self._complete = False
        self._chunked = False
        self._news = asyncio.Event()
        self._turn = asyncio.Lock()  # no message comes between the pieces of another

    # From the connection

    @property
    def full(self) -> bool:
        return len(self._body) > BODY_BYTES

    def take(self, body: bytes) -> None:
        self._body += body
        self._news.set()

    def end(self) -> None:
        self._whole = True
        self._news.set()

    def leave(self) -> None:
        self._left = True
        self._news.set()

    def lose(self) -> None:
        self._left = self._lost = True
        self._body.clear()
        self._news.set()

    # The application

    async def run(self, app: ASGIApp) -> None:
        """Run the application. An incomplete answer closes the connection, so that the client sees it was cut off."""
        try:
            await app(self._scope, self._receive, self._send)
        except Exception:
            if not self._complete:  # otherwise the application has logged it
                logger.exception("a request was not answered")
        finally:
            if not self._complete and not self._lost:
                self._wire.close() if self._left else self._wire.refuse(internal())

    async def _receive(self) -> Message:
        if self._wire.client_waits and not self._over:
            self._wire.send(h11.InformationalResponse(status_code=100, headers=[], reason="Continue"))
        while not (self._over or self._body or (self._whole and not self._read)):
            self._news.clear()
            await self._news.wait()
        if self._over:
            return {"type": "http.disconnect"}
        body, self._body = bytes(self._body), bytearray()
        self._read = self._whole
        self._wire.regulate()
        return {"type": "http.request", "body": body, "more_body": not self._whole}

    @property
    def _over(self) -> bool:
        return self._left or self._complete

    async def _send(self, message: Message) -> None:
        async with self._turn:
            if message["type"] == "http.response.start":
                if await self._has_room():
                    self._start(message["status"], message.get("headers", []))
            else:
                await self._send_body(message.get("body", b""), more=message.get("more_body", False))

    async def _send_body(self, body: bytes, *, more: bool) -> None:
        """In pieces, between which others have the event loop: transports copy what the kernel does not take."""
        for start in range(0, len(body) or 1, PIECE_BYTES):
            if start:
                await asyncio.sleep(0)
            if await self._has_room():
                end = start + PIECE_BYTES
                self._continue(body[start:end], more=more or end < len(body))

    async def _has_room(self) -> bool:
        """Whether there is still somebody to send to, once there is room for it."""
        if self._wire.full:
            await self._wire.writable()
        return not self._lost

    def _start(self, status: int, own: Iterable[tuple[bytes, bytes]]) -> None:
        headers = [*self._wire.default_headers, *own]
        if self._wire.stopping or self._wire.client_waits:  # its body may never come
            headers.append((b"connection", b"close"))
        bounded = status in (204, 304) or any(name.lower() == b"content-length" for name, _ in headers)
        self._chunked = not (bounded or self._bodiless) and self._scope["http_version"] == "1.1"
        self._wire.send(h11.Response(status_code=status, headers=headers, reason=reason(status)))

    @property
    def _bodiless(self) -> bool:
        return bool(self._scope["method"] == "HEAD")

    def _continue(self, body: bytes, *, more: bool) -> None:
        if self._chunked:
            if body:
                self._wire.write(b"%x\r\n%b\r\n" % (len(body), body))
        elif not self._bodiless:
            self._wire.send(h11.Data(data=body))
        if not more:
            self._wire.send(h11.EndOfMessage())
            self._complete = True
            self._news.set()
            self._wire.answered()


def reason(status: int) -> str:
    """The reason phrase of a status."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def scope_of(request: h11.Request, transport: asyncio.BaseTransport, app_state: dict[str, object]) -> Scope:
    """The request's ASGI scope (version 2.3, section HTTP)."""
    path, _, query = origin_form(request.target).partition(b"?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": request.http_version.decode(),
        "method": request.method.decode(),
        "scheme": "http",
        "path": unquote(path.decode("ascii")),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": list(request.headers),
        "client": address(transport, "peername"),
        "server": address(transport, "sockname"),
        "state": app_state.copy(),
    }


def origin_form(target: bytes) -> bytes:
    """`/path?query`, also for the absolute form `http://host/path?query` (RFC 9112, section 3.2.2)."""
    if not target.lower().startswith(b"http://"):
        return target
    _, _, rest = target[len(b"http://") :].partition(b"/")
    return b"/" + rest


def address(transport: asyncio.BaseTransport, end: str) -> tuple[str, int] | None:
    """Host and port of one end of a connection; None if it is already gone."""
    name = transport.get_extra_info(end)
    return (name[0], name[1]) if isinstance(name, tuple) else None
