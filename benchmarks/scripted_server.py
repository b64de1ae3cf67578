"""The service around an engine that gives all rows the same words at once, and an endpoint with a constant answer.

`benchmarks/http_overhead.py` starts it, one process a measurement. Neither answers beyond its first event before
`POST /go`. `GET /usage` tells what the process has used so far.
"""

import argparse
import asyncio
import contextlib
import itertools
import logging
import os
import queue
import resource
import socket
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal, get_args

import orjson
import psutil  # type: ignore[import-untyped]
import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from batching.engine import Engine, Steps
from batching.events import Event, Stepped
from batching.progress import Progress
from batching.stream import Row
from batching.types import ModelInfo
from benchmarks.words import LANGUAGES
from server import sse
from server.app import create_app
from server.garbage import search_seldom, spare_what_is_loaded
from server.http.connection import Connections
from server.model.defaults import Defaults
from server.model.loader import Loading
from server.model.text import Text
from server.observe.log import configure, log_event
from server.observe.metrics import Metrics
from server.replies import ChatChunk
from server.service import Service
from server.settings import Settings

Mode = Literal["bare", "bare at once", "in step", "at once"]
"""What answers: constant bytes or the service; each token written on its own, or all as fast as they are made."""

MODES: tuple[Mode, ...] = get_args(Mode)
NAME = "scripted"
TICK = 0.01
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
"""As Qwen3's it can think, so that answers are searched for thinking."""


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level vocabulary trained on the words, of which most are one token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([" " + " ".join(LANGUAGES["en"].words)] * 8, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE)


class WordsEngine:
    """`Engine` that says the same tokens in every row. Of each batch it makes one step before `go`.

    With `in_step` a step waits until the event loop has taken the one before, as a model's would have long been. It
    observes the batcher for that.
    """

    def __init__(self, info: ModelInfo, words: Sequence[int], *, in_step: bool) -> None:
        self.info = info
        self.go = threading.Event()
        self._words = words
        self._taken: queue.SimpleQueue[Event] | None = queue.SimpleQueue() if in_step else None

    def __call__(self, event: Event) -> None:
        if self._taken is not None and isinstance(event, Stepped):
            self._taken.put(event)

    def run(self, rows: Sequence[Row], steps: Steps) -> None:
        for step in itertools.count():
            over = steps.emit(rows, [self._words[step % len(self._words)]] * len(rows))
            if all(over):
                return
            if self._taken is not None:
                self._taken.get()
            if step == 0:
                self.go.wait()

    def memory(self) -> int:
        return 0


class ScriptedLoader:
    """`Loader` of the above."""

    def __init__(self, streams: int, tokens: int, mode: Mode) -> None:
        fast = tokenizer()
        window = tokens + 64
        words: list[int] = fast.backend_tokenizer.encode(" " + " ".join(LANGUAGES["en"].words)).ids
        info = ModelInfo(NAME, "none", 0, len(fast), window, streams * window, frozenset())
        self.words = WordsEngine(info, words, in_step=mode == "in step")
        self._fast = fast
        self.loading = Loading("Loading")

    def defaults(self) -> Defaults:
        return Defaults()

    def text(self) -> Text:
        return Text(self._fast)

    def engine(self) -> Engine:
        return self.words


class BareAnswers:
    """Streams of one constant event a token: the least that this way to answer costs."""

    def __init__(self, tokens: int, *, at_once: bool) -> None:
        self.go = asyncio.Event()
        self._tokens = tokens
        self._at_once = at_once
        chunk: ChatChunk = {
            "id": "chatcmpl-0123456789abcdef01234567",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": NAME,
            "system_fingerprint": "fp_0123456789ab",
            "choices": [{"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}],
        }
        self._event = sse.event(orjson.dumps(chunk))

    async def answer(self, request: Request) -> Response:
        await request.body()
        return StreamingResponse(self._events(), media_type=sse.MEDIA_TYPE, headers=sse.HEADERS)

    async def _events(self) -> AsyncIterator[bytes]:
        yield self._event
        await self.go.wait()
        for _ in range(self._tokens - 1):
            yield self._event
            if not self._at_once:
                await asyncio.sleep(0)  # so that the event loop writes it before the next


class Usage:
    """This process's usage. `GET /usage` also ends the interval over which event loop lag is measured."""

    def __init__(self) -> None:
        self._lags: list[float] = []

    async def watch(self) -> None:
        """Record how late the event loop resumes, in seconds; uvloop's clock counts milliseconds."""
        while True:
            before = time.perf_counter()
            await asyncio.sleep(TICK)
            self._lags.append(time.perf_counter() - before - TICK)

    async def answer(self, request: Request) -> Response:
        lags, self._lags = self._lags, []
        told = {
            "cpu": time.process_time(),
            "loop_cpu": time.thread_time(),
            "memory": psutil.Process().memory_info().rss,
            "lags": lags,
        }
        return Response(orjson.dumps(told), media_type="application/json")


class Both:
    """One ASGI application of the service's and the bare one, which share no middleware."""

    def __init__(self, streams: int, tokens: int, mode: Mode) -> None:
        self._loader = ScriptedLoader(streams, tokens, mode)
        self._bare = BareAnswers(tokens, at_once=mode == "bare at once")
        self._usage = Usage()
        progress = Progress()
        metrics = Metrics(progress)
        settings = settings_of(streams, tokens)
        service = Service(settings, self._loader, progress, [metrics, log_event, self._loader.words])
        self._service = create_app(service, metrics, lambda model: spare_what_is_loaded())
        routes = [
            Route("/bare", self._bare.answer, methods=["POST"]),
            Route("/go", self._go, methods=["POST"]),
            Route("/usage", self._usage.answer),
        ]
        self._own = Starlette(routes=routes)
        self._paths = {route.path for route in routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._own if scope.get("path") in self._paths else self._service
        await app(scope, receive, send)

    async def _go(self, request: Request) -> Response:
        self._loader.words.go.set()
        self._bare.go.set()
        self._watching = asyncio.create_task(self._usage.watch())
        return Response()


def settings_of(streams: int, tokens: int) -> Settings:
    """One batch of all streams: more than an operator may ask for, which is not checked in a copy."""
    limits: dict[str, Any] = {
        "max_output_tokens": tokens,
        "default_max_tokens": 1,
        "queue_size": streams,
        "max_connections": streams + 64,
    }
    settings = Settings(name=(NAME,), batch_window_ms=10_000, **limits)
    return settings.model_copy(update={"max_batch_size": streams})


async def serve(streams: int, tokens: int, mode: Mode) -> None:
    """Serve until the process is killed. The port is the one line on standard output."""
    http: Any = Connections(settings_of(streams, tokens))  # called as a class of connections would be
    app = Both(streams, tokens, mode)
    config = uvicorn.Config(app, http=http, log_config=None, access_log=False, server_header=False)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0), backlog=2048)) as listener:
        print(listener.getsockname()[1], flush=True)
        await uvicorn.Server(config).serve([listener])


def raise_open_files() -> None:
    """As many connections as the system lets this process have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scripted_server")
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--mode", choices=MODES, required=True)
    asked = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    configure("text", "warning")
    logging.captureWarnings(True)
    raise_open_files()
    search_seldom()
    uvloop.run(serve(asked.streams, asked.tokens, asked.mode))


if __name__ == "__main__":
    main()
