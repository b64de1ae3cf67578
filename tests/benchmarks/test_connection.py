"""Laws of the client's connection, against raw sockets that answer byte for byte as a test says."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from benchmarks.connection import Connection, server_url

WITH_LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
IN_CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n"
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\n\r\nok"


Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def connected(answer: Answer) -> AsyncIterator[Connection]:
    """A connection to a server that answers as told and then closes; at the end both sides are closed."""
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer(reader, writer)
        writer.close()
        gone.set()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        connection = await Connection.open(server_url(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        try:
            yield connection
        finally:
            connection.close()
            await gone.wait()


async def exchange(*responses: bytes) -> list[tuple[int, bytes]]:
    """Send one request for each response over one connection; the server closes it after the last."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for response in responses:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(response)

    async with connected(answer) as connection:
        return [await request(connection) for _ in responses]


async def usable_after(response: bytes) -> bool:
    """Whether the client would use the connection again while the server still holds it open."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(response)
        await reader.read()

    async with connected(answer) as connection:
        await request(connection)
        return connection.usable


async def request(connection: Connection) -> tuple[int, bytes]:
    pieces: list[bytes] = []
    status = await connection.send(b"POST / HTTP/1.1\r\n\r\n", lambda _, data: pieces.append(data))
    return status, b"".join(pieces)


@pytest.mark.parametrize("response", [WITH_LENGTH, IN_CHUNKS, UNTIL_CLOSED])
def test_a_body_is_whole_however_its_end_is_told(response: bytes) -> None:
    assert asyncio.run(exchange(response)) == [(200, b"ok")]


def test_a_connection_carries_one_request_after_the_other() -> None:
    refusal = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"
    assert asyncio.run(exchange(IN_CHUNKS, refusal, WITH_LENGTH)) == [(200, b"ok"), (503, b""), (200, b"ok")]


@pytest.mark.parametrize("cut", [0, 10, -1])
@pytest.mark.parametrize("response", [WITH_LENGTH, IN_CHUNKS])
def test_a_response_that_breaks_off_is_a_connection_error(response: bytes, cut: int) -> None:
    with pytest.raises(ConnectionError):
        asyncio.run(exchange(IN_CHUNKS, response[:cut]))


def test_what_is_not_http_is_a_connection_error() -> None:
    with pytest.raises(ConnectionError, match="not HTTP"):
        asyncio.run(exchange(b"SSH-2.0-OpenSSH\r\n\r\n"))


def test_a_connection_that_the_server_will_close_is_not_used_again() -> None:
    last = WITH_LENGTH.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n")
    assert asyncio.run(usable_after(WITH_LENGTH))
    assert not asyncio.run(usable_after(last))


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
