"""Clients whose connections are at fault: half a request, too large a head, a body that trickles, nothing read."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import orjson
import psutil  # type: ignore[import-untyped]
import pytest
from starlette.types import Receive, Scope, Send

import server.app
import server.http.connection
import server.http.middleware
import server.http.request
from batching.events import Outcome
from batching.types import Request
from server.http.connection import Connection
from server.http.errors import ApiError
from server.http.exchange import HEAD_BYTES, PIECE_BYTES, Exchange
from tests.live import PATIENCE, QUESTION, Live, eventually, live, raw_request, scripted, tokens_of

CROWD = 1000
HALVES = [
    b"P",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConte",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
]
HUGE = 10**6
TOKENIZE = orjson.dumps({"prompt": "a" * 200_000})
[CONTROL] = tokens_of("\x01")


def babble(request: Request, position: int) -> int:
    """Characters that are written as six."""
    return CONTROL


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def read_all(bare: socket.socket) -> bytes:
    """Everything until the server closes the connection, which it does in time or the socket's own limit passes."""
    found = b""
    while data := bare.recv(65536):
        found += data
    return found


def narrow(service: Live) -> socket.socket:
    """A connection of which the kernel buffers little, so that not reading is soon felt."""
    host, port = service.url.removeprefix("http://").split(":")
    bare = socket.socket()
    bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    bare.settimeout(PATIENCE)
    bare.connect((host, int(port)))
    return bare


def wait_alone(service: Live) -> None:
    """Until the server has closed every connection."""
    eventually(lambda: not service.connections, "no connection is left")


# Heads


@pytest.mark.parametrize("half", [b"", HALVES[0], HALVES[1]])
def test_a_request_that_never_gets_to_its_body_is_hung_up_on(half: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.http.connection, "HEAD_SECONDS", 0.1)
    with live() as service, service.connect() as bare:
        bare.sendall(half)
        assert read_all(bare) == b""
        assert service.chat().status_code == 200


def test_a_second_request_has_as_long_for_its_head_as_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.http.connection, "HEAD_SECONDS", 0.1)
    with live() as service, service.connect() as bare:
        bare.sendall(raw_request(orjson.dumps({"messages": QUESTION})) + HALVES[1])
        assert read_all(bare).count(b"HTTP/1.1 200") == 1


def test_an_answer_may_take_longer_than_a_head(monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor) -> None:
    monkeypatch.setattr(server.http.connection, "HEAD_SECONDS", 0.05)
    with live(scripted(stepped=True)) as service, service.connect() as idle:
        answer = pool.submit(service.chat)
        service.wait_running()
        assert read_all(idle) == b""  # so that more than the time for a head has passed
        service.engine.release(100)
        assert answer.result().status_code == 200


HEADS = {
    "one header": b"X-Padding: " + b"x" * HEAD_BYTES,
    "one header without an end": b"X-Padding: " + b"x" * (HEAD_BYTES + 2**19),
    "many headers": b"".join(b"X-%d: y\r\n" % n for n in range(HEAD_BYTES // 6)),
    "a name": b"x" * (HEAD_BYTES + 2**19),
}


@pytest.mark.parametrize("what", HEADS)
@pytest.mark.parametrize("end", [b"\r\n\r\n", b""], ids=["whole", "unfinished"])
def test_a_head_is_bounded(what: str, end: bytes) -> None:
    with live() as service, service.connect() as bare:
        with contextlib.suppress(ConnectionError):  # it may be hung up on before all is sent, or the answer is read
            bare.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + HEADS[what] + end)
            assert read_all(bare)[:12] in (b"HTTP/1.1 431", b"")
        bare.close()
        wait_alone(service)
        assert service.chat().status_code == 200


def test_a_head_just_above_the_bound_is_refused_once_and_one_just_below_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with live() as service:
        refused = service.chat(headers={"x-padding": "x" * HEAD_BYTES})
        assert refused.status_code == 431
        assert refused.json()["error"]["code"] == "headers_too_large"
        assert service.chat(headers={"x-padding": "x" * (HEAD_BYTES - 1000)}).status_code == 200
    assert [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []


def test_what_is_no_http_is_told_so_in_openai_s_shape() -> None:
    with live() as service, service.connect() as bare:
        bare.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        head, _, body = read_all(bare).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 Bad Request")
        assert orjson.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_web_socket_is_an_http_request_like_any_other() -> None:
    upgrade = {
        "connection": "upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "eA==",
    }
    with live() as service, service.http() as client:
        assert client.get("/health/ready").status_code == 200
        assert client.get("/v1/chat/completions", headers=upgrade).status_code == 405
        assert client.get("/health/ready", headers=upgrade).status_code == 200


@pytest.mark.parametrize("half", HALVES)
def test_a_crowd_that_sends_half_a_request_keeps_nobody_out(half: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with live(scripted(stepped=True)) as service, contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(service.connect()) for _ in range(CROWD)]
        for bare in crowd:
            bare.sendall(half)
        eventually(lambda: len(service.connections) >= CROWD, "all are connected")
        service.engine.release(100)
        assert service.chat().status_code == 200
        monkeypatch.setattr(server.http.connection, "HEAD_SECONDS", 0.1)
        stack.close()
        wait_alone(service)
        assert service.chat().status_code == 200


# Bodies


def test_a_body_a_byte_at_a_time_is_put_together() -> None:
    with live() as service, service.connect() as bare:
        bare.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in raw_request(orjson.dumps({"messages": QUESTION}), "Connection: close"):
            bare.sendall(bytes([byte]))
        assert read_all(bare).startswith(b"HTTP/1.1 200")


def test_what_is_left_of_a_refused_body_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.http.request, "READ_SECONDS", 0.05)
    monkeypatch.setattr(server.http.connection, "REST_SECONDS", 0.1)
    with live() as service, service.connect() as bare:
        bare.sendall(raw_request(b"{", length=1000))
        assert bare.recv(65536).startswith(b"HTTP/1.1 408")
        bare.settimeout(0.01)
        with contextlib.suppress(ConnectionError):
            while True:  # a byte now and then keeps no connection
                bare.sendall(b" ")
                with contextlib.suppress(TimeoutError):
                    if bare.recv(1) == b"":
                        break
        wait_alone(service)


@pytest.mark.parametrize("size", [300_000, 20_000_000])
def test_who_is_refused_in_the_midst_of_sending_can_read_why(size: int) -> None:
    """A connection that is closed with something unread in it is reset, and what was sent over it may be lost."""
    with live(max_body_mib=0.1) as service, service.connect() as bare:
        bare.sendall(raw_request(b"x" * size, "Connection: close"))
        answer = read_all(bare)
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"body_too_large" in answer
        bare.close()
        wait_alone(service)


def test_a_refused_body_that_comes_in_time_leaves_the_connection_open() -> None:
    with live(max_body_mib=0.01) as service, service.http() as client:
        assert client.post("/v1/chat/completions", content=b"x" * 100_000).status_code == 413
        assert client.post("/v1/chat/completions", json={"messages": QUESTION}).status_code == 200


# Readers


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("trickle", [False, True], ids=["reads nothing", "reads a byte a time"])
def test_a_client_that_does_not_read_its_answer_is_hung_up_on(stream: bool, trickle: bool) -> None:
    fields = {"messages": QUESTION, "stream": stream, "max_tokens": 8000, "n": 8}
    engine = scripted(babble, context_window=HUGE)
    with live(engine, max_output_tokens=HUGE, send_timeout_s=0.2) as service, narrow(service) as bare:
        bare.sendall(raw_request(orjson.dumps(fields), "Connection: close"))
        eventually(lambda: bool(service.connections), "it is connected")
        while service.connections:
            if trickle:
                bare.recv(1)
        ended = service.wait_ended(8)
        assert {event.outcome for event in ended} <= {Outcome.ANSWERED, Outcome.CANCELLED}
        assert service.chat(max_tokens=1).status_code == 200


def test_the_rows_of_a_client_that_stopped_reading_end() -> None:
    engine = scripted(babble, context_window=HUGE, stepped=True)
    with live(engine, max_output_tokens=HUGE, send_timeout_s=0.2) as service, narrow(service) as bare:
        bare.sendall(raw_request(orjson.dumps({"messages": QUESTION, "stream": True, "max_tokens": HUGE - 100})))
        service.wait_running()
        while not service.ended():
            taken = engine.steps
            engine.release(1000)
            eventually(lambda: engine.steps >= taken + 1000 or bool(service.ended()), "the steps were taken")  # noqa: B023
        [ended] = service.ended()
        assert ended.outcome is Outcome.CANCELLED
        assert ended.output_tokens < HUGE - 100


def test_a_slow_reader_gets_all_of_its_answer() -> None:
    tokens = 40_000
    engine = scripted(babble, context_window=HUGE)
    with live(engine, max_output_tokens=HUGE, send_timeout_s=0.5) as service, narrow(service) as bare:
        fields = {"messages": QUESTION, "max_tokens": tokens, "n": 2}
        bare.sendall(raw_request(orjson.dumps(fields), "Connection: close"))
        service.wait_ended(2)
        found = b""
        while data := bare.recv(4096):
            found += data
        answer = orjson.loads(found.partition(b"\r\n\r\n")[2])
        assert [len(choice["message"]["content"]) for choice in answer["choices"]] == [tokens] * 2


def test_a_large_answer_is_written_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    write = Connection.write

    def noted(connection: Connection, data: bytes) -> None:
        sizes.append(len(data))
        write(connection, data)

    monkeypatch.setattr(Connection, "write", noted)
    with live() as service:
        answer = service.post(orjson.dumps({"prompt": "a" * 200_000}), "/tokenize")
    assert answer.json()["count"] == 200_000
    assert sum(sizes) > 8 * PIECE_BYTES
    assert max(sizes) <= PIECE_BYTES


@dataclass
class Paper:
    """A `Wire` that keeps what is written, and of which little is sent at a time."""

    written: list[bytes] = field(default_factory=list)
    full: bool = False
    default_headers: Any = ()
    stopping: bool = False
    transport: asyncio.BaseTransport = field(default_factory=asyncio.BaseTransport)
    app_state: dict[str, object] = field(default_factory=dict)

    def write(self, data: bytes) -> None:
        self.written.append(data)
        self.full = len(self.written) % 3 == 0

    async def writable(self) -> None:
        await asyncio.sleep(0)
        self.full = False

    def regulate(self) -> None: ...
    def answered(self, exchange: Exchange) -> None: ...
    def refuse(self, error: ApiError) -> None: ...


def test_messages_that_are_sent_at_once_are_not_mixed() -> None:
    """Comments in a long silence, say, and a large frame that ends it."""
    messages = [letter * size for letter, size in ((b"a", 300_000), (b"b", 8), (b"c", 200_000), (b"d", 8))]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        bodies = [{"type": "http.response.body", "body": one, "more_body": True} for one in messages]
        await asyncio.gather(*map(send, bodies))
        await send({"type": "http.response.body"})

    async def main() -> list[bytes]:
        paper = Paper()
        exchange = Exchange(paper)
        exchange.feed(b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await app(exchange.scope, exchange.receive, exchange.send)
        return paper.written[1:-1]  # without the head and the end

    chunks = [chunk.split(b"\r\n")[1] for chunk in asyncio.run(main())]
    assert b"".join(chunks) == b"".join(messages)
    assert max(map(len, chunks)) == PIECE_BYTES


def test_clients_that_do_not_read_cost_bounded_memory() -> None:
    process = psutil.Process(os.getpid())
    fields = {"messages": QUESTION, "stream": True, "max_tokens": 20_000}
    engine = scripted(babble, context_window=HUGE)
    with live(engine, max_output_tokens=HUGE, max_batch_size=64) as service, contextlib.ExitStack() as stack:
        before = process.memory_info().rss
        for _ in range(12):
            bare = stack.enter_context(narrow(service))
            bare.sendall(raw_request(orjson.dumps(fields)))
        service.wait_ended(12)
        # Of each answer, 4.5 MB in frames of a token, there is what its connection buffers, and tokens not asked for.
        assert process.memory_info().rss - before < 24 * 2**20
        assert service.chat(max_tokens=1).status_code == 200


def unread(service: Live, stack: contextlib.ExitStack, key: str) -> socket.socket:
    """A client that asks for a large answer and reads none of it."""
    bare = stack.enter_context(narrow(service))
    bare.sendall(raw_request(TOKENIZE, f"Authorization: Bearer {key}").replace(b"chat/completions", b"tokenize", 1))
    return bare


def test_answers_that_nobody_reads_have_one_budget_and_who_has_the_most_loses_the_oldest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = 3 * 200_000  # a token's id has two or three digits and a comma
    monkeypatch.setattr(server.app, "UNREAD_BYTES", 6 * size)
    monkeypatch.setattr(server.http.middleware, "PATIENT_SECONDS", -1)
    with live(api_keys=("greedy", "modest")) as service, contextlib.ExitStack() as stack:
        modest = unread(service, stack, "modest")
        eventually(lambda: len(service.connections) == 1, "it is there")
        greedy = []
        for _ in range(12):
            greedy.append(unread(service, stack, "greedy"))
            assert greedy[-1].recv(12) == b"HTTP/1.1 200"
        assert modest.recv(12) == b"HTTP/1.1 200"
        for kept in (modest, greedy[-1]):
            whole = json_in(kept)
            assert whole is not None
            assert whole["count"] == 200_000
        broken = [json_in(bare) is None for bare in greedy[:-1]]
        assert broken == sorted(broken, reverse=True), "the oldest go first"
        assert 7 <= sum(broken) <= 10


def json_in(bare: socket.socket) -> Any:
    """What is left of an answer; None if it was broken off."""
    bare.shutdown(socket.SHUT_WR)
    try:
        return orjson.loads(read_all(bare).partition(b"\r\n\r\n")[2])
    except (orjson.JSONDecodeError, ConnectionError):
        return None
