"""Clients that send without end: what each can make the process hold is bounded, and everybody else is served."""

import asyncio
import contextlib
import gc
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator

import orjson
import psutil  # type: ignore[import-untyped]
import pytest
import uvloop

import server.http.connection
import server.http.request
from tests.faults.test_framing import chunked, read_all
from tests.live import PATIENCE, QUESTION, Live, eventually, live, raw_request, scripted

NewLoop = Callable[[], asyncio.AbstractEventLoop]

MIB = 2**20
FLOOD = 32 * MIB
SLACK = 16 * MIB
"""What a process may grow by and shrink by without a reason: allocators keep what they had."""

CHAT = orjson.dumps({"messages": QUESTION})
LARGE = orjson.dumps({"messages": [{"role": "user", "content": " " * MIB}], "max_tokens": 1})
OPEN = chunked(CHAT).removesuffix(b"0\r\n\r\n")
"""A chat in chunks, the last of which has not come."""


@pytest.fixture(scope="module", autouse=True)
def frozen() -> Iterator[None]:
    """What was imported is left out of each collection, which takes a quarter of a second with it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def memory() -> int:
    gc.collect()
    return int(psutil.Process(os.getpid()).memory_info().rss)


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def new_loop(request: pytest.FixtureRequest) -> NewLoop:
    """Each kind of event loop: what a transport does is its own."""
    made: NewLoop = request.param
    return made


@pytest.fixture(autouse=True)
def no_traceback(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert [record for record in caplog.records if record.exc_info or record.levelname in ("ERROR", "CRITICAL")] == []


# Within one request

WITHOUT_END: dict[str, tuple[bytes, bytes]] = {
    "trailers": (OPEN + b"0\r\n", b"aN:bb\r\n" * 4096),
    "one trailer": (OPEN + b"0\r\na:", b"b" * 32_768),
    "a chunk's size": (OPEN, b"0" * 32_768),
    "what a chunk says of itself": (OPEN + b"5;a=", b"b" * 32_768),
    "what chunks say of themselves": (OPEN, (b"1;" + b"b" * 1000 + b"\r\nx\r\n") * 32),
    "the smallest chunks": (OPEN, b"1\r\nx\r\n" * 4096),
    "short headers": (b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n", b"a:b\n" * 4000 + b"\r\n"),
    "short trailers": (OPEN + b"0\r\n", b"a:b\n" * 2000),
    "headers": (b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n", b"aN:bb\r\n" * 4096),
    "a header": (b"GET /health/live HTTP/1.1\r\nHost: localhost\r\na:", b"b" * 32_768),
    "a path": (b"GET /", b"b" * 32_768),
    "a method": (b"", b"B" * 32_768),
}


@pytest.mark.parametrize("what", WITHOUT_END)
def test_what_has_no_end_is_refused_and_not_kept(what: str, new_loop: NewLoop) -> None:
    first, more = WITHOUT_END[what]
    with live(new_loop=new_loop) as service, service.connect() as bare:
        before = memory()
        bare.sendall(first)
        with contextlib.suppress(ConnectionError):
            for _ in range(FLOOD // len(more)):
                bare.sendall(more)
        assert memory() - before < SLACK
        assert read_all(bare)[:12] in (b"HTTP/1.1 431", b"HTTP/1.1 400")
        assert service.chat().status_code == 200
        assert len(service.ended()) == 1


def test_empty_lines_without_end_are_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.http.connection, "HEAD_SECONDS", 0.5)
    with live() as service, service.connect() as bare:
        before = memory()
        with contextlib.suppress(ConnectionError):
            while True:
                bare.sendall(b"\r\n" * 16_384)
        assert memory() - before < SLACK
        assert service.chat().status_code == 200


def test_the_smallest_chunks_of_a_small_body_are_a_body() -> None:
    with live() as service:
        answer = service.post(bytes([byte]) for byte in CHAT)
        assert answer.status_code == 200


@pytest.mark.parametrize("size", [1, 5, 20])
def test_small_chunks_that_come_together_are_a_body(size: int, new_loop: NewLoop) -> None:
    body = orjson.dumps({"messages": [{"role": "user", "content": "x" * (2000 + 200 * size)}]})
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    with live(scripted(context_window=20_000), new_loop=new_loop) as service, service.connect() as bare:
        bare.sendall(chunked(*parts, head=b"Connection: close\r\n"))
        assert read_all(bare).startswith(b"HTTP/1.1 200")


# Requests behind each other


def test_requests_without_end_are_answered_one_at_a_time() -> None:
    asked = 4000
    sent = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n" * (asked - 1)
    sent += b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with live() as service, service.connect() as bare:
        before = memory()
        sender = threading.Thread(target=bare.sendall, args=(sent,))
        sender.start()
        answers = read_all(bare)
        sender.join()
        assert answers.count(b"HTTP/1.1 200") == asked
        assert memory() - before < SLACK


def test_requests_behind_one_that_waits_are_not_read(new_loop: NewLoop) -> None:
    more = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000
    with live(scripted(stepped=True), new_loop=new_loop) as service, service.connect() as bare:
        before = memory()
        bare.sendall(raw_request(CHAT))
        service.wait_running()
        bare.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            for _ in range(FLOOD // len(more)):
                bare.sendall(more)
            pytest.fail("all of it was taken")
        assert memory() - before < SLACK
        [exchange] = [one.answering for one in service.connections if one.answering]
        assert len(exchange.unparsed) < 3 * server.http.connection.READ_BYTES
        service.engine.release(100)
        bare.settimeout(PATIENCE)
        assert bare.recv(12) == b"HTTP/1.1 200"


# Bodies


def half_bodies(service: Live, stack: contextlib.ExitStack, count: int) -> list[socket.socket]:
    """So many clients, each of which has sent all of a large body but its last byte."""
    found = []
    for _ in range(count):
        bare = stack.enter_context(service.connect())
        with contextlib.suppress(ConnectionError):  # it may be refused meanwhile
            bare.sendall(raw_request(LARGE)[:-1])
        found.append(bare)
    return found


def test_bodies_of_all_requests_have_one_budget() -> None:
    count, budget = 48, 8
    with live(max_bodies_mib=budget) as service:
        for _ in range(2):  # what was taken is given back
            before = memory()
            with contextlib.ExitStack() as stack:
                half = half_bodies(service, stack, count)
                held = int(budget * MIB / (MIB - 2**16))
                eventually(lambda: len(answered(half)) >= count - held, "no more are held than there is room for")  # noqa: B023
                assert {bare.recv(12) for bare in answered(half)} == {b"HTTP/1.1 503"}
                assert memory() - before < budget * MIB + count * 2**17 + SLACK
                full = service.post(LARGE)
                assert (full.status_code, full.headers.get("retry-after")) == (503, "1")
                assert full.json()["error"]["code"] == "service_bodies_full"
                assert service.chat().status_code == 200, "ordinary requests are read whatever others send"
            eventually(lambda: not service.connections, "all have left")
            assert service.post(LARGE).status_code == 400  # longer than the window, which is found out last


def answered(clients: list[socket.socket]) -> list[socket.socket]:
    return select.select(clients, [], [], 0)[0]


# Connections


def test_the_connection_that_is_idle_for_longest_makes_room() -> None:
    with live(max_connections=8) as service, contextlib.ExitStack() as stack:
        kept = stack.enter_context(service.http())
        assert kept.get("/version").status_code == 200
        idle = [stack.enter_context(service.connect()) for _ in range(7)]
        eventually(lambda: len(service.connections) == 8, "all are connected")
        [address] = {one.transport.get_extra_info("peername") for one in service.connections} - {
            bare.getsockname() for bare in idle
        }
        assert kept.get("/version").status_code == 200  # which makes it the last
        assert service.chat().status_code == 200
        assert idle[0].recv(1) == b""
        assert kept.get("/version").status_code == 200
        assert address in {one.transport.get_extra_info("peername") for one in service.connections}


def test_half_a_request_keeps_nobody_out() -> None:
    with live(max_connections=8) as service, contextlib.ExitStack() as stack:
        half = [stack.enter_context(service.connect()) for _ in range(8)]
        for bare in half:
            bare.sendall(b"GET /ver")
        eventually(lambda: len(service.connections) == 8, "all are connected")
        assert service.get("/health/live").status_code == 200
        assert sum(bool(found) for found in answered(half)) == 1, "one of them made room"


def test_where_every_connection_is_being_answered_one_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.http.connection, "LINGERING", 2)
    with live(scripted(stepped=True), max_connections=8) as service, contextlib.ExitStack() as stack:
        busy = [stack.enter_context(service.connect()) for _ in range(8)]
        for bare in busy:
            bare.sendall(raw_request(CHAT))
        eventually(lambda: sum(one.answering is not None for one in service.connections) == 8, "all are being answered")
        refused = [stack.enter_context(service.connect()) for _ in range(2)]
        for bare in refused:
            answer = read_all(bare)
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"retry-after: 1" in answer
            assert b"service_connections_full" in answer
        assert len(service.connections) == 8 + 2
        assert read_all(stack.enter_context(service.connect())).startswith(b"HTTP/1.1 503")
        eventually(lambda: len(service.connections) == 8 + 2, "the first of them lingers no more")
        service.engine.release(1000)
        for bare in busy:
            assert bare.recv(12) == b"HTTP/1.1 200"


def slow_bodies(service: Live, stack: contextlib.ExitStack, key: str) -> list[socket.socket]:
    """As many as connections are allowed, each a byte short of its end."""
    found = [stack.enter_context(service.connect()) for _ in range(8)]
    for bare in found:
        bare.sendall(raw_request(CHAT, f"Authorization: Bearer {key}")[:-1])
    return found


def test_slow_bodies_of_who_has_no_key_keep_nobody_out() -> None:
    with live(max_connections=8, api_keys=("known",)) as service, contextlib.ExitStack() as stack:
        slow = slow_bodies(service, stack, "guessed")
        eventually(lambda: len(answered(slow)) == 8, "all are refused before their bodies are here")
        assert service.get("/health/live").status_code == 200


def test_the_body_that_has_been_coming_for_longest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.http.connection, "PATIENT_SECONDS", -1)
    with live(max_connections=8, api_keys=("known",)) as service, contextlib.ExitStack() as stack:
        slow = slow_bodies(service, stack, "known")
        eventually(lambda: len(receiving(service)) == 8, "all are being read")
        first = receiving(service)[0].transport.get_extra_info("peername")
        slow.sort(key=lambda bare: bare.getsockname() != first)
        assert service.get("/health/live").status_code == 200
        refused = read_all(slow[0])
        assert refused.startswith(b"HTTP/1.1 408")
        assert b"request_timeout" in refused
        assert answered(slow[1:]) == []
        for bare in slow[1:]:
            bare.sendall(CHAT[-1:])
            assert bare.recv(12) == b"HTTP/1.1 200"


def test_bodies_that_have_just_begun_and_whole_ones_make_room_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.http.connection, "PATIENT_SECONDS", PATIENCE)
    with (
        live(scripted(stepped=True), max_connections=8, api_keys=("known",)) as service,
        contextlib.ExitStack() as stack,
    ):
        slow = slow_bodies(service, stack, "known")
        eventually(lambda: len(receiving(service)) == 8, "all are being read")
        assert read_all(stack.enter_context(service.connect())).startswith(b"HTTP/1.1 503")
        monkeypatch.setattr(server.http.connection, "PATIENT_SECONDS", -1)
        for bare in slow:
            bare.sendall(CHAT[-1:])
        eventually(lambda: not receiving(service), "all are being answered")
        refused = read_all(stack.enter_context(service.connect()))
        assert refused.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1" in refused
        service.engine.release(1000)
        assert {bare.recv(12) for bare in slow} == {b"HTTP/1.1 200"}


def receiving(service: Live) -> list[server.http.connection.Connection]:
    """The connections that are sent a body, longest first."""
    return [one for connection in list(service.connections)[:1] for one in connection._shared.receiving]


def test_slow_bodies_of_a_key_hold_their_connections_no_longer_than_a_body_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server.http.request, "READ_SECONDS", 0.1)
    with live(max_connections=8, api_keys=("known",)) as service, contextlib.ExitStack() as stack:
        slow = slow_bodies(service, stack, "known")
        assert {bare.recv(12) for bare in slow} == {b"HTTP/1.1 408"}
        assert service.chat(headers={"authorization": "Bearer known"}).status_code == 200


# Everybody else meanwhile


def test_bodies_of_a_crowd_leave_the_event_loop_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """On uvloop's, which reads up to 32 times from each connection if nothing stops it."""
    sent = raw_request(orjson.dumps({"messages": [{"role": "user", "content": " " * 2**18}], "max_tokens": 1}))
    reads = [0]
    received = server.http.connection.Connection.buffer_updated

    def counted(connection: server.http.connection.Connection, nbytes: int) -> None:
        if not reads[-1]:
            connection._loop.call_soon(lambda: reads.append(0))
        reads[-1] += 1
        received(connection, nbytes)

    monkeypatch.setattr(server.http.connection.Connection, "buffer_updated", counted)
    with live(new_loop=uvloop.new_event_loop) as service, contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(service.connect()) for _ in range(20)]
        for bare in crowd:
            bare.sendall(sent[:1000])
        eventually(lambda: sum(one.answering is not None for one in service.connections) == 20, "all have begun")
        senders = [threading.Thread(target=bare.sendall, args=(sent[1000:],)) for bare in crowd]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        assert {bare.recv(12) for bare in crowd} == {b"HTTP/1.1 400"}  # longer than the window
    assert sum(reads) > 20 * len(sent) / server.http.connection.READ_BYTES - 20
    assert max(reads) <= server.http.connection.READS_A_TURN + len(crowd)


# What a client without a key can make the process hold

CROWD = 200
MOST_BYTES = 128 * 2**10
HEADERS = b"".join(b"a%d:b\r\n" % n for n in range(95))
KEYLESS = {
    "half a head": b"GET / HTTP/1.1\r\nHost: localhost\r\na: " + b"b" * 16_000,
    "half a head of many headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a:b\r\n" * 3000,
    "a head and its body": b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4000000\r\n"
    + HEADERS
    + b"\r\n"
    + b"x" * 100_000,
    "half of trailers": OPEN + b"0\r\n" + b"a:b\r\n" * 3000,
    "answers that it does not read": b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100,
}


@pytest.mark.parametrize("what", KEYLESS)
def test_a_client_without_a_key_holds_little(what: str, new_loop: NewLoop) -> None:
    with live(new_loop=new_loop, api_keys=("known",)) as service, contextlib.ExitStack() as stack:
        service.get("/metrics")
        before = memory()
        for _ in range(CROWD):
            bare = stack.enter_context(service.connect())
            bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            bare.sendall(KEYLESS[what])
        eventually(lambda: service.get("/health/live").status_code == 200, "all was read that is")
        assert memory() - before < CROWD * MOST_BYTES


# What is logged


def test_a_long_path_is_not_logged_whole(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with live() as service:
        assert service.get("/" + "x" * 15_000).status_code == 404
        with service.connect() as bare:
            bare.sendall(b"GET /" + b"x" * 60_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert read_all(bare).startswith(b"HTTP/1.1 431")
    lines = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(lines) == 2
    assert max(map(len, lines)) < 400
