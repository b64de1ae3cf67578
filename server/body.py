"""Reading a request's body: bounded in size while it comes in, and in time."""

import anyio
from starlette.requests import Request

from server.errors import ApiError

READ_SECONDS = 30.0


async def read_body(request: Request, limit: int) -> bytes:
    """The body, of at most `limit` bytes. Raises `ApiError` 413 as soon as it is longer, 408 if it comes too slowly."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    chunks, size = [], 0
    try:
        with anyio.fail_after(READ_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise _too_large(limit)
                chunks.append(chunk)
    except TimeoutError:
        raise ApiError(408, "The request's body came too slowly.", code="request_timeout") from None
    return b"".join(chunks)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body is larger than the {limit / 2**20:.3g} MiB allowed.", code="body_too_large")
