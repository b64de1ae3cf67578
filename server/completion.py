"""The JSON of OpenAI's chat completions and completions, whole or in chunks."""

import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

from server import sse


class Completion:
    """Writes the parts of one answer under one id, creation time and model name.

    `kind` is "chat.completion" or "text_completion", and its id begins with `prefix`. What does not change from chunk
    to chunk is encoded once.
    """

    def __init__(self, model: str, kind: str, prefix: str) -> None:
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._kind = kind
        self._chunk = self._kind + ".chunk" if kind == "chat.completion" else kind
        self._chunk_start = b"data: " + self._envelope(self._chunk)[:-1] + b',"choices":['

    def _envelope(self, kind: str, **fields: Any) -> bytes:
        return orjson.dumps(self._head | {"object": kind} | fields)

    def whole(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, int], **others: Any) -> bytes:
        """A plain answer."""
        return self._envelope(self._kind, choices=choices, usage=usage, **others)

    def chunks(self, news: Iterable[Mapping[str, Any]], usage: Mapping[str, int] | None = None) -> bytes:
        """An event for each of these news of one choice, with the counts so far if there are any."""
        end = b"]}\n\n" if usage is None else b'],"usage":' + orjson.dumps(usage) + b"}\n\n"
        return b"".join([self._chunk_start + orjson.dumps(choice) + end for choice in news])

    def usage_chunk(self, usage: Mapping[str, int]) -> bytes:
        """The one trailing event with counts. It has no choice: clients sum the usage of chunks that have one."""
        return sse.event(self._envelope(self._chunk, choices=[], usage=usage))
