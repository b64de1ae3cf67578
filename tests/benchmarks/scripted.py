"""A chat server that answers as a script says, for tests of the load tools."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


class ScriptedServer:
    """Answers each chat as the script says: one word for each token, or the failure named next.

    It serves `model`, and counts `prompt_tokens` in every prompt, `cached_tokens` of them from its cache.
    """

    def __init__(self, *failures: str, model: str = "tiny", prompt_tokens: int = 7, cached_tokens: int = 0) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.sessions: list[str | None] = []
        self._failures = list(failures)
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._cached_tokens = cached_tokens
        chat = Route("/v1/chat/completions", self.chat, methods=["POST"])
        self.app = Starlette(routes=[chat, Route("/v1/models", self.models)])

    async def models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": self._model}]})

    async def chat(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        self.bodies.append(body)
        self.authorizations.append(request.headers.get("authorization"))
        self.sessions.append(request.headers.get("x-session-id"))
        failure = self._failures.pop(0) if self._failures else ""
        if failure == "500":
            return Response("broken", 500)
        return StreamingResponse(self._events(body["max_tokens"], failure), media_type="text/event-stream")

    async def _events(self, tokens: int, failure: str) -> AsyncIterator[bytes]:
        for _ in range(tokens - (failure == "short")):
            yield frame(choices=[{"index": 0, "delta": {"content": "word "}, "finish_reason": None}])
        match failure:
            case "cut":
                raise ConnectionError("the script says so")
            case "hang":
                await asyncio.Event().wait()
            case "error frame":
                yield frame(error={"message": "out of memory"})
            case "no finish":
                yield b"data: [DONE]\n\n"
            case _:
                yield frame(choices=[{"index": 0, "delta": {}, "finish_reason": "length"}])
                counted = {
                    "prompt_tokens": self._prompt_tokens,
                    "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
                    "completion_tokens": tokens - (failure == "short"),
                }
                yield frame(choices=[], usage=counted)
                yield b"data: [DONE]\n\n"


def frame(**fields: Any) -> bytes:
    return b"data: " + orjson.dumps(fields) + b"\n\n"


@contextmanager
def serving(scripted: ScriptedServer) -> Iterator[str]:
    """The server's URL. The socket listens before the server runs, so no client comes too early."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(scripted.app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
