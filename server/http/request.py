"""Reads a request's body, bounded in size (before and after decompression) and time."""

import asyncio
import zlib
from codecs import BOM_UTF8
from collections.abc import AsyncIterator

import anyio
from starlette.requests import Request

from server.http.errors import ApiError, bad_request

READ_SECONDS = 30.0

PIECE_BYTES = 65_536
"""Bytes decompressed at a time: a fraction of a millisecond."""

GZIP_OR_ZLIB = zlib.MAX_WBITS | 32
"""The window bits that let zlib detect which of the two it is."""


def check_content_type(value: str) -> None:
    """Raises `ApiError` 415 unless the type is JSON: forms of any web page can send other types without a preflight."""
    kind = value.partition(";")[0].strip().lower()
    if kind and not (kind in ("application/json", "text/json") or kind.endswith("+json")):
        message = "The body must be JSON; send it with the header content-type: application/json."
        raise ApiError(415, message, code="unsupported_content_type")


async def read_body(request: Request, limit: int) -> bytes:
    """The body without a byte order mark, of at most `limit` bytes before and after decompression.

    Raises `ApiError`: 413 as soon as it is longer, 408 on a timeout, 415 or 400 if it cannot be decompressed, 503 if
    the bodies of all requests together take too much (`BodyBudget`).
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    arriving = _bounded(request.stream(), limit)
    chunks = []
    try:
        with anyio.fail_after(READ_SECONDS):
            async for chunk in _bounded(_decompressed(arriving), limit) if _compressed(request) else arriving:
                request.state.body_part.take(len(chunk))
                chunks.append(chunk)
    except TimeoutError:
        raise ApiError(408, "Timed out reading the request body.", code="request_timeout") from None
    return b"".join(chunks).removeprefix(BOM_UTF8)


async def _bounded(chunks: AsyncIterator[bytes], limit: int) -> AsyncIterator[bytes]:
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        yield chunk


def _compressed(request: Request) -> bool:
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("gzip", "x-gzip", "deflate", "identity", ""):
        raise ApiError(
            415,
            "The content-encoding of the body is not supported; use gzip, deflate or none.",
            code="unsupported_encoding",
            headers={"accept-encoding": "gzip, deflate"},
        )
    return coding not in ("identity", "")


async def _decompressed(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The decompressed body in pieces, yielding to the event loop between them."""
    decompressor = zlib.decompressobj(GZIP_OR_ZLIB)
    async for chunk in chunks:
        if chunk and decompressor.eof:
            raise _corrupt()
        full = True  # after a full piece the decompressor may hold more output, even if it took the whole chunk
        while (chunk or full) and not decompressor.eof:
            yield (piece := _decompress(decompressor, chunk))
            chunk, full = decompressor.unconsumed_tail, len(piece) == PIECE_BYTES
            await asyncio.sleep(0)
    if decompressor.unused_data or not decompressor.eof:
        raise _corrupt()


def _decompress(decompressor: "zlib._Decompress", chunk: bytes) -> bytes:
    try:
        return decompressor.decompress(chunk, PIECE_BYTES)
    except zlib.error:
        raise _corrupt() from None


def _corrupt() -> ApiError:
    return bad_request("The body could not be decompressed as its content-encoding says.", code="corrupt_body")


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body is larger than the {limit / 2**20:.3g} MiB allowed.", code="body_too_large")
