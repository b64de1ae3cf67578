"""One client's connection: uvicorn's, with bounds on what it may send and on how long it may take. Event loop only.

uvicorn waits for ever for a request's first lines, for the rest of a body that was refused, and for a client that
reads nothing.
"""

import asyncio
import socket
from typing import Any

from httptools import HttpParserError
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.errors import ApiError

HEAD_BYTES = 65_536
"""Most bytes of a request's line and headers (h11's limit)."""

HEAD_SECONDS = 10.0
"""How long a request's line and headers may take, from the connection or the first byte on."""

REST_SECONDS = 5.0
"""How long what is left of a body may take that was answered before it was all here (nginx's lingering_timeout)."""

SEND_BYTES = 65_536
"""What the kernel keeps for a client that does not read: some 300 tokens of a stream. Left alone it takes megabytes."""


class Connection(HttpToolsProtocol):
    """See the module. `send_seconds`: how long a client may take nothing of what waits for it."""

    send_seconds = 30.0

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head: int | None = None  # bytes of the request's head so far; None between requests and in a body
        self._receiving: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None
        self._leaving = False

    # Receiving

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._receive_within(HEAD_SECONDS)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = 0
        self._receive_within(HEAD_SECONDS)

    def data_received(self, data: bytes) -> None:
        if self._leaving:
            return
        super().data_received(data)
        if self._head is not None and not self._leaving and not self.transport.is_closing():
            self._head += len(data)
            if self._head > HEAD_BYTES:
                self.send_400_response("")

    def on_headers_complete(self) -> None:
        self._head = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if self._head > HEAD_BYTES:
            raise HttpParserError  # which the caller answers through `send_400_response`
        self._head = None
        self._received()
        super().on_headers_complete()
        self.cycle.transport = Lingering(self)  # type: ignore[assignment]  # all of it that a cycle uses

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body:
            self._receive_within(REST_SECONDS)
        if self.transport.get_write_buffer_size():
            self._watch_sending()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._received()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP request, or has too large a head, in OpenAI's shape, and close."""
        if self._head is not None and self._head > HEAD_BYTES:
            self._refuse("431 Request Header Fields Too Large", "The request's headers are too large.")
        else:
            self._refuse("400 Bad Request", "This is not a request in HTTP/1.1.")

    def _refuse(self, status: str, message: str) -> None:
        body = ApiError(int(status[:3]), message).body()
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.leave()

    def leave(self) -> None:
        """Close, once the client has. One in the midst of sending would lose the answer with a connection that is
        closed at once (RFC 9112, section 9.6)."""
        if not self._leaving and not self.transport.is_closing():
            self._leaving = True
            self.transport.write_eof()
            self._receive_within(REST_SECONDS)

    def _receive_within(self, seconds: float) -> None:
        self._received()
        # Not before an answer that is on its way is out.
        self._receiving = self.loop.call_later(seconds, self.shutdown)

    def _received(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()

    # Sending

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_sending()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._sent()
        if self.cycle is not None and self.cycle.response_complete:
            self._watch_sending()  # nothing more is written, but the rest must be taken too

    def _watch_sending(self) -> None:
        """Break the connection off, and with it the answer, unless the client takes something of it in time."""
        self._sent()
        waiting = self.transport.get_write_buffer_size()
        self._sending = self.loop.call_later(self.send_seconds, self._check_sending, waiting)

    def _check_sending(self, before: int) -> None:
        waiting = self.transport.get_write_buffer_size()
        if waiting >= before:
            self.transport.abort()
        elif waiting:
            self._watch_sending()

    def _sent(self) -> None:
        if self._sending is not None:
            self._sending.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._received()
        self._sent()
        super().connection_lost(exc)


class Lingering:
    """What uvicorn writes an answer to: a connection's transport, but one that lingers where not all was received."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.write = connection.transport.write
        self.is_closing = connection.transport.is_closing

    def close(self) -> None:
        if self._connection.cycle.more_body:
            self._connection.leave()
        else:
            self._connection.transport.close()


def listener(host: str, port: int) -> socket.socket:
    """Listens there, for connections with bounded buffers. Raises OSError."""
    found = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)  # which accepted ones inherit
    return found


def connections(send_seconds: float) -> type[Connection]:
    """The class of connections whose clients may take nothing for so long."""
    return type("Connection", (Connection,), {"send_seconds": send_seconds})
