"""Answers made of choices, as chat completions and completions are: their JSON, whole or in chunks."""

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
    """One row's answer in an endpoint's own words."""

    def add(self, arrived: Delta) -> None:
        """Take in tokens of a collected answer."""
        ...

    def whole(self) -> Whole:
        """The choice of a collected answer, once all of its tokens were added."""
        ...

    def chunks(self, arrived: Delta) -> list[Chunk]:
        """What a stream says of these tokens, often once, sometimes not at all; the last has the finish reason."""
        ...


class ChoicesAnswer(Answer, Generic[Whole, Chunk]):
    """An answer in the name of `model`. Its id begins with `prefix`.

    What does not change from chunk to chunk is encoded once.
    """

    prefix: str

    def __init__(
        self, model: str, streams: Sequence[Stream], choices: Sequence[Choice[Whole, Chunk]], body: Generation
    ) -> None:
        self.streams = streams
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model = model
        self._choices = choices
        self._usage = body.include_usage
        self._usage_always = body.continuous_usage
        self._chunk_start = b"data: " + orjson.dumps(self.empty_chunk()).removesuffix(b"]}")

    @abstractmethod
    def completion(self, choices: list[Whole], usage: replies.Usage) -> replies.ChatCompletion | replies.TextCompletion:
        """The collected answer."""

    @abstractmethod
    def empty_chunk(self) -> replies.ChatChunk | replies.TextChunk:
        """An event without choices, which are its last field."""

    def add(self, row: int, arrived: Delta) -> None:
        self._choices[row].add(arrived)

    def whole(self) -> bytes:
        return orjson.dumps(self.completion([choice.whole() for choice in self._choices], usage(self.streams)))

    def frames(self, step: Step) -> bytes:
        """With the counts so far if they were asked for."""
        end = b"]}\n\n"
        if self._usage_always:
            end = b'],"usage":' + orjson.dumps(usage(self.streams)) + b"}\n\n"
        chunks = [chunk for row, arrived in step for chunk in self._choices[row].chunks(arrived)]
        return b"".join([self._chunk_start + orjson.dumps(chunk) + end for chunk in chunks])

    def last(self) -> bytes:
        """Counts have an event of their own, without a choice: clients add up those of events that have one."""
        if not self._usage:
            return sse.DONE
        counts = self.empty_chunk()
        counts["usage"] = usage(self.streams)
        return sse.event(orjson.dumps(counts)) + sse.DONE

    def failed(self, error: ApiError) -> bytes:
        """Without `[DONE]`: the answer is not whole."""
        return sse.event(error.body())


def usage(streams: Sequence[Stream]) -> replies.Usage:
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
