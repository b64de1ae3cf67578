"""A model of one connection against the real class: requests, pauses, answers and departures in any order, on a clock
that is moved on by hand. The law: a timer acts on nothing but what it was started for, and on that it does act."""

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, StreamingResponse
from uvicorn import Config
from uvicorn.server import ServerState

from server.http.connection import HEAD_SECONDS, REST_SECONDS, TOO_MANY, Connection, Connections
from tests.live import settings_of

EXAMPLES = int(os.environ.get("TIMERS", "150"))
SEND_SECONDS, KEEP_SECONDS = 30.0, 90.0
TURNS = 12
"""So many turns of the loop settle all that one thing leads to."""


BODIES = {
    "none": b"",
    "a byte": b"x",
    "empty lines": b"\r\n" * 50,
    "requests": b"\r\nGET / HTTP/1.1\r\n\r\n" * 20,
    "large": b"x" * 50_000,
}


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time is moved on by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.faults: list[Any] = []
        self.set_exception_handler(lambda loop, context: self.faults.append(context.get("exception") or context))

    def time(self) -> float:
        return self.now

    def settle(self) -> None:
        async def turns() -> None:
            for _ in range(TURNS):
                await asyncio.sleep(0)

        self.run_until_complete(turns())

    def advance(self, seconds: float) -> None:
        """Let so much time pass, and every timer run at its own."""
        end = self.now + seconds
        while due := [timer.when() for timer in self.timers() if timer.when() <= end]:
            self.now = max(self.now, min(due))
            self.settle()
        self.now = end

    def timers(self) -> list[asyncio.TimerHandle]:
        return [timer for timer in self._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]


class Pipe(asyncio.Transport):
    """A transport as asyncio's are, between the server's protocol and a client whose every move is told."""

    def __init__(self, clock: Clock, protocol: Connection) -> None:
        super().__init__()
        self.received = b""  # by the client
        self.ended = False  # the client has seen the end
        self.stalled: float | None = None  # since when something waits and nothing of it was taken
        self.abort_after: float | None = None  # so long after
        self.on_close: Callable[[], None] = lambda: None
        self._clock, self._protocol = clock, protocol
        self._inbox: deque[bytes] = deque()  # an empty one is the client's end
        self._outbox = b""
        self._client_reads = True
        self._reading = True
        self._paused = self._closing = self._lost = self._eof = False
        protocol.connection_made(self)
        clock.settle()

    # What the client does

    def client_sends(self, data: bytes) -> None:
        self._inbox.append(data)
        self._deliver()
        self._clock.settle()

    def client_ends(self) -> None:
        self.client_sends(b"")

    def client_breaks_off(self) -> None:
        self._outbox = b""
        self._lose(ConnectionResetError())
        self._clock.settle()

    def client_reads(self, size: int | None) -> None:
        """So much and no more; None: whatever comes."""
        self._client_reads = size is None
        self._take(len(self._outbox) if size is None else size)
        self._clock.settle()

    def _take(self, size: int) -> None:
        if not size or not self._outbox:
            return
        self.received += self._outbox[:size]
        self._outbox = self._outbox[size:]
        self.stalled = self._clock.now if self._outbox else None
        if self._paused and len(self._outbox) <= self._high // 4:
            self._paused = False
            self._protocol.resume_writing()
        if not self._outbox:
            self.ended = self.ended or self._eof or self._closing
            if self._closing:
                self._lose(None)

    def _deliver(self) -> None:
        while self._inbox and self._reading and not self._closing:
            data = self._inbox.popleft()
            buffer = self._protocol.get_buffer(-1)
            if not data:
                if not self._protocol.eof_received():
                    self.close()
                return
            part, rest = data[: len(buffer)], data[len(buffer) :]
            if rest:
                self._inbox.appendleft(rest)
            buffer[: len(part)] = part
            self._protocol.buffer_updated(len(part))

    def _lose(self, error: Exception | None) -> None:
        self._closing = True
        if not self._lost:
            self._lost = True
            self._clock.call_soon(self._protocol.connection_lost, error)

    # asyncio.Transport

    @property
    def over(self) -> bool:
        return self._closing

    def write(self, data: Any) -> None:
        assert not self._eof, "nothing is written after the end"
        if self._closing:
            return
        if not self._outbox:
            self.stalled = self._clock.now
        self._outbox += bytes(data)
        if self._client_reads:
            self._take(len(self._outbox))
        elif len(self._outbox) > self._high and not self._paused:
            self._paused = True
            self._protocol.pause_writing()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = high or 65_536

    def get_write_buffer_size(self) -> int:
        return len(self._outbox)

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        self._clock.call_soon(self._deliver)

    def write_eof(self) -> None:
        self._eof = True
        self.ended = self.ended or not self._outbox

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if self._closing:
            return
        self.on_close()
        self._closing = True
        if not self._outbox:
            self.ended = True
            self._lose(None)

    def abort(self) -> None:
        assert self.stalled is not None, "nothing waited"
        self.abort_after = self._clock.now - self.stalled
        self._outbox = b""
        self._lose(None)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


@dataclass
class Asked:
    """One request as the client sent it."""

    number: int
    size: int
    streamed: bool
    reads: bool  # the application reads its body before it answers
    closes: bool  # the client wants the connection closed after it
    wire: bytes
    head: int  # bytes of it up to the body

    @property
    def answer(self) -> bytes:
        return (b"%d " % self.number) * (self.size + 1)


class OneConnection:
    """The model keeps what was sent, and when the last thing happened that a timer may count from. Moves that are not
    possible are not made; a client whose connection is over opens another."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.connect()

    def connect(self) -> None:
        self.asked: list[Asked] = []
        self.arrived = 0  # bytes that the client sent, of all that it asked
        self.answered = 0  # requests
        self.since = self.clock.now  # of the last answer, the connection's start, or the first byte since
        self.left = False
        self.closed: str | None = None
        self.gate = asyncio.Semaphore(0)
        self.pipe = Pipe(self.clock, self.clock.run_until_complete(self.made()))
        self.pipe.on_close = self.note_close

    async def made(self) -> Connection:
        shared = Connections(settings_of(send_timeout_s=SEND_SECONDS, keep_alive_s=KEEP_SECONDS))
        config = Config(self.app, interface="asgi3", lifespan="off", log_config=None, proxy_headers=False)
        config.load()
        return shared(config, ServerState(), {})

    def close(self) -> None:
        for task in asyncio.all_tasks(self.clock):
            task.cancel()
        self.clock.settle()
        self.clock.close()

    # The application

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        one = self.asked[self.answered]
        assert scope["path"] == f"/{one.number}"
        if one.reads:
            with contextlib.suppress(ClientDisconnect):
                await Request(scope, receive).body()
        await self.gate.acquire()
        parts = (one.answer[start : start + 5000] for start in range(0, len(one.answer), 5000))

        async def content() -> Any:
            for part in parts:
                yield part

        async def told(message: Any) -> None:
            await send(message)  # which takes until the last of it is on its way
            if message["type"] == "http.response.body" and not message.get("more_body"):
                self.answered += 1
                self.since = self.clock.now

        response = StreamingResponse(content()) if one.streamed else PlainTextResponse(one.answer)
        await response(scope, receive, told)

    # What the model knows

    @property
    def ends(self) -> list[int]:
        """Where each request ends in all that the client sends."""
        found, end = [], 0
        for one in self.asked:
            end += len(one.wire)
            found.append(end)
        return found

    @property
    def busy(self) -> bool:
        """A request is with the application: its head is here, and its answer is not."""
        if self.answered == len(self.asked):
            return False
        one = self.asked[self.answered]
        return self.arrived >= self.ends[self.answered] - len(one.wire) + one.head

    @property
    def limit(self) -> float | None:
        """How long the client may send nothing more as things are; None: for ever."""
        if self.busy:
            return None
        start = self.ends[self.answered - 1] if self.answered else 0
        if self.arrived < start:
            return REST_SECONDS
        return HEAD_SECONDS if self.arrived > start or not self.answered else KEEP_SECONDS

    def note_close(self) -> None:
        """Whether the server may close now."""
        limit = self.limit
        last = self.answered > 0 and self.asked[self.answered - 1].closes
        late = limit is not None and self.clock.now - self.since >= limit
        self.closed = "left" if self.left else "asked to" if last else "late" if late else None
        assert self.closed, f"closed after {self.clock.now - self.since} s, where {limit} s were allowed"

    # What happens

    def move(self, name: str, *arguments: Any) -> None:
        getattr(self, name)(*arguments)
        self.check()
        if self.pipe.over:
            self.finish()
            self.connect()

    @property
    def may_ask(self) -> bool:
        return not self.left and self.whole and not any(one.closes for one in self.asked)

    @property
    def whole(self) -> bool:
        return self.arrived == (self.ends or [0])[-1]

    def ask(self, size: int, body: str, streamed: bool, closes: bool = False) -> None:
        self.begin_to_ask(1.0, size, body, streamed, True, closes)

    def converse(self, size: int, body: str, streamed: bool, taken: str) -> None:
        """A request and its answer, which the client takes at once, a little later, or not at all."""
        self.read(None if taken == "at once" else 0)
        self.ask(size, body, streamed)
        self.answer()
        self.read(0 if taken == "not at all" else None)

    def be_answered_too_early(self, share: float, size: int, body: str, closes: bool) -> None:
        self.begin_to_ask(share, size, body, False, False, closes)
        self.answer()

    def begin_to_ask(
        self, share: float, size: int, body: str, streamed: bool, reads: bool, closes: bool = False
    ) -> None:
        if not self.may_ask:
            return
        number, content = len(self.asked), BODIES[body]
        head = f"POST /{number} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
        head += "Connection: close\r\n\r\n" if closes else "\r\n"
        wire = head.encode() + content
        self.asked.append(Asked(number, size, streamed, reads, closes, wire, len(head)))
        self.send_more(share)

    def send_more(self, share: float) -> None:
        if self.left or self.whole:
            return
        size = max(1, int(share * (self.ends[-1] - self.arrived)))
        wire = b"".join(one.wire for one in self.asked)[self.arrived : self.arrived + size]
        start = self.ends[self.answered - 1] if self.answered else 0
        if self.arrived <= start < self.arrived + size:
            self.since = self.clock.now
        self.arrived += size
        self.pipe.client_sends(wire)

    def answer(self) -> None:
        self.gate.release()
        self.clock.settle()

    def read(self, size: int | None) -> None:
        self.pipe.client_reads(size)

    def trickle(self, times: int, size: int) -> None:
        """The client takes a little, now and then."""
        for _ in range(times):
            if self.pipe.stalled is not None:
                self.clock.advance(0.3 * SEND_SECONDS)
                self.pipe.client_reads(size)

    def wait(self, share: float) -> None:
        """A part of the time that the client may say nothing, or take nothing."""
        waits = self.busy or self.pipe.stalled is not None
        self.clock.advance(share * (SEND_SECONDS if waits else self.limit or KEEP_SECONDS))

    def leave(self, breaks_off: bool) -> None:
        if len(self.asked) < 3:  # too soon to say anything about
            return
        self.left = True
        if breaks_off:
            self.pipe.client_breaks_off()
        else:
            self.pipe.client_ends()

    # The laws

    def check(self) -> None:
        assert self.clock.faults == []
        if self.pipe.abort_after is not None:
            assert self.pipe.abort_after >= SEND_SECONDS, "who is broken off took nothing for as long as allowed"
        elif self.pipe.stalled is not None and not self.left:
            assert self.clock.now - self.pipe.stalled < 2 * SEND_SECONDS, "who takes nothing is broken off"
        if not self.pipe.over and self.limit is not None:
            assert self.clock.now - self.since < self.limit, "who sends nothing is closed"
        if self.pipe.over and not self.pipe.get_write_buffer_size():
            assert self.clock.timers() == [], "a connection that is over leaves no timer"

    def finish(self) -> None:
        """Who stays and reads gets all answers to all that it asked, whole and in order."""
        self.pipe.client_reads(None)
        for _ in range(len(self.asked) + 1):
            self.gate.release()
            self.clock.settle()
        expected = self.asked[: sum(end <= self.arrived for end in self.ends)]
        complete = not self.left and self.pipe.abort_after is None and self.closed in (None, "asked to")
        assert self.clock.faults == []
        found = answers_in(self.pipe.received)
        assert found == [one.answer for one in self.asked[: len(found)]]
        assert len(found) >= len(expected) or not complete


def answers_in(received: bytes) -> list[bytes]:
    """The bodies of the whole answers that a client received; what follows them is a part of one more."""
    found: list[bytes] = []
    while received:
        reader = h11.Connection(h11.CLIENT)
        reader.send(h11.Request(method="POST", target="/", headers=[("host", "x")]))
        reader.send(h11.EndOfMessage())
        reader.receive_data(received)
        body = b""
        while not isinstance(event := reader.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                return found
            body += event.data if isinstance(event, h11.Data) else b""
        found.append(body)
        received = reader.trailing_data[0]
    return found


def moves() -> st.SearchStrategy[tuple[Any, ...]]:
    sizes = st.sampled_from([0, 100, 30_000, 60_000, 200_000])
    bodies = st.sampled_from(list(BODIES))
    shares, either = st.floats(0, 1), st.booleans()
    seldom = st.sampled_from([False, False, False, True])
    return st.one_of(
        st.tuples(st.just("ask"), sizes, bodies, either, seldom),
        st.tuples(st.just("converse"), sizes, bodies, either, st.sampled_from(["at once", "later", "not at all"])),
        st.tuples(st.just("be_answered_too_early"), shares, sizes, bodies, seldom),
        st.tuples(st.just("begin_to_ask"), shares, sizes, bodies, either, either),
        st.tuples(st.just("send_more"), shares),
        st.tuples(st.just("answer")),
        st.tuples(st.just("read"), st.sampled_from([0, 1, 1000, 70_000, None])),
        st.tuples(st.just("trickle"), st.integers(1, 6), st.sampled_from([1, 3000])),
        st.tuples(st.just("wait"), st.sampled_from([0.1, 0.3, 0.5, 0.9, 1.0, 2.0])),
        st.tuples(st.just("leave"), either),
    )


@settings(max_examples=EXAMPLES)
@given(st.lists(moves(), min_size=10, max_size=60))
def test_a_timer_acts_on_nothing_but_what_it_was_started_for(made: list[tuple[Any, ...]]) -> None:
    one = OneConnection()
    try:
        for move in made:
            one.move(*move)
        one.finish()
    finally:
        one.close()


@pytest.mark.parametrize("size", [0, 200_000])
def test_an_answer_s_timer_does_not_end_the_request_after_it(size: int) -> None:
    """Once broken off in the midst of a good request: an answer of more than 64 KiB, taken at once, then a long one."""
    one = OneConnection()
    one.converse(size, "none", False, "later")
    one.ask(0, "none", False)
    one.wait(31.0)
    assert one.pipe.abort_after is None
    one.finish()
    one.close()


def test_who_is_refused_and_goes_on_sending_gets_no_more_time() -> None:
    one = OneConnection()
    one.pipe.on_close = lambda: None  # the model knows of no refusals
    one.pipe._protocol.refuse(TOO_MANY)
    for _ in range(2):
        assert not one.pipe.over
        one.pipe.client_sends(b"GET / HTTP/1.1\r\n")
        one.clock.advance(0.6 * REST_SECONDS)
    assert one.pipe.over
    assert one.pipe.received.startswith(b"HTTP/1.1 503 ")
    one.close()


def test_who_takes_a_little_and_then_nothing_is_broken_off() -> None:
    one = OneConnection()
    one.converse(200_000, "none", False, "not at all")
    one.trickle(1, 3000)
    for _ in range(3):
        one.clock.advance(SEND_SECONDS)
    assert one.pipe.abort_after is not None
    one.close()
