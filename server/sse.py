"""Server-sent events: framing and keeping alive (WHATWG HTML, section 9.2)."""

import asyncio
import time

from starlette.types import Message, Send

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
"""A comment, which clients skip."""
MEDIA_TYPE = "text/event-stream"
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
"""The second keeps nginx from holding events back."""


def event(json: bytes) -> bytes:
    """One event. `json` holds no line break: JSON text escapes them."""
    return b"data: " + json + b"\n\n"


class Pinged:
    """Sends a stream's ASGI messages and, wherever there would be silence for `patience` seconds, a comment: a proxy
    would take the stream for dead."""

    def __init__(self, send: Send, patience: float) -> None:
        self._send = send
        self._patience = patience
        self._sent_at = time.monotonic()
        self._sending = False  # or waiting for the client to read

    async def send(self, message: Message) -> None:
        self._sending = True
        await self._send(message)
        self._sending = False
        self._sent_at = time.monotonic()

    async def ping(self) -> None:
        """Goes on until it is cancelled."""
        while True:
            await asyncio.sleep(self._sent_at + self._patience - time.monotonic())
            if self._sending:
                self._sent_at = time.monotonic()
            elif time.monotonic() >= self._sent_at + self._patience:
                await self.send({"type": "http.response.body", "body": PING, "more_body": True})
