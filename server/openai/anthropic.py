"""Anthropic's Messages API on top of chat completions: endpoints, a message's content blocks, its events and errors."""

from __future__ import annotations

import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal

import orjson
from pydantic_core import from_json, to_json
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from batching.stream import Stream
from batching.types import Delta
from server.http.errors import ApiError
from server.model.served_model import ServedModel
from server.openai import anthropic_replies as replies
from server.openai.anthropic_request import CountRequest, MessageRequest, as_chat
from server.openai.chat import ChatEndpoint, Conversation, EventReader, prompt_length
from server.openai.choices import usage
from server.openai.endpoint import Answer, Endpoint, Step
from server.openai.requests import ChatRequest
from server.output.message import Event, Reasoning
from server.output.tool_calls import CallArguments, CallEnded, CallStarted, Content
from server.replies import FinishReason
from server.sse import framed


class Messages(ChatEndpoint[MessageRequest]):
    """`POST /v1/messages`."""

    kind = MessageRequest

    async def handle(self, http: HttpRequest) -> Response:
        return named(http, await super().handle(http))

    def as_chat(self, body: MessageRequest) -> ChatRequest:
        return as_chat(body)

    def answer(
        self, model: ServedModel, name: str, body: MessageRequest, encoded: Conversation, streams: Sequence[Stream]
    ) -> Answer:
        [stream] = streams
        return MessageAnswer(name, stream, EventReader(stream, model.text, encoded))


class CountTokens(Endpoint[CountRequest, replies.Counted]):
    """`POST /v1/messages/count_tokens`."""

    kind = CountRequest

    async def handle(self, http: HttpRequest) -> Response:
        return named(http, await super().handle(http))

    def encode(self, model: ServedModel, body: CountRequest) -> replies.Counted:
        return {"input_tokens": prompt_length(model, as_chat(body))}


def named(http: HttpRequest, response: Response) -> Response:
    """The response with the request's id in the header that Anthropic's clients read."""
    response.headers["request-id"] = http.state.caller.request_id
    return response


# The answer

SIGNATURE = "unsigned"
"""Not empty, because clients may drop thoughts without a signature."""

STOP_REASONS: dict[FinishReason | None, replies.StopReason] = {"length": "max_tokens", "tool_calls": "tool_use"}


class Block(ABC):
    """One content block, which grows by pieces of text."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def add(self, text: str) -> None:
        self._texts.append(text)

    @abstractmethod
    def json(self) -> replies.Block: ...

    @abstractmethod
    def delta(self, text: str) -> replies.Delta: ...

    def last_delta(self) -> replies.Delta | None:
        return None


class Said(Block):
    def json(self) -> replies.TextOutput:
        return {"type": "text", "text": self.text}

    def delta(self, text: str) -> replies.SaidDelta:
        return {"type": "text_delta", "text": text}


class Thought(Block):
    def json(self) -> replies.ThinkingOutput:
        return {"type": "thinking", "thinking": self.text, "signature": SIGNATURE if self._texts else ""}

    def delta(self, text: str) -> replies.ThinkingDelta:
        return {"type": "thinking_delta", "thinking": text}

    def last_delta(self) -> replies.SignatureDelta:
        return {"type": "signature_delta", "signature": SIGNATURE}


class Call(Block):
    """A use of a tool; its text is its arguments.

    A stream has them at the block's end, once they are known to be JSON: Anthropic's clients raise an error about
    anything else. Until then, empty deltas show that the answer goes on.
    """

    def __init__(self, started: CallStarted) -> None:
        super().__init__()
        self._started = started

    def json(self) -> replies.ToolUseOutput:
        return {
            "type": "tool_use",
            "id": self._started.id,
            "name": self._started.name,
            "input": orjson.Fragment(self._input()),
        }

    def delta(self, text: str) -> replies.InputDelta:
        return {"type": "input_json_delta", "partial_json": ""}

    def last_delta(self) -> replies.InputDelta:
        return {"type": "input_json_delta", "partial_json": self._input().decode()}

    def _input(self) -> bytes:
        return to_json(arguments(self.text))


def arguments(text: str) -> dict[str, object]:
    """The object that the arguments of a call begin, empty if they begin none."""
    try:
        value = from_json(text, allow_inf_nan=False, allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class Blocks:
    """Folds an answer's events into blocks and returns the stream's events for them. Only the last block grows."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._open = False

    def json(self) -> list[replies.Block]:
        return [block.json() for block in self._blocks]

    def push(self, event: Event) -> Iterator[replies.MessageEvent]:
        match event:
            case Reasoning(text):
                yield from self._write(Thought, text)
            case Content(text):
                yield from self._write(Said, text)
            case CallStarted():
                yield from self._begin(Call(event))
            case CallArguments():
                yield self._grow(event.text)
            case CallEnded():
                yield from self._close()

    def end(self) -> Iterator[replies.MessageEvent]:
        """Clients expect a block, so an answer without any gets an empty text."""
        if not self._blocks:
            yield from self._begin(Said())
        yield from self._close()

    def _write(self, kind: type[Said | Thought], text: str) -> Iterator[replies.MessageEvent]:
        if not self._open or not isinstance(self._blocks[-1], kind):
            yield from self._begin(kind())
        yield self._grow(text)

    def _begin(self, block: Block) -> Iterator[replies.MessageEvent]:
        yield from self._close()
        self._blocks.append(block)
        self._open = True
        yield {"type": "content_block_start", "index": self._place, "content_block": block.json()}

    def _grow(self, text: str) -> replies.BlockDelta:
        self._blocks[-1].add(text)
        return self._changed(self._blocks[-1].delta(text))

    def _close(self) -> Iterator[replies.MessageEvent]:
        if not self._open:
            return
        self._open = False
        if (last := self._blocks[-1].last_delta()) is not None:
            yield self._changed(last)
        yield {"type": "content_block_stop", "index": self._place}

    def _changed(self, delta: replies.Delta) -> replies.BlockDelta:
        return {"type": "content_block_delta", "index": self._place, "delta": delta}

    @property
    def _place(self) -> int:
        return len(self._blocks) - 1


class MessageAnswer(Answer):
    """A message, generated by one row. `model` is its name in the reply."""

    def __init__(self, model: str, stream: Stream, reader: EventReader) -> None:
        self.streams = [stream]
        self._model = model
        self._reader = reader
        self._id = f"msg_{secrets.token_hex(12)}"
        self._blocks = Blocks()
        self._finish: FinishReason | None = None
        self._begun = False

    def add(self, row: int, arrived: Delta) -> None:
        self._push(arrived)

    async def whole(self) -> bytes:
        for _ in self._blocks.end():
            pass
        return orjson.dumps(self._message(self._blocks.json(), self._end()))

    def frames(self, step: Step) -> bytes:
        [(_, arrived)] = step
        return framed([*self._opening(), *self._push(arrived)])

    def last(self) -> list[bytes]:
        end: replies.MessageDelta = {"type": "message_delta", "delta": self._end(), "usage": self._usage()}
        return [framed([*self._opening(), *self._blocks.end(), end, {"type": "message_stop"}])]

    def failed(self, error: ApiError) -> bytes:
        return framed([error_of(error, self.streams[0].row.request.id)])

    def _push(self, arrived: Delta) -> list[replies.MessageEvent]:
        events, self._finish = self._reader.push(arrived)
        return [told for event in events for told in self._blocks.push(event)]

    def _opening(self) -> list[replies.MessageEvent]:
        """The first events of a stream, returned once."""
        if self._begun:
            return []
        self._begun = True
        message = self._message([], {"stop_reason": None, "stop_sequence": None})
        return [{"type": "message_start", "message": message}, {"type": "ping"}]

    def _message(self, content: list[replies.Block], end: replies.End) -> replies.AnthropicMessage:
        kind: Literal["message"] = "message"
        return {
            "id": self._id,
            "type": kind,
            "role": "assistant",
            "model": self._model,
            "content": content,
            **end,
            "usage": self._usage(),
        }

    def _end(self) -> replies.End:
        found = self._reader.stop_reason
        if self._finish == "stop" and isinstance(found, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": found}
        return {"stop_reason": STOP_REASONS.get(self._finish, "end_turn"), "stop_sequence": None}

    def _usage(self) -> replies.MessageUsage:
        counts = usage(self.streams)
        cached = counts["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": counts["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": counts["completion_tokens"],
        }


# Errors

PATHS = re.compile(r"(/v1)?/messages(/.*)?", re.DOTALL)
"""The paths of its API."""

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
TOO_LONG = "Prompt is too long. "
"""By this Claude Code knows that a conversation has to be made shorter."""
NO_THREADS: replies.Unthreaded = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
"""By this Anthropic's clients know that they have to send the whole conversation with each of its requests."""


def speaks_anthropic(path: str) -> bool:
    """Whether errors on this path have this form."""
    return PATHS.fullmatch(path) is not None


def error_of(error: ApiError, request_id: str) -> replies.AnthropicError:
    kind = KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    message = (TOO_LONG if error.code == "context_length_exceeded" else "") + error.worded(error.message)
    found: replies.AnthropicErrorDetails = {"type": kind, "message": message}
    if (error.code, error.param) == ("unsupported_field", "thread"):
        found["details"] = NO_THREADS
    return {"type": "error", "error": found, "request_id": request_id}


def response_of(error: ApiError, request_id: str) -> Response:
    headers = {**error.headers, "request-id": request_id}
    body = orjson.dumps(error_of(error, request_id))
    return Response(body, error.status, headers, media_type="application/json")
