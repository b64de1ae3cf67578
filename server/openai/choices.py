"""The JSON of answers that consist of choices (chat completions and completions), whole or in chunks."""

import asyncio
import secrets
import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import orjson

from batching.stream import Stream
from batching.types import Delta
from server import replies, sse
from server.http.errors import ApiError
from server.openai.endpoint import Answer, Step
from server.openai.requests import Generation

Whole = TypeVar("Whole", covariant=True)
Chunk = TypeVar("Chunk")


class Choice(Protocol[Whole, Chunk]):
    """One row's answer in an endpoint's format."""

    def add(self, arrived: Delta) -> None:
        """Add tokens of a collected answer."""
        ...

    def whole(self) -> Whole:
        """The finished choice of a collected answer."""
        ...

    def chunks(self, arrived: Delta) -> list[Chunk]:
        """The chunks for these tokens, usually one, sometimes none; the last chunk has the finish reason."""
        ...


class ChoicesAnswer(Answer, Generic[Whole, Chunk]):
    """An answer from `model`, whose `system_fingerprint` is this, with an id that starts with `prefix`.

    The fields that are the same in every chunk are encoded once.
    """

    prefix: str

    def __init__(
        self,
        model: str,
        fingerprint: str,
        streams: Sequence[Stream],
        choices: Sequence[Choice[Whole, Chunk]],
        body: Generation,
    ) -> None:
        self.streams = streams
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model = model
        self._fingerprint = fingerprint
        self._choices = choices
        self._usage = body.include_usage
        self._usage_always = body.continuous_usage
        self._extra = b""  # of the first chunk
        self._chunk_start = b"data: " + orjson.dumps(self.empty_chunk()).removesuffix(b"]}")

    @abstractmethod
    def completion(self, choices: list[Whole], usage: replies.Usage) -> replies.ChatCompletion | replies.TextCompletion:
        """The collected answer."""

    @abstractmethod
    def empty_chunk(self) -> replies.ChatChunk | replies.TextChunk:
        """A chunk without choices; `choices` is its last field."""

    def usage(self) -> replies.Usage:
        """Token counts so far."""
        return usage(self.streams)

    def add(self, row: int, arrived: Delta) -> None:
        self._choices[row].add(arrived)

    async def whole(self) -> bytes:
        choices = []
        for choice in self._choices:
            choices.append(choice.whole())
            await asyncio.sleep(0)  # a message of many calls takes a millisecond
        return orjson.dumps(self.completion(choices, self.usage()))

    def frames(self, step: Step) -> bytes:
        """Includes the usage so far if the request asked for it."""
        chunks = [orjson.dumps(chunk) for row, arrived in step for chunk in self._choices[row].chunks(arrived)]
        end = b"]}\n\n"
        if self._usage_always:
            end = b'],"usage":' + orjson.dumps(self.usage()) + b"}\n\n"
        frames = [self._chunk_start + chunk + end for chunk in chunks]
        if frames and self._extra:
            frames[0] = frames[0].removesuffix(b"}\n\n") + b"," + self._extra.removeprefix(b"{") + b"\n\n"
            self._extra = b""
        return b"".join(frames)

    def last(self) -> list[bytes]:
        """Usage has an event of its own, without choices: clients add up the counts of events with choices."""
        if not self._usage:
            return [sse.DONE]
        counts = self.empty_chunk()
        counts["usage"] = self.usage()
        return [sse.event(orjson.dumps(counts)) + sse.DONE]

    def failed(self, error: ApiError) -> bytes:
        """Sends no `[DONE]`, because the answer is incomplete."""
        return sse.event(error.body())


def usage(streams: Sequence[Stream]) -> replies.Usage:
    """Token counts of an answer. A prompt shared by several choices is counted once, as OpenAI does.

    `cached_tokens`: prompt tokens whose KV was already cached from other requests; a prompt's later choices find that
    of the first, too. If the client predicted the answer, there are also the tokens that speculation guessed from
    prompt and prediction, rightly or wrongly.
    """
    prompts = {id(row.request.prompt): row for row in (stream.row for stream in reversed(streams))}
    prompt = sum(len(row.request.prompt) for row in prompts.values())
    output = sum(stream.output_tokens for stream in streams)
    counts: replies.Usage = {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": sum(row.num_cached_tokens for row in prompts.values())},
    }
    if any(stream.row.request.prediction for stream in streams):
        drafted, accepted = (
            sum(getattr(stream.row, name) for stream in streams)
            for name in ("num_drafted_tokens", "num_accepted_tokens")
        )
        counts["completion_tokens_details"] = {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        }
    return counts
