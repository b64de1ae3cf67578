"""The JSON of one chat completion, whole or in chunks. All but the text of a chunk is encoded once per answer."""

import secrets
import time
from collections.abc import Mapping
from typing import Any

import orjson

from server import sse

CHUNK_END = b'},"logprobs":null,"finish_reason":null}]}\n\n'


class Completion:
    """Writes the parts of one answer under one id, creation time and model name."""

    def __init__(self, model: str) -> None:
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model = model
        chunk = self._envelope("chat.completion.chunk")[:-1] + b',"choices":[{"index":0,"delta":{'
        self._chunk_start = b"data: " + chunk + b'"content":'
        self._first_start = b"data: " + chunk + b'"role":"assistant","content":'

    def _envelope(self, kind: str, **fields: Any) -> bytes:
        head = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return orjson.dumps(head | fields)

    def whole(self, content: str, finish: str | None, usage: Mapping[str, int]) -> bytes:
        """A plain answer."""
        message = {"role": "assistant", "content": content, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return self._envelope("chat.completion", choices=[choice], usage=usage)

    def first_chunk(self, text: str) -> bytes:
        return self._first_start + orjson.dumps(text) + CHUNK_END

    def chunk(self, text: str) -> bytes:
        return self._chunk_start + orjson.dumps(text) + CHUNK_END

    def last_chunk(self, finish: str | None) -> bytes:
        choice = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": finish}
        return sse.event(self._envelope("chat.completion.chunk", choices=[choice]))

    def usage_chunk(self, usage: Mapping[str, int]) -> bytes:
        """The one trailing chunk with counts. It has no choice: clients sum the usage of chunks that have one."""
        return sse.event(self._envelope("chat.completion.chunk", choices=[], usage=usage))
