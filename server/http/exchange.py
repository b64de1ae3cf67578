"""One HTTP request and its response: h11 on the client's side, ASGI on the application's. Event loop only.

h11 parses: it holds a pipelined request back until the previous one is answered, and bounds heads, chunk headers and
trailers. uvicorn's faster parser, httptools, does neither, and loses the body of a request with an Upgrade header. h11
costs a tenth of a millisecond a request and nothing a token: the chunks of a streamed answer do not pass through it.
"""

import asyncio
import re
from collections.abc import Iterable
from http.client import responses as reasons
from typing import Protocol
from urllib.parse import unquote

import h11
from starlette.types import Message, Scope

from server.http.errors import ApiError

EVENTS_A_TURN = 128
"""Parser events handled per event loop iteration: a few milliseconds of work."""

HEAD_BYTES = 16_384
"""Maximum bytes of the request line and headers (the limit of h11 and Node)."""

LINE_BYTES = 4096
"""Maximum bytes of an unfinished chunk header or of unfinished trailers."""

MOST_HEADERS = 100
"""Apache's limit. A short header takes a hundred times its bytes in Python objects."""

BODY_BYTES = 32_768
"""Bytes of a body that wait for the application before reading stops."""

PIECE_BYTES = 65_536
"""So much of an answer is written at a time."""

HEAD_TOO_LARGE = ApiError(
    431,
    f"The request headers exceed the limit of {HEAD_BYTES // 1024} KiB or {MOST_HEADERS} headers.",
    code="headers_too_large",
)

BLANK_LINE = re.compile(rb"\n\r?\n")

WRITE = "microbatch.write"
"""The ASGI extension by which an application sends a piece of a started answer past all middleware, which looks at the
starts and at large pieces of answers alone: `Exchange.write`."""

Headers = list[tuple[bytes, bytes]]


class Wire(Protocol):
    """What an exchange needs from its connection."""

    @property
    def transport(self) -> asyncio.BaseTransport: ...

    @property
    def app_state(self) -> dict[str, object]: ...

    @property
    def default_headers(self) -> Headers: ...

    @property
    def full(self) -> bool:
        """Whether the send buffer is full."""
        ...

    @property
    def stopping(self) -> bool:
        """Whether the connection closes after this answer."""
        ...

    def answered(self, exchange: "Exchange") -> None:
        """The answer is complete. Called again if the rest of the request's body came after it."""
        ...

    def write(self, data: bytes) -> None: ...
    async def writable(self) -> None: ...
    def regulate(self) -> None: ...
    def refuse(self, error: ApiError) -> None: ...


class Lines:
    """Counts the lines of a request head as it arrives, up to the empty line at its end."""

    def __init__(self) -> None:
        self._count = 0
        self._last = b""
        self._ended = False

    def add(self, data: bytes) -> int:
        """The number of lines including those in `data`."""
        if not self._ended:
            text = self._last + data
            end = BLANK_LINE.search(text)
            self._count += text.count(b"\n", len(self._last), end.start() if end else len(text))
            self._last, self._ended = text[-2:], end is not None
        return self._count


class Exchange:
    """One request, from its first byte, and its response. `feed` it with bytes, and once it is `answering` run the
    application with its `receive` and `send`.

    It is `answering` from the end of its head, when it has a `scope`, until its answer is `complete` or nobody is left
    to send it to; the answer may be the connection's `last`. `body` has arrived and waits for the application; a
    request is `whole` once all of it has arrived. It is `behind` while it has bytes that are not to be parsed yet.
    """

    def __init__(self, wire: Wire) -> None:
        self.body = bytearray()
        self.whole = self.behind = self.answering = self.complete = self.last = False
        self._wire = wire
        self._parser = h11.Connection(h11.SERVER, HEAD_BYTES)
        self._lines = Lines()
        self._framing = 0  # bytes received that are not known to be body
        self._body_size = 0  # bytes of the body received
        self._held_back = False  # a pipelined request waits in the parser
        self.scope: Scope = {}
        self._read = False  # the application has received the whole body
        self._over = False  # the client sends nothing more, or the answer is complete
        self._lost = False  # nothing can be sent to the client
        self._chunked = False
        self._news = asyncio.Event()
        self._turn = asyncio.Lock()  # no message comes between the pieces of another

    # The client

    def feed(self, data: bytes) -> bool:
        """Parse these bytes. Returns whether more is left than there is time for in this iteration of the loop: then
        feed it with none in the next one."""
        if self._parser.their_state is h11.IDLE and self._lines.add(data) > MOST_HEADERS + 1:
            self._wire.refuse(HEAD_TOO_LARGE)  # parsing them would take milliseconds
        if data and self._wanted:
            self._framing += len(data)
            self._parser.receive_data(data)
        try:
            more = self._take_some()
            self._check_framing(more=more)
        except h11.RemoteProtocolError as error:
            more = False
            self._wire.refuse(refusal_of(error))
        self.behind = more or self._held_back
        return more

    @property
    def _wanted(self) -> bool:
        """Whether further input is of use: not after the last request or a refusal."""
        return not self._lost and self._parser.their_state is not h11.MUST_CLOSE

    def _take_some(self) -> bool:
        """Returns whether there may be more."""
        return all(self._wanted and self._take(self._parser.next_event()) for _ in range(EVENTS_A_TURN))

    def _take(self, event: object) -> bool:
        """Returns whether there may be more events."""
        match event:
            case h11.Request():
                self._begin(event)
            case h11.Data():
                self._framing -= len(event.data)
                self._body_size += len(event.data)
                if not self.complete:
                    self.body += event.data
                    self._news.set()
            case h11.EndOfMessage():
                self.whole = True
                self._news.set()
                if self.complete:
                    self._wire.answered(self)
                    return False
            case _:
                self._held_back = event is h11.PAUSED and bool(self.unparsed)
                return False
        return True

    def _begin(self, request: h11.Request) -> None:
        unparsed = len(self.unparsed)
        head, self._framing = self._framing - unparsed, unparsed
        self.scope = scope_of(request, self._wire.transport, self._wire.app_state)
        if error := fault_of(request, head):
            return self._wire.refuse(error)
        self.scope["extensions"] = {WRITE: self.write}
        self.answering = True

    def _check_framing(self, *, more: bool) -> None:
        if self._lost or self._parser.their_state is not h11.SEND_BODY:
            return
        if not more and len(self.unparsed) > LINE_BYTES:  # else whole chunks may wait for the next iteration
            self._wire.refuse(HEAD_TOO_LARGE)
        elif self._framing > HEAD_BYTES + self._body_size:
            self._wire.refuse(ApiError(400, "The body's chunks are smaller than their framing; send larger chunks."))

    @property
    def unparsed(self) -> bytes:
        return self._parser.trailing_data[0]

    def leave(self) -> None:
        """The client sends nothing more."""
        self._over = True
        self._news.set()

    def lose(self) -> None:
        """Nothing can be sent to the client any more."""
        self._over = self._lost = True
        self.answering = False
        self.body.clear()
        self._news.set()

    def fail(self, error: ApiError) -> bool:
        """End with this answer in place of the application's. Returns whether none had begun."""
        self.lose()
        if self._parser.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return False
        body = error.body()
        headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
        headers += [("connection", "close"), *error.headers.items()]
        self._emit(h11.Response(status_code=error.status, headers=headers, reason=reasons.get(error.status, "")))
        if not self._bodiless:
            self._emit(h11.Data(data=body))
        self._emit(h11.EndOfMessage())
        return True

    # The application

    async def receive(self) -> Message:
        """ASGI's."""
        if self._parser.they_are_waiting_for_100_continue and not self._over:
            self._emit(h11.InformationalResponse(status_code=100, headers=[], reason="Continue"))
        while not (self._over or self.body or (self.whole and not self._read)):
            self._news.clear()
            await self._news.wait()
        if self._over:
            return {"type": "http.disconnect"}
        body, self.body = bytes(self.body), bytearray()
        self._read = self.whole
        if len(body) > BODY_BYTES:
            self._wire.regulate()
        return {"type": "http.request", "body": body, "more_body": not self.whole}

    async def send(self, message: Message) -> None:
        """ASGI's."""
        body, more = message.get("body", b""), message.get("more_body", False)
        if message["type"] == "http.response.start":
            if await self._has_room():
                self._start(message["status"], message.get("headers", []))
        elif self._flows(body):
            self._continue(body, more=more)
        else:
            async with self._turn:
                await self._send_body(body, more=more)

    def write(self, body: bytes) -> bool:
        """Send a piece of the answer, which is not the last one, if it can be sent at once. Returns whether it was."""
        if flows := self._flows(body):
            self._continue(body, more=True)
        return flows

    def _flows(self, body: bytes) -> bool:
        """Whether there is nothing to wait for."""
        return len(body) <= PIECE_BYTES and not (self._wire.full or self._lost or self._turn.locked())

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
        if self._wire.stopping or self._parser.they_are_waiting_for_100_continue:  # its body may never come
            headers.append((b"connection", b"close"))
        bounded = status in (204, 304) or any(name.lower() == b"content-length" for name, _ in headers)
        self._chunked = not (bounded or self._bodiless) and self.scope["http_version"] == "1.1"
        self._emit(h11.Response(status_code=status, headers=headers, reason=reasons.get(status, "")))

    @property
    def _bodiless(self) -> bool:
        return self.scope.get("method") == "HEAD"

    def _continue(self, body: bytes, *, more: bool) -> None:
        if self._chunked:
            if body:
                self._wire.write(b"%x\r\n%b\r\n" % (len(body), body))
        elif not self._bodiless:
            self._emit(h11.Data(data=body))
        if not more:
            self._emit(h11.EndOfMessage())
            self.complete = self._over = True
            self.answering, self.last = False, self._parser.our_state is not h11.DONE
            self.body.clear()
            self._news.set()
            self._wire.answered(self)

    def _emit(self, event: h11.Response | h11.InformationalResponse | h11.Data | h11.EndOfMessage) -> None:
        """Raises `h11.LocalProtocolError` if it does not fit what was sent before."""
        self._wire.write(self._parser.send(event))


def fault_of(request: h11.Request, head: int) -> ApiError | None:
    """A fault in a request head of `head` bytes that h11 leaves to its callers, if there is one."""
    names = [name for name, _ in request.headers]
    if head > HEAD_BYTES or len(names) > MOST_HEADERS:
        return HEAD_TOO_LARGE
    if request.http_version not in (b"1.0", b"1.1"):
        return ApiError(505, "Only HTTP/1.1 and HTTP/1.0 are supported.")
    if b"transfer-encoding" in names and (b"content-length" in names or request.http_version == b"1.0"):
        # A proxy in front might see another end of the body (RFC 9112, section 6.1).
        return ApiError(400, "The body's length is given in two ways, or in a way that HTTP/1.0 does not have.")
    return None


def refusal_of(error: h11.RemoteProtocolError) -> ApiError:
    """The error for bytes that h11 rejects."""
    match error.error_status_hint:
        case 431:
            return HEAD_TOO_LARGE
        case 501:
            return ApiError(501, "The only supported transfer coding is chunked.")
        case _:
            return ApiError(400, "Malformed HTTP request.", code="malformed_request")


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
