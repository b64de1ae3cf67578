"""`POST /v1/responses`: OpenAI's Responses API over the path of chat completions. Nothing is stored."""

import secrets
import time
from typing import Any

import orjson
from pydantic_core import to_json
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from batching.errors import BatchingError
from batching.types import Request
from server.caller import Caller
from server.chat import Prompt, prepare, reader
from server.defaults import Defaults
from server.disconnect import until_disconnect
from server.errors import ApiError, from_batching
from server.request import read
from server.respond import RowsResponse, begun
from server.response_events import Json, ResponseChoice
from server.response_request import ResponseRequest, TextConfig, as_chat, renamed
from server.schema import ChatRequest
from server.service import Service
from server.tools import AllowedChoice, NamedChoice


async def responses(http: HttpRequest) -> Response:
    service: Service = http.app.state.service
    asked = await read(http, ResponseRequest)
    return await until_disconnect(http, respond(service, asked, http.state.caller))


async def stored_response(http: HttpRequest) -> Response:
    """Every answer that a client wants to see again, cancel or delete. Raises `ApiError` 404."""
    raise ApiError(404, "Responses are not stored here, so there is none to be found.", code="response_not_found")


async def respond(service: Service, asked: ResponseRequest, caller: Caller) -> Response:
    """Everything after the body was read. Raises `ApiError`."""
    head = head_of(service.served_name(asked.model), asked, service.defaults)
    with service.batcher.announce():
        chat, requests, prompt = await prepared(service, asked, caller)
        [stream] = service.submit(requests)
    choice = ResponseChoice(service, stream, chat, reader(service.text, chat, prompt), head)
    return await (streamed(choice) if asked.stream else plain(choice))


async def prepared(
    service: Service, asked: ResponseRequest, caller: Caller
) -> tuple[ChatRequest, list[Request], Prompt]:
    """The chat request, and what `prepare` makes of it. Raises `ApiError` that names this request's fields."""
    try:
        chat = as_chat(asked)
        chat.note(asked.size)
        return chat, *await prepare(service, chat, caller)
    except ApiError as error:
        raise renamed(error) from None


async def plain(choice: ResponseChoice) -> Response:
    """The whole answer as one JSON object."""
    async with choice.stream:
        try:
            return Response(orjson.dumps(await choice.response()), media_type="application/json")
        except BatchingError as error:
            raise from_batching(error) from None


async def streamed(choice: ResponseChoice) -> Response:
    """The answer as server-sent events."""
    news = choice.news()
    first = await begun([choice], news)
    return RowsResponse([choice], choice.frames(first, news))


FIXED: Json = dict.fromkeys(["error", "incomplete_details", "completed_at", "usage"]) | {
    "previous_response_id": None,
    "top_logprobs": 0,
    "truncation": "disabled",
    "background": False,
    "store": False,
    "service_tier": "default",
}
"""What is not known yet, or never different here. Some clients need the fields."""


def head_of(model: str, asked: ResponseRequest, defaults: Defaults) -> Json:
    """The response before there is any output."""
    told: Json = {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
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
        "reasoning": {"effort": asked.reasoning and asked.reasoning.effort, "summary": None},
        "metadata": as_json(asked.metadata or {}),
        "user": as_json(asked.user),
        "safety_identifier": as_json(asked.safety_identifier),
        "prompt_cache_key": as_json(asked.prompt_cache_key),
        "max_tool_calls": as_json(asked.max_tool_calls),
    }
    return told | FIXED


def choice_of(asked: ResponseRequest) -> Any:
    """`tool_choice` as it was sent, or what leaving it out means."""
    match asked.tool_choice:
        case NamedChoice(function=function):
            return {"type": "function", "name": function.name}
        case AllowedChoice(allowed_tools=allowed):
            tools = [{"type": "function", "name": tool.function.name} for tool in allowed.tools]
            return {"type": "allowed_tools", "mode": allowed.mode, "tools": tools}
        case choice:
            return choice or "auto"


def as_json(value: Any) -> orjson.Fragment:
    """What a client sent, encoded by pydantic, which has a form for integers of any size."""
    return orjson.Fragment(to_json(value, by_alias=True, inf_nan_mode="null"))
