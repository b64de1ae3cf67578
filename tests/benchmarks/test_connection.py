"""Laws of the client's connection, against raw sockets that answer byte for byte as a test says."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import SplitResult

import h11
import pytest

from benchmarks.connection import Connection, Reply, exchange, request, server_url

WITH_LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
IN_CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n"
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\n\r\nok"


Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[SplitResult]:
    """A server that answers one connection as told and then closes it, which the end waits for."""
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer(reader, writer)
        writer.close()
        gone.set()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server_url(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        await gone.wait()


@asynccontextmanager
async def connected(answer: Answer) -> AsyncIterator[Connection]:
    """A connection to such a server; at the end both sides are closed."""
    async with serving(answer) as url:
        connection = await Connection.open(url)
        try:
            yield connection
        finally:
            connection.close()


async def answers(*responses: bytes) -> list[tuple[int, bytes]]:
    """Send one request for each response over one connection; the server closes it after the last."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for response in responses:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(response)

    async with connected(answer) as connection:
        return [await ask(connection) for _ in responses]


async def usable_after(response: bytes) -> bool:
    """Whether the client would use the connection again while the server still holds it open."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(response)
        await reader.read()

    async with connected(answer) as connection:
        await ask(connection)
        return connection.usable


async def ask(connection: Connection) -> tuple[int, bytes]:
    pieces: list[bytes] = []
    status = await connection.send(b"POST / HTTP/1.1\r\n\r\n", lambda _, data: pieces.append(data))
    return status, b"".join(pieces)


@pytest.mark.parametrize("response", [WITH_LENGTH, IN_CHUNKS, UNTIL_CLOSED])
def test_a_body_is_whole_however_its_end_is_told(response: bytes) -> None:
    assert asyncio.run(answers(response)) == [(200, b"ok")]


def test_a_connection_carries_one_request_after_the_other() -> None:
    refusal = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"
    assert asyncio.run(answers(IN_CHUNKS, refusal, WITH_LENGTH)) == [(200, b"ok"), (503, b""), (200, b"ok")]


@pytest.mark.parametrize("cut", [0, 10, -1])
@pytest.mark.parametrize("response", [WITH_LENGTH, IN_CHUNKS])
def test_a_response_that_breaks_off_is_a_connection_error(response: bytes, cut: int) -> None:
    with pytest.raises(ConnectionError):
        asyncio.run(answers(IN_CHUNKS, response[:cut]))


def test_what_is_not_http_is_a_connection_error() -> None:
    with pytest.raises(ConnectionError, match="not HTTP"):
        asyncio.run(answers(b"SSH-2.0-OpenSSH\r\n\r\n"))


def test_a_connection_that_the_server_will_close_is_not_used_again() -> None:
    last = WITH_LENGTH.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n")
    assert asyncio.run(usable_after(WITH_LENGTH))
    assert not asyncio.run(usable_after(last))


@pytest.mark.parametrize(("root", "host"), [("http://host:1", b"host:1"), ("http://user@host/api", b"host")])
@pytest.mark.parametrize("body", [b"", b"{}", b"\r\n\r\n"])
def test_a_request_is_read_as_it_was_meant(root: str, host: bytes, body: bytes) -> None:
    server = h11.Connection(h11.SERVER)
    server.receive_data(request(server_url(root), "POST", "/v1/x?y", body, "X-Other: 1"))
    head, *rest = server.next_event(), server.next_event(), server.next_event()
    assert isinstance(head, h11.Request)
    assert head.method == b"POST"
    assert head.target == server_url(root).path.encode() + b"/v1/x?y"
    assert {(b"x-other", b"1"), (b"host", host)} <= set(head.headers)
    assert b"".join(bytes(event.data) for event in rest if isinstance(event, h11.Data)) == body
    assert server.their_state is h11.DONE


def test_one_exchange_is_a_whole_answer_or_an_error() -> None:
    async def main(response: bytes) -> Reply:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(response)

        async with serving(answer) as url:
            return await exchange(url, request(url, "GET", "/"))

    assert asyncio.run(main(IN_CHUNKS)) == Reply(200, b"ok")
    with pytest.raises(ConnectionError):
        asyncio.run(main(IN_CHUNKS[:-3]))


@pytest.mark.parametrize(
    ("text", "root"),
    [
        ("http://host:1", "http://host:1"),
        ("http://host/v1/", "http://host"),
        ("https://host/api/v1", "https://host/api"),
    ],
)
def test_a_url_may_end_with_the_version(text: str, root: str) -> None:
    assert server_url(text).geturl() == root


@pytest.mark.parametrize("text", ["host:80", "127.0.0.1", "ftp://host", "http://"])
def test_what_is_no_url_of_a_server_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not the URL"):
        server_url(text)
