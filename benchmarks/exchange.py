"""One HTTP request on a connection of its own, and what a badly behaved client makes of it."""

import asyncio
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult

import orjson


@dataclass(frozen=True, slots=True)
class Reply:
    """`status` is 0 where the connection was closed without an answer."""

    status: int
    headers: bytes
    body: bytes


def wire(path: str, body: bytes, *headers: str, method: str = "POST") -> bytes:
    """A request's bytes. The connection closes after its answer."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


async def send(url: SplitResult, request: bytes) -> Reply:
    """Send all of it and read the answer to its end. Raises OSError if there is no connection to be had."""
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        writer.write(request)
        return parsed(await reader.read(-1))
    except ConnectionError:
        return Reply(0, b"", b"")
    finally:
        writer.close()


async def post(url: SplitResult, path: str, fields: dict[str, Any]) -> Reply:
    return await send(url, wire(path, orjson.dumps(fields)))


async def get(url: SplitResult, path: str) -> Reply:
    return await send(url, wire(path, b"", method="GET"))


async def leave(url: SplitResult, request: bytes, after: float, *, read: int = 0) -> None:
    """Send it, or a part of a request, read so many bytes of an answer if any come, and leave after `after` seconds."""
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        writer.write(request)
        async with asyncio.timeout(after):
            while read > 0 and (found := await reader.read(read)):
                read -= len(found)
            await asyncio.sleep(after)
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.transport.abort()


def parsed(data: bytes) -> Reply:
    """A response read to the connection's end, chunked or not."""
    head, _, body = data.partition(b"\r\n\r\n")
    if not head:
        return Reply(0, b"", b"")
    status = int(head.split(b" ", 2)[1])
    return Reply(status, head, _joined(body) if b"transfer-encoding: chunked" in head.lower() else body)


def _joined(body: bytes) -> bytes:
    chunks = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size or b"0", 16)
        if not length:
            break
        chunks.append(rest[:length])
        body = rest[length + 2 :]
    return b"".join(chunks)
