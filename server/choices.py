"""Answers made of choices, as chat completions and completions are: their JSON, whole or in chunks."""

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import orjson

from batching.stream import Stream
from batching.types import Delta
from server import sse
from server.endpoint import Answer, Step
from server.errors import ApiError
from server.schema import Generation


class Choice(Protocol):
    """One row's answer in an endpoint's own words."""

    def add(self, arrived: Delta) -> None:
        """Take in tokens of a collected answer."""
        ...

    def whole(self) -> dict[str, Any]:
        """The choice of a collected answer, once all of its tokens were added."""
        ...

    def chunks(self, arrived: Delta) -> list[dict[str, Any]]:
        """What a stream says of these tokens, often once, sometimes not at all; the last has the finish reason."""
        ...


class Envelope:
    """The JSON around the choices of one answer: its id, creation time and model name.

    `kind` is "chat.completion" or "text_completion", and the id begins with `prefix`. What does not change from chunk
    to chunk is encoded once.
    """

    def __init__(self, model: str, kind: str, prefix: str) -> None:
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._kind = kind
        self._chunk = kind + ".chunk" if kind == "chat.completion" else kind
        self._chunk_start = b"data: " + self._json(self._chunk)[:-1] + b',"choices":['

    def _json(self, kind: str, **fields: Any) -> bytes:
        return orjson.dumps(self._head | {"object": kind} | fields)

    def whole(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, Any], **others: Any) -> bytes:
        return self._json(self._kind, choices=choices, usage=usage, **others)

    def chunks(self, choices: Iterable[Mapping[str, Any]], usage: Mapping[str, Any] | None = None) -> bytes:
        """An event for each of these parts of choices, with the counts so far if there are any."""
        end = b"]}\n\n" if usage is None else b'],"usage":' + orjson.dumps(usage) + b"}\n\n"
        return b"".join([self._chunk_start + orjson.dumps(choice) + end for choice in choices])

    def counts(self, usage: Mapping[str, Any]) -> bytes:
        """Counts in an event of their own, without a choice: clients add up those of events that have one."""
        return sse.event(self._json(self._chunk, choices=[], usage=usage))


class ChoicesAnswer(Answer):
    """`others` are fields of a collected answer beside its choices."""

    def __init__(
        self,
        envelope: Envelope,
        streams: Sequence[Stream],
        choices: Sequence[Choice],
        body: Generation,
        others: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self.streams = streams
        self._envelope = envelope
        self._choices = choices
        self._usage = body.include_usage
        self._usage_always = body.continuous_usage
        self._others = others

    def add(self, row: int, arrived: Delta) -> None:
        self._choices[row].add(arrived)

    def whole(self) -> bytes:
        choices = [choice.whole() for choice in self._choices]
        return self._envelope.whole(choices, usage(self.streams), **self._others())

    def frames(self, step: Step) -> bytes:
        chunks = [chunk for row, arrived in step for chunk in self._choices[row].chunks(arrived)]
        return self._envelope.chunks(chunks, usage(self.streams) if self._usage_always else None)

    def last(self) -> bytes:
        return (self._envelope.counts(usage(self.streams)) if self._usage else b"") + sse.DONE

    def failed(self, error: ApiError) -> bytes:
        """Without `[DONE]`: the answer is not whole."""
        return sse.event(error.body())


def usage(streams: Sequence[Stream]) -> dict[str, Any]:
    """Token counts of an answer. Choices that continue the same prompt count it once, as OpenAI does.

    `cached_tokens`: how many of the prompts' tokens had been computed for other requests.
    """
    prompts = {id(row.request.prompt): row for row in (stream.row for stream in streams)}
    prompt = sum(len(row.request.prompt) for row in prompts.values())
    output = sum(stream.output_tokens for stream in streams)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": sum(row.num_cached_tokens for row in prompts.values())},
    }
