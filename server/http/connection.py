"""One client's connection: bytes in and out, in bounded amounts and bounded time. Event loop only.

uvicorn accepts connections on a `listener`, runs the lifespan and shuts down; `Exchange` parses requests and writes
their responses.
"""

import asyncio
import contextlib
import logging
import socket
from collections import deque
from collections.abc import Callable
from functools import partial

from uvicorn import Config
from uvicorn.server import ServerState

from batching.events import Observer, Rejected
from server.http.errors import ApiError, internal
from server.http.exchange import BODY_BYTES, Exchange
from server.observe.log import log_refusal
from server.settings import Settings

logger = logging.getLogger(__name__)

READ_BYTES = 8192
"""Maximum bytes per read: even made of the smallest chunks, they are parsed in a few milliseconds."""

READS_A_TURN = 16
"""Reads per event loop iteration, over all connections; libuv by itself would read 32 times from each."""

REQUESTS_A_TURN = 4
"""Requests started per event loop iteration, over all connections; each takes about a millisecond."""

PROBES = frozenset(["/health", "/health/live"])
"""Paths whose requests skip that queue: they ask whether the event loop is alive."""

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

SEND_BYTES = 65_536
"""Kernel send buffer for a client that does not read: about 300 tokens of a stream. The default reaches megabytes."""

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


def listener(host: str, port: int) -> socket.socket:
    """A listening socket whose connections have bounded buffers; `::` includes IPv4. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()  # whatever the system's default is
    listening = socket.create_server((host, port), family=family, dualstack_ipv6=both)
    # Both are inherited by accepted sockets. asyncio sets the second only where a socket names its protocol.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


class Turns:
    """Calls at most `most` functions per iteration of the loop, in order of arrival."""

    def __init__(self, most: int) -> None:
        self._most = self._left = most
        self._later: deque[Callable[[], None]] = deque()
        self._begun = False

    def call(self, loop: asyncio.AbstractEventLoop, work: Callable[[], None]) -> None:
        """Call it now if this iteration has room, else in a later one. It must not raise."""
        self._later.append(work)
        self._work(loop)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._begun:
            self._begun = True
            loop.call_soon(self._next, loop)
        while self._later and self._left:
            self._left -= 1
            self._later.popleft()()

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        self._begun, self._left = False, self._most
        if self._later:
            self._work(loop)


class Connections:
    """Creates the connections of one server, as uvicorn's `http`, and holds what they share.

    `waiting` has the connections that wait for their client to send something, longest waiting first; `receiving` has
    those whose client is sending a body, longest sending first; `leaving` has those that linger.
    """

    def __init__(self, settings: Settings, observe: Observer = lambda event: None) -> None:
        self.observe = observe
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
        self.app_state = app_state
        self._loop = asyncio.get_running_loop()
        self.exchange: Exchange | None = None
        self._body_begun = self._loop.time()
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
        if self.answering is None:
            self.transport.close()
        else:
            self.stopping = True

    @property
    def answering(self) -> Exchange | None:
        """The request that is being answered."""
        return self.exchange if self.exchange is not None and self.exchange.answering else None

    # Receiving

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._shared.buffer

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(self._shared.buffer[:nbytes])
        self._resting = True
        self._shared.reads.call(self._loop, self._rested)
        self._feed(data)

    def _rested(self) -> None:
        self._resting = False
        if not self._reading:
            self.regulate()

    def _feed(self, data: bytes) -> None:
        if self.exchange is None:
            data = data.lstrip(b"\r\n")  # empty lines between requests are ignored (RFC 9112, section 2.2)
        if not self._leaving and (self.exchange or data):
            self._parse(data)
        self.regulate()

    def _parse(self, data: bytes) -> None:
        """The first byte of a request begins an exchange, and the end of its head the answer."""
        if self.exchange is None:
            self._expect(HEAD_SECONDS)
            self.exchange = Exchange(self)
        exchange, answering = self.exchange, self.exchange.answering
        if exchange.feed(data):
            self._loop.call_soon(self._feed, b"")  # parses the rest
        if exchange.answering and not answering:
            self._answer(exchange)
        if self.exchange is not None and self.exchange.whole:  # it is None if this was the last of an answered one
            self._shared.receiving.pop(self, None)

    def _answer(self, exchange: Exchange) -> None:
        """Run an exchange whose head has arrived."""
        self._expect(None)
        self._shared.receiving[self], self._body_begun = None, self._loop.time()
        start = partial(self._start, exchange)
        if exchange.scope["path"] in PROBES:
            start()
        else:
            self._shared.requests.call(self._loop, start)

    def _start(self, exchange: Exchange) -> None:
        task = self._loop.create_task(self._run(exchange))
        self._server.tasks.add(task)
        task.add_done_callback(self._server.tasks.discard)

    async def _run(self, exchange: Exchange) -> None:
        """Run the application. An incomplete answer closes the connection, so that the client sees it was cut off."""
        try:
            await self._app(exchange.scope, exchange.receive, exchange.send)
        except Exception:
            if not exchange.complete:  # otherwise the application has logged it
                logger.exception("a request was not answered")
        finally:
            if exchange.answering:
                self.close() if self.client_ended else self.refuse(internal())

    @property
    def is_slow(self) -> bool:
        """Whether its body has been coming for a while."""
        return self in self._shared.receiving and self._loop.time() - self._body_begun > PATIENT_SECONDS

    def answered(self, exchange: Exchange) -> None:
        """The answer is complete: continue with the next request, or close. The rest of an incomplete body comes first:
        this is called again after it."""
        last = exchange.last or self.stopping
        if self.client_ended or (last and exchange.whole):
            self.transport.close()
        elif last:
            self.leave()
        elif not exchange.whole:
            self._expect(REST_SECONDS)
            self.regulate()
        else:
            self.exchange = None
            self._expect(self._shared.keep_alive_seconds)
            self._feed(exchange.unparsed)

    def regulate(self) -> None:
        """Read unless enough input is waiting. The kernel then slows the client down."""
        exchange = None if self._leaving else self.exchange
        enough = exchange is not None and (exchange.behind or len(exchange.body) > BODY_BYTES)
        wanted = not (enough or self._resting)
        if wanted != self._reading and not self.client_ended and not self.transport.is_closing():
            self._reading = wanted
            (self.transport.resume_reading if wanted else self.transport.pause_reading)()

    def eof_received(self) -> bool:
        """The client sends nothing more. During a request this counts as a disconnect, as in nginx and Go: whether the
        client still reads is unknown. The handler is notified, and its answer is still sent."""
        self.client_ended = True
        if self.answering is None:
            return False
        self.answering.leave()
        return True

    def refuse(self, error: ApiError) -> None:
        """Send the error for a malformed or oversized request, if still possible, and close."""
        log_refusal("-", "-", error.status, error.code)
        if error.reason:
            self._shared.observe(Rejected(error.reason))
        if (self.exchange or Exchange(self)).fail(error):
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
