"""The baseline: a chat server that answers one request at a time, with one stock `model.generate` call each.

    python -m benchmarks.serial_server --model FOLDER --port 21011

The event loop does HTTP and text. One worker thread runs the model; being one, it is the queue and the lock.
A token reaches the client as soon as it is made; a client that leaves a stream ends its generation.
"""

import argparse
import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import torch
import uvicorn
from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from batching.checkpoint import locate
from batching.model import load

CHUNK = "chat.completion.chunk"
MAX_TOKENS = 512  # where a request names no limit
HALF_A_CHARACTER = "\ufffd"  # what a tokenizer shows for bytes that the next token completes


class Tokens(StoppingCriteria):
    """One answer's tokens, on their way from the worker thread to the event loop."""

    def __init__(self) -> None:
        self.abandoned = False
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Queue[int | Exception | None]()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Called by `generate` after each token, with shape [1, tokens so far]; True stops it."""
        self.send(int(input_ids[0, -1]))
        return torch.tensor([self.abandoned], device=input_ids.device)

    def send(self, news: int | Exception | None) -> None:
        """Hand a token, a failure or the end (None) to the loop."""
        self._loop.call_soon_threadsafe(self._arrived.put_nowait, news)

    async def __aiter__(self) -> AsyncIterator[int]:
        while (news := await self._arrived.get()) is not None:
            if isinstance(news, Exception):
                raise news
            yield news


@dataclass(slots=True)
class Chat:
    """One request and, as they come, the tokens of its answer. `prompt` has the shape [1, tokens]."""

    prompt: Tensor
    max_tokens: int
    temperature: float
    ignore_eos: bool
    stream: bool
    include_usage: bool
    tokens: list[int] = field(default_factory=list)
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def finish_reason(self) -> str:
        """Why the finished answer ended: `generate` stops early for an end-of-text token only."""
        return "length" if len(self.tokens) == self.max_tokens else "stop"

    def usage(self) -> dict[str, int]:
        """True counts of tokens, an end-of-text token included."""
        prompt, answer = self.prompt.shape[1], len(self.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


class SerialServer:
    """One model, one worker thread, and the HTTP handlers over them."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self._model: Any = model
        self._tokenizer: Any = tokenizer
        self._name = name
        self._worker = ThreadPoolExecutor(max_workers=1)

    def app(self) -> Starlette:
        """The routes."""
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/health/ready", self.ready),
            ]
        )

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions; 400 for a body that makes no chat."""
        try:
            chat = self._read(orjson.loads(await request.body()))
        except (AttributeError, KeyError, TypeError, ValueError, TemplateError) as error:
            return JSONResponse({"error": {"message": repr(error), "type": "invalid_request_error"}}, 400)
        if chat.stream:
            return StreamingResponse(self._events(chat), media_type="text/event-stream")
        text = "".join([piece async for piece in self._pieces(chat)])
        message = {"role": "assistant", "content": text}
        body = self._body(chat, "chat.completion", message=message, finish_reason=chat.finish_reason())
        return JSONResponse(body | {"usage": chat.usage()})

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [{"id": self._name, "object": "model"}]})

    async def ready(self, request: Request) -> Response:
        """GET /health/ready: the model is loaded before the port opens."""
        return JSONResponse({"status": "ready"})

    def _read(self, body: dict[str, Any]) -> Chat:
        prompt = self._tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return Chat(
            prompt=prompt["input_ids"],
            max_tokens=int(body.get("max_completion_tokens") or body.get("max_tokens") or MAX_TOKENS),
            temperature=float(body.get("temperature", 1)),
            ignore_eos=bool(body.get("ignore_eos")),
            stream=bool(body.get("stream")),
            include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
        )

    async def _events(self, chat: Chat) -> AsyncIterator[bytes]:
        async for piece in self._pieces(chat):
            delta = {"role": "assistant", "content": piece}
            yield event(self._body(chat, CHUNK, delta=delta, finish_reason=None))
        yield event(self._body(chat, CHUNK, delta={}, finish_reason=chat.finish_reason()))
        if chat.include_usage:
            yield event(self._body(chat, CHUNK) | {"usage": chat.usage()})
        yield b"data: [DONE]\n\n"

    def _body(self, chat: Chat, kind: str, **choice: Any) -> dict[str, Any]:
        head = {"id": chat.id, "object": kind, "created": chat.created, "model": self._name}
        return head | {"choices": [{"index": 0} | choice] if choice else []}

    async def _pieces(self, chat: Chat) -> AsyncGenerator[str, None]:
        """The answer's text, a piece as soon as the tokens so far end on a whole character."""
        arriving, sent = Tokens(), 0
        self._worker.submit(self._generate, chat, arriving)
        try:
            async for token in arriving:
                chat.tokens.append(token)
                text = self._decode(chat)
                if len(text) > sent and not text.endswith(HALF_A_CHARACTER):
                    yield text[sent:]
                    sent = len(text)
            if rest := self._decode(chat)[sent:]:
                yield rest
        finally:
            arriving.abandoned = True

    def _decode(self, chat: Chat) -> str:
        return str(self._tokenizer.decode(chat.tokens, skip_special_tokens=True))

    def _generate(self, chat: Chat, arriving: Tokens) -> None:
        """On the worker thread. An `eos_token_id` of None takes the model's own ends of text away."""
        if arriving.abandoned:
            return
        options: dict[str, Any] = {"do_sample": chat.temperature > 0}
        if chat.temperature > 0:
            options["temperature"] = chat.temperature
        if chat.ignore_eos:
            options["eos_token_id"] = None
        prompt = chat.prompt.to(self._model.device)
        seen = torch.ones_like(prompt)
        limits = {"max_new_tokens": chat.max_tokens, "stopping_criteria": StoppingCriteriaList([arriving])}
        try:
            self._model.generate(prompt, attention_mask=seen, **limits, **options)
            arriving.send(None)
        except Exception as error:
            arriving.send(error)


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


def main() -> None:
    """The command: load, then serve on 127.0.0.1 until interrupted."""
    summary = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serial_server", description=summary)
    parser.add_argument("--model", help="folder, hub id or GGUF file; the demo model if not given")
    parser.add_argument("--name", help="what clients call the model; the folder's name if not given")
    parser.add_argument("--port", type=int, default=21011)
    parser.add_argument("--dtype", default="float32", help="auto, bfloat16, float16 or float32")
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    parser.add_argument("--load-format", choices=["auto", "safetensors", "gguf", "dummy"], default="auto")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "microbatch")
    told = parser.parse_args()
    checkpoint = locate(told.model, told.load_format, told.cache_dir)
    model = load(checkpoint, device=told.device, dtype=told.dtype, load_format=told.load_format)
    name = told.name or Path(checkpoint).name
    server = SerialServer(model, AutoTokenizer.from_pretrained(checkpoint), name)
    uvicorn.run(server.app(), host="127.0.0.1", port=told.port, access_log=False)


if __name__ == "__main__":
    main()
