"""`POST /v1/responses`: OpenAI's Responses API on top of chat completions. Nothing is stored."""

import secrets
import time
from collections.abc import Sequence

import orjson
from pydantic_core import to_json
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from batching.stream import Stream
from server.callers import Caller
from server.http.errors import ApiError
from server.model.defaults import Defaults
from server.model.served_model import ServedModel
from server.openai import responses_replies as replies
from server.openai.chat import ChatEndpoint, Conversation, EventReader
from server.openai.endpoint import Answer
from server.openai.requests import ChatRequest
from server.openai.responses_output import ResponseAnswer
from server.openai.responses_request import ResponseRequest, TextConfig, as_chat, renamed
from server.openai.tools import AllowedChoice, NamedChoice
from server.service import Service


class Responses(ChatEndpoint[ResponseRequest]):
    """`POST /v1/responses`."""

    kind = ResponseRequest

    async def respond(self, service: Service, model: ServedModel, body: ResponseRequest, caller: Caller) -> Response:
        try:
            return await super().respond(service, model, body, caller)
        except ApiError as error:
            raise renamed(error) from None

    def as_chat(self, body: ResponseRequest) -> ChatRequest:
        return as_chat(body)

    def answer(
        self, model: ServedModel, name: str, body: ResponseRequest, encoded: Conversation, streams: Sequence[Stream]
    ) -> Answer:
        [stream] = streams
        return ResponseAnswer(stream, EventReader(stream, model.text, encoded), head_of(name, body, model.defaults))


async def stored_response(http: HttpRequest) -> Response:
    """Answers attempts to retrieve, cancel or delete a response. Raises `ApiError` 404."""
    raise ApiError(404, "Responses are not stored here, so this one cannot be found.", code="response_not_found")


def head_of(model: str, body: ResponseRequest, defaults: Defaults) -> replies.Response:
    """The response before any output. Some clients require even the fields that never vary here."""
    return {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "model": model,
        "output": [],
        "usage": None,
        "incomplete_details": None,
        "error": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "temperature": defaults.temperature if body.temperature is None else body.temperature,
        "top_p": defaults.top_p if body.top_p is None else body.top_p,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "tools": [as_json(tool) for tool in body.functions],
        "tool_choice": choice_of(body),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "text": as_json(body.text or TextConfig()),
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "metadata": as_json(body.metadata or {}),
        "user": as_json(body.user),
        "safety_identifier": as_json(body.safety_identifier),
        "prompt_cache_key": as_json(body.prompt_cache_key),
        "max_tool_calls": as_json(body.max_tool_calls),
        "previous_response_id": None,
        "top_logprobs": 0,
        "truncation": "disabled",
        "background": False,
        "store": False,
        "service_tier": "default",
    }


def choice_of(body: ResponseRequest) -> replies.ToolChoice:
    """`tool_choice` as it was sent, or its default."""
    match body.tool_choice:
        case NamedChoice(function=function):
            return {"type": "function", "name": function.name}
        case AllowedChoice(allowed_tools=allowed):
            tools: list[replies.FunctionName] = [
                {"type": "function", "name": tool.function.name} for tool in allowed.tools
            ]
            return {"type": "allowed_tools", "mode": allowed.mode, "tools": tools}
        case choice:
            return choice or "auto"


def as_json(value: object) -> orjson.Fragment:
    """A value that a client sent, encoded by pydantic, which can write integers of any size."""
    return orjson.Fragment(to_json(value, by_alias=True, inf_nan_mode="null"))
