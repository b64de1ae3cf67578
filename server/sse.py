"""Server-sent events: framing and keep-alive comments (WHATWG HTML, section 9.2)."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping

import orjson
from starlette.types import Send

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
"""A comment, which clients ignore."""
MEDIA_TYPE = "text/event-stream"
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
"""The second header stops nginx from buffering events."""


def event(json: bytes) -> bytes:
    """One event. `json` contains no line breaks, because JSON text escapes them."""
    return b"data: %b\n\n" % json


def framed(events: Iterable[Mapping[str, object]]) -> bytes:
    """Events with types. Each type is sent twice, in the frame and in the JSON."""
    return b"".join(f"event: {each['type']}\n".encode() + event(orjson.dumps(each)) for each in events)


class Pinged:
    """Sends a stream's frames and a comment after every `patience` seconds of silence, so that proxies keep the stream
    open. `write` sends what can be sent at once, and returns whether that was possible."""

    def __init__(self, send: Send, write: Callable[[bytes], bool], patience: float) -> None:
        self._send = send
        self._write = write
        self._patience = patience
        self._sent_at = time.monotonic()
        self._sending = False  # or waiting for the client to read

    async def send(self, frames: bytes) -> None:
        if not self._write(frames):
            self._sending = True
            await self._send({"type": "http.response.body", "body": frames, "more_body": True})
            self._sending = False
        self._sent_at = time.monotonic()

    async def ping(self) -> None:
        """Runs until it is cancelled."""
        while True:
            await asyncio.sleep(self._sent_at + self._patience - time.monotonic())
            if self._sending:
                self._sent_at = time.monotonic()
            elif time.monotonic() >= self._sent_at + self._patience:
                await self.send(PING)
