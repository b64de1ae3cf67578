"""The benchmarks' one HTTP client: a kept-alive HTTP/1.1 connection, as thin as asyncio and a C parser allow.

General HTTP clients cost 1 ms a request and 0.08 ms a chunk: with 64 streams begun at once, the client's own queue
would show as 0.1 s of the server's time to first token. Here a chunk costs 1 us.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, cast
from urllib.parse import SplitResult, urlsplit

import orjson
from httptools import HttpParserError, HttpResponseParser

Receive = Callable[[int, bytes], None]


def server_url(text: str) -> SplitResult:
    """A server's root URL, with or without `/v1`. Raises ValueError unless it is http:// or https://."""
    url = urlsplit(text.rstrip("/").removesuffix("/v1"))
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"{text} is not the URL of a server")
    return url


class Connection(asyncio.Protocol):
    """Carries one request at a time. Made by `open`; `usable` is False once either side has closed it."""

    def __init__(self) -> None:
        self.usable = True
        self._transport: asyncio.Transport
        self._parser = HttpResponseParser(self)
        self._answered: asyncio.Future[int] | None = None
        self._receive: Receive
        self._length_is_told = False
        self._ends_with_connection = False

    @classmethod
    async def open(cls, url: SplitResult) -> Self:
        """Connect to the server. Raises OSError."""
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        secure = True if url.scheme == "https" else None
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, str(url.hostname), port, ssl=secure)
        return connection

    async def send(self, request: bytes, receive: Receive) -> int:
        """Send a whole request and answer its status once the response has ended.

        `receive` is called with the status and each piece of the body as it comes; what it raises is raised here.
        Raises ConnectionError if the response breaks off or is not HTTP.
        """
        self._receive = receive
        self._length_is_told = self._ends_with_connection = False
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answered

    def close(self) -> None:
        """Let go of the socket; safe to repeat."""
        self.usable = False
        self._transport.close()

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except HttpParserError as error:
            self._fail(ConnectionError(f"the response is not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        if self._ends_with_connection and exc is None:
            self._end()
        self._fail(exc or ConnectionError("the server closed the connection before the response ended"))

    # the parser's callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._length_is_told = True

    def on_headers_complete(self) -> None:
        self._ends_with_connection = not self._length_is_told

    def on_body(self, body: bytes) -> None:
        try:
            self._receive(self._status(), body)
        except Exception as error:
            self._fail(error)

    def on_message_complete(self) -> None:
        self.usable = self.usable and self._parser.should_keep_alive()
        self._end()

    def _status(self) -> int:
        return self._parser.get_status_code()

    def _end(self) -> None:
        if self._answered and not self._answered.done():
            self._answered.set_result(self._status())

    def _fail(self, error: Exception) -> None:
        if self._answered and not self._answered.done():
            self._answered.set_exception(error)


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer."""

    status: int
    body: bytes


def request(url: SplitResult, method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    """A request's bytes. Identity: a compressor would hold a stream back."""
    lines = [
        f"{method} {url.path}{path} HTTP/1.1",
        f"Host: {url.netloc.rpartition('@')[2]}",
        "Accept-Encoding: identity",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode() + body


async def exchange(url: SplitResult, message: bytes) -> Reply:
    """Send one request over a connection of its own. Raises OSError, also where the answer breaks off."""
    pieces: list[bytes] = []
    connection = await Connection.open(url)
    try:
        status = await connection.send(message, lambda _, data: pieces.append(data))
    finally:
        connection.close()
    return Reply(status, b"".join(pieces))


async def get(url: SplitResult, path: str) -> Reply:
    """As `exchange`."""
    return await exchange(url, request(url, "GET", path))


async def post(url: SplitResult, path: str, fields: dict[str, Any]) -> Reply:
    """As `exchange`, with a body of JSON."""
    return await exchange(url, request(url, "POST", path, orjson.dumps(fields)))
