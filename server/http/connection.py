"""One client's connection: bytes in and out, in bounded amounts and bounded time. Event loop only.

h11 parses: it holds a pipelined request back until the previous one is answered, and bounds heads, chunk headers and
trailers. uvicorn's faster parser, httptools, does neither, and loses the body of a request with an Upgrade header. h11
costs a tenth of a millisecond a request and nothing a token: the chunks of a streamed answer do not pass through it.
uvicorn accepts connections, runs the lifespan and shuts down.
"""

import asyncio
import contextlib
import re
from functools import partial

import h11
from uvicorn import Config
from uvicorn.server import ServerState

from server.http.errors import ApiError
from server.http.exchange import Exchange, reason, scope_of
from server.http.turns import Turns
from server.observe.log import log_refusal
from server.settings import Settings

READ_BYTES = 8192
"""Maximum bytes per read: even made of the smallest chunks, they are parsed in a few milliseconds."""

READS_A_TURN = 16
"""Reads per event loop iteration, over all connections; libuv by itself would read 32 times from each."""

REQUESTS_A_TURN = 4
"""Requests started per event loop iteration, over all connections; each takes about a millisecond."""

PROBES = frozenset(["/health", "/health/live"])
"""Paths whose requests skip that queue: they ask whether the event loop is alive."""

EVENTS_A_TURN = 128
"""Parser events handled per event loop iteration: a few milliseconds of work."""

HEAD_BYTES = 16_384
"""Maximum bytes of the request line and headers (the limit of h11 and Node)."""

LINE_BYTES = 4096
"""Maximum bytes of an unfinished chunk header or of unfinished trailers."""

MOST_HEADERS = 100
"""Apache's limit. A short header takes a hundred times its bytes in Python objects."""

HEAD_SECONDS = 10.0
"""Time limit for the request line and headers, from the connection or the first byte."""

PATIENT_SECONDS = 1.0
"""Time that every body has before it may have to make room for another connection."""

REST_SECONDS = 5.0
"""Time limit for the rest of a body that was answered before it had fully arrived (nginx's lingering_timeout)."""

LINGERING = 64
"""Connections that may linger to read why they were refused; beyond that the longest-lingering one is aborted."""

WAITING_BYTES = 32_768
"""Bytes of an answer that wait for the client before writing pauses."""


HEAD_TOO_LARGE = ApiError(
    431,
    f"The request headers exceed the limit of {HEAD_BYTES // 1024} KiB or {MOST_HEADERS} headers.",
    code="headers_too_large",
)


TOO_MANY = ApiError(
    503,
    "Too many connections are open; try again in 1 s.",
    "server_error",
    "service_connections_full",
    headers={"retry-after": "1"},
)


TOO_SLOW = ApiError(
    408,
    "All connections were in use, and the body had come the slowest; send the request again.",
    code="request_timeout",
)

BLANK_LINE = re.compile(rb"\n\r?\n")


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


class Connections:
    """Creates the connections of one server, as uvicorn's `http`, and holds what they share.

    `waiting` has the connections that wait for their client to send something, longest waiting first; `receiving` has
    those whose client is sending a body, longest sending first; `leaving` has those that linger.
    """

    def __init__(self, settings: Settings) -> None:
        self.limit = settings.max_connections
        self.waiting: dict[Connection, None] = {}
        self.receiving: dict[Connection, None] = {}
        self.leaving: dict[Connection, None] = {}
        self.reads = Turns(READS_A_TURN)
        self.requests = Turns(REQUESTS_A_TURN)
        self.send_seconds = settings.send_timeout_s
        self.keep_alive_seconds = settings.keep_alive_s
        self.buffer = memoryview(bytearray(READ_BYTES))

    def __call__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> "Connection":
        return Connection(self, config, server_state, app_state)

    def make_room(self, newest: "Connection") -> None:
        """Called when there is one connection too many: closes the one that has waited longest or, if no other waits,
        ends the body that has been coming for longest. If none is slow, the newest is refused."""
        oldest = next(iter(self.waiting))
        slowest = next(iter(self.receiving), newest)
        if oldest is not newest:
            oldest.close()
        elif slowest.is_slow:
            slowest.refuse(TOO_SLOW)
        else:
            newest.refuse(TOO_MANY)

    def linger(self, leaving: "Connection") -> None:
        """A lingering connection no longer counts towards the limit."""
        self.leaving[leaving] = None
        if len(self.leaving) > LINGERING:
            next(iter(self.leaving)).transport.abort()


class Connection(asyncio.BufferedProtocol):
    """One client's connection. At most one request is answered at a time; `exchange` is None between requests.

    Two timers: `_deadline`, for what the client still has to send, runs only while nothing is being answered;
    `_sending` runs while bytes wait for the client, and only acts if the client took none of them.
    """

    transport: asyncio.Transport

    def __init__(self, shared: Connections, config: Config, server: ServerState, app_state: dict[str, object]) -> None:
        self._shared = shared
        self._app = config.loaded_app
        self._server = server
        self._app_state = app_state
        self._loop = asyncio.get_running_loop()
        self._parser = h11.Connection(h11.SERVER, HEAD_BYTES)
        self._lines = Lines()
        self.exchange: Exchange | None = None
        self._framing = 0  # bytes received since the last request that are not known to be body
        self._body = 0  # body bytes received
        self._body_begun = self._loop.time()
        self._held_back = False  # a pipelined request waits in the parser
        self._unfinished = False  # the parser has more events, for the next iteration of the loop
        self._resting = False  # other connections read before this one does again
        self._reading = True
        self._deadline: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None
        self._written = 0
        self.full = False  # the send buffer is full
        self._writable = asyncio.Event()
        self.stopping = False  # close after this request's answer
        self._leaving = False  # everything is written, and nothing more is read
        self.client_ended = False  # the client sends nothing more

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # it is a stream
        self.transport = transport
        transport.set_write_buffer_limits(high=WAITING_BYTES)
        self._server.connections.add(self)  # type: ignore[arg-type]  # uvicorn's type names its own protocols
        self._expect(HEAD_SECONDS)
        if len(self._server.connections) - len(self._shared.leaving) > self._shared.limit:
            self._shared.make_room(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._leaving = True
        self._shared.leaving.pop(self, None)
        self._expect(None)
        if self._sending is not None:
            self._sending.cancel()
        if self.exchange is not None:
            self.exchange.lose()
        self.resume_writing()

    def shutdown(self) -> None:
        """Close after the current answer. uvicorn calls this when the service stops."""
        if self.exchange is None:
            self.transport.close()
        else:
            self.stopping = True

    # Receiving

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._shared.buffer

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(self._shared.buffer[:nbytes])
        self._resting = True
        self._shared.reads.call(self._loop, self._rested)
        if self._parser.their_state is h11.IDLE and not self._framing:
            data = data.lstrip(b"\r\n")  # empty lines between requests are ignored (RFC 9112, section 2.2)
            if data:
                self._expect(HEAD_SECONDS)
        if data and self._wanted:
            self._feed(data)
            self._parse()
        else:
            self.regulate()

    def _rested(self) -> None:
        self._resting = False
        if not self._reading:
            self.regulate()

    def _feed(self, data: bytes) -> None:
        if self._parser.their_state is h11.IDLE and self._lines.add(data) > MOST_HEADERS + 1:
            return self.refuse(HEAD_TOO_LARGE)  # parsing them would take milliseconds
        self._framing += len(data)
        self._parser.receive_data(data)

    def _parse(self) -> None:
        try:
            self._unfinished = self._take_some()
            self._check_framing()
        except h11.RemoteProtocolError as error:
            self.refuse(refusal_of(error))
        self.regulate()

    def _take_some(self) -> bool:
        """Returns whether there is more, to be taken after others had the event loop."""
        for _ in range(EVENTS_A_TURN):
            if not (self._wanted and self._take(self._parser.next_event())):
                return False
        self._loop.call_soon(self._parse)
        return True

    def _check_framing(self) -> None:
        if self._parser.their_state is not h11.SEND_BODY:
            return
        if len(self._unparsed) > LINE_BYTES:
            self.refuse(HEAD_TOO_LARGE)
        elif self._framing > HEAD_BYTES + self._body:
            self.refuse(ApiError(400, "The body's chunks are smaller than their framing; send larger chunks."))

    @property
    def _wanted(self) -> bool:
        """Whether further input is of use: not after the last request or a refusal."""
        return not self._leaving and self._parser.their_state is not h11.MUST_CLOSE

    def _take(self, event: object) -> bool:
        """Returns whether there may be more events."""
        match event:
            case h11.Request():
                self._begin(event)
            case h11.Data():
                self._framing -= len(event.data)
                self._body += len(event.data)
                if self.exchange is not None:
                    self.exchange.take(event.data)
            case h11.EndOfMessage():
                self._shared.receiving.pop(self, None)
                if self.exchange is not None:
                    self.exchange.end()
                else:
                    self._next()
            case _:
                self._held_back = event is h11.PAUSED and bool(self._unparsed)
                return False
        return True

    @property
    def is_slow(self) -> bool:
        """Whether its body has been coming for a while."""
        return self in self._shared.receiving and self._loop.time() - self._body_begun > PATIENT_SECONDS

    @property
    def _unparsed(self) -> bytes:
        return self._parser.trailing_data[0]

    def _begin(self, request: h11.Request) -> None:
        unparsed = len(self._unparsed)
        head, self._framing, self._body = self._framing - unparsed, unparsed, 0
        if error := fault_of(request, head):
            return self.refuse(error)
        self._expect(None)
        self._shared.receiving[self], self._body_begun = None, self._loop.time()
        scope = scope_of(request, self.transport, self._app_state)
        self.exchange = Exchange(self, scope)
        answer = partial(self._answer, self.exchange)
        if scope["path"] in PROBES:
            answer()
        else:
            self._shared.requests.call(self._loop, answer)

    def _answer(self, exchange: Exchange) -> None:
        task = self._loop.create_task(exchange.run(self._app))
        self._server.tasks.add(task)
        task.add_done_callback(self._server.tasks.discard)

    def answered(self) -> None:
        """The exchange is over: continue with the next request, or close."""
        last, self.exchange = self._parser.our_state is not h11.DONE or self.stopping, None
        incomplete = self._parser.their_state is h11.SEND_BODY
        if self.client_ended or (last and not incomplete):
            self.transport.close()
        elif last:
            self.leave()
        elif incomplete:
            self._expect(REST_SECONDS)
            self.regulate()
        else:
            self._next()
            self._parse()

    def _next(self) -> None:
        """Start a parser for the next request with the bytes already received."""
        unparsed = self._unparsed.lstrip(b"\r\n")
        self._parser, self._lines = h11.Connection(h11.SERVER, HEAD_BYTES), Lines()
        self._framing, self._held_back = 0, False
        if unparsed:
            self._expect(HEAD_SECONDS)
            self._feed(unparsed)
        else:
            self._expect(self._shared.keep_alive_seconds)

    def regulate(self) -> None:
        """Read unless enough input is waiting. The kernel then slows the client down."""
        enough = self._held_back or self._unfinished or (self.exchange is not None and self.exchange.full)
        wanted = not (enough or self._resting)
        if wanted != self._reading and not self.client_ended and not self.transport.is_closing():
            self._reading = wanted
            (self.transport.resume_reading if wanted else self.transport.pause_reading)()

    def eof_received(self) -> bool:
        """The client sends nothing more. During a request this counts as a disconnect, as in nginx and Go: whether the
        client still reads is unknown. The handler is notified, and its answer is still sent."""
        self.client_ended = True
        if self.exchange is None:
            return False
        self.exchange.leave()
        return True

    def refuse(self, error: ApiError) -> None:
        """Send the error for a malformed or oversized request, if still possible, and close."""
        log_refusal("-", "-", error.status, error.code)
        if self.exchange is not None:
            self.exchange.lose()
        if self._parser.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = error.body()
            headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
            headers += [("connection", "close"), *error.headers.items()]
            self.send(h11.Response(status_code=error.status, headers=headers, reason=reason(error.status)))
            self.send(h11.Data(data=body))
            self.send(h11.EndOfMessage())
            self.leave()
        else:
            self.transport.close()

    def close(self) -> None:
        self._expect(None)
        self.transport.close()

    def leave(self) -> None:
        """Close once the client has. A client that is still sending would lose the answer if the connection closed at
        once (RFC 9112, section 9.6)."""
        if not self._leaving and not self.transport.is_closing():
            self._leaving = True
            self.exchange, self._held_back, self._unfinished = None, False, False
            with contextlib.suppress(OSError):  # the client has just disconnected, which the next read reports
                self.transport.write_eof()
            self._expect(REST_SECONDS)
            self._shared.linger(self)
            self.regulate()

    def _expect(self, seconds: float | None) -> None:
        """Close the connection unless the client sends what is due within `seconds`."""
        self._shared.waiting.pop(self, None)
        self._shared.receiving.pop(self, None)
        if seconds is not None and not self._leaving:
            self._shared.waiting[self] = None
        if self._deadline is not None:
            self._deadline.cancel()
        # `close` still sends what is buffered.
        self._deadline = None if seconds is None else self._loop.call_later(seconds, self.transport.close)

    # Sending

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        return self._server.default_headers

    @property
    def client_waits(self) -> bool:
        return self._parser.they_are_waiting_for_100_continue

    def send(self, event: h11.Response | h11.InformationalResponse | h11.Data | h11.EndOfMessage) -> None:
        """Write h11's bytes for the event. Raises `h11.LocalProtocolError` if it does not fit what was sent before."""
        self.write(self._parser.send(event))

    def write(self, data: bytes) -> None:
        if not data or self.transport.is_closing():
            return
        self.transport.write(data)
        self._written += len(data)
        if self._sending is None and self.transport.get_write_buffer_size():
            self._watch_sending()

    def pause_writing(self) -> None:
        self.full = True
        self._writable.clear()

    def resume_writing(self) -> None:
        self.full = False
        self._writable.set()

    async def writable(self) -> None:
        """Wait until the send buffer has room or the connection is lost."""
        await self._writable.wait()

    def _watch_sending(self) -> None:
        taken = self._written - self.transport.get_write_buffer_size()
        self._sending = self._loop.call_later(self._shared.send_seconds, self._check_sending, taken)

    def _check_sending(self, before: int) -> None:
        """Abort the connection if the client has taken nothing since the last check.

        Bytes taken are compared, not bytes waiting, because another answer may have been added meanwhile.
        """
        self._sending = None
        waiting = self.transport.get_write_buffer_size()
        if waiting and self._written - waiting == before:
            self.transport.abort()
        elif waiting:
            self._watch_sending()


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
