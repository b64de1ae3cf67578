"""`POST /v1/responses`: OpenAI's Responses API over the path of chat completions. Nothing is stored."""

import secrets
import time
from collections.abc import Sequence

import orjson
from pydantic_core import to_json
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from batching.stream import Stream
from server import replies
from server.callers import Caller
from server.http.errors import ApiError
from server.model.defaults import Defaults
from server.model.served_model import ServedModel
from server.openai.chat import Conversation, EventReader, encode, prompts
from server.openai.endpoint import Answer, GeneratingEndpoint, Prompt
from server.openai.responses_output import ResponseAnswer
from server.openai.responses_request import ResponseRequest, TextConfig, as_chat, renamed
from server.openai.tools import AllowedChoice, NamedChoice
from server.service import Service


class Responses(GeneratingEndpoint[ResponseRequest, Conversation]):
    """`POST /v1/responses`."""

    kind = ResponseRequest

    async def respond(self, service: Service, model: ServedModel, body: ResponseRequest, caller: Caller) -> Response:
        try:
            return await super().respond(service, model, body, caller)
        except ApiError as error:
            raise renamed(error) from None

    def encode(self, model: ServedModel, body: ResponseRequest) -> Conversation:
        return encode(model.text, as_chat(body), model.settings.thinking)

    async def prompts(
        self, model: ServedModel, body: ResponseRequest, encoded: Conversation, caller: Caller
    ) -> Sequence[Prompt]:
        return await prompts(model, encoded, caller)

    def answer(
        self, model: ServedModel, name: str, body: ResponseRequest, encoded: Conversation, streams: Sequence[Stream]
    ) -> Answer:
        [stream] = streams
        return ResponseAnswer(stream, EventReader(stream, model.text, encoded), head_of(name, body, model.defaults))


async def stored_response(http: HttpRequest) -> Response:
    """Every answer that a client wants to see again, cancel or delete. Raises `ApiError` 404."""
    raise ApiError(404, "Responses are not stored here, so there is none to be found.", code="response_not_found")


def head_of(model: str, asked: ResponseRequest, defaults: Defaults) -> replies.Response:
    """The response before there is any output. Some clients need also the fields that are never different here."""
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
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "temperature": defaults.temperature if asked.temperature is None else asked.temperature,
        "top_p": defaults.top_p if asked.top_p is None else asked.top_p,
        "presence_penalty": asked.presence_penalty or 0.0,
        "frequency_penalty": asked.frequency_penalty or 0.0,
        "tools": [as_json(tool) for tool in asked.functions],
        "tool_choice": choice_of(asked),
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "text": as_json(asked.text or TextConfig()),
        "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
        "metadata": as_json(asked.metadata or {}),
        "user": as_json(asked.user),
        "safety_identifier": as_json(asked.safety_identifier),
        "prompt_cache_key": as_json(asked.prompt_cache_key),
        "max_tool_calls": as_json(asked.max_tool_calls),
        "previous_response_id": None,
        "top_logprobs": 0,
        "truncation": "disabled",
        "background": False,
        "store": False,
        "service_tier": "default",
    }


def choice_of(asked: ResponseRequest) -> replies.ToolChoice:
    """`tool_choice` as it was sent, or what leaving it out means."""
    match asked.tool_choice:
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
    """What a client sent, encoded by pydantic, which has a form for integers of any size."""
    return orjson.Fragment(to_json(value, by_alias=True, inf_nan_mode="null"))
