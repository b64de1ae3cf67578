"""`POST /v1/responses`: OpenAI's Responses API on top of chat completions."""

import secrets
import time
from collections.abc import Sequence
from functools import partial

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from batching.stream import Stream
from server.callers import Caller
from server.http.errors import ApiError, bad_request
from server.model.defaults import Defaults
from server.model.served_model import ServedModel
from server.openai import responses_replies as replies
from server.openai.chat import ChatEndpoint, Conversation, EventReader, prompt_length
from server.openai.endpoint import Answer, Encoded, Endpoint, json_response, num_logprobs
from server.openai.requests import ChatRequest, Row
from server.openai.responses_output import ResponseAnswer
from server.openai.responses_request import (
    ENCRYPTED,
    NOT_KEPT,
    RESPONSE,
    ReasoningConfig,
    ReferenceItem,
    ResponseRequest,
    TextConfig,
    as_chat,
    as_json,
    renamed,
)
from server.openai.tools import AllowedChoice, NamedChoice
from server.response_store import ResponseStore, StoredResponse
from server.service import Service

MAX_LOGPROBS = 2**16
"""Limit on log probabilities in one response: 4 MB of JSON, which the end of a stream repeats four times."""


class Continued(Endpoint[ResponseRequest, Encoded]):
    """A kind of request that may continue the conversation of a stored response."""

    kind = ResponseRequest

    async def respond(
        self, service: Service, model: ServedModel, body: ResponseRequest, size: int, caller: Caller
    ) -> Response:
        store = service.responses
        keep = partial(put, store, caller.name) if store.most and body.store is not False else None
        before, referred = items_before(store, body, caller), outputs_referred_to(store, body, caller)
        size += len(before) + sum(map(len, referred))
        if size > service.max_body_bytes and referred:
            raise bad_request("The items that the input refers to are too long; send fewer.", "input", "too_large")
        body.place(before, referred, keep)
        try:
            return await super().respond(service, model, body, size, caller)
        except ApiError as error:
            raise renamed(error) from None


class Responses(Continued[tuple[Conversation, list[Row]]], ChatEndpoint[ResponseRequest]):
    """`POST /v1/responses`."""

    def encode(self, model: ServedModel, body: ResponseRequest) -> tuple[Conversation, list[Row]]:
        body.remember()
        conversation, [row] = super().encode(model, body)
        if body.wants_logprobs and num_logprobs(row) > MAX_LOGPROBS:
            raise bad_request(
                "A response with this many log probabilities would be too large; ask for fewer tokens.", "top_logprobs"
            )
        return conversation, [row]

    def as_chat(self, body: ResponseRequest) -> ChatRequest:
        return as_chat(body)

    def answer(
        self, model: ServedModel, name: str, body: ResponseRequest, encoded: Conversation, streams: Sequence[Stream]
    ) -> Answer:
        [stream] = streams
        head = head_of(name, body, model.defaults)
        reader = EventReader(stream, model.text, encoded)
        encrypted = ENCRYPTED in (body.include or ())
        return ResponseAnswer(stream, reader, model.text, head, body.namespaced, encrypted=encrypted, keep=body.keep)


class InputTokens(Continued[replies.InputTokens]):
    """`POST /v1/responses/input_tokens`: the length of a response's prompt."""

    def encode(self, model: ServedModel, body: ResponseRequest) -> replies.InputTokens:
        return {"object": "response.input_tokens", "input_tokens": prompt_length(model, as_chat(body))}


def items_before(store: ResponseStore, body: ResponseRequest, caller: Caller) -> bytes:
    """The items of the response that this one continues, as JSON; empty if it continues none. Raises `ApiError` 400."""
    if body.previous_response_id is None:
        return b""
    if (found := store.get(caller.name, body.previous_response_id)) is not None:
        return found.items
    if not store.most:
        raise bad_request(f"previous_response_id: {NOT_KEPT}.", "previous_response_id")
    raise bad_request(
        "The response of the field previous_response_id is not stored, or no longer; send the whole conversation.",
        "previous_response_id",
        "previous_response_not_found",
    )


def outputs_referred_to(store: ResponseStore, body: ResponseRequest, caller: Caller) -> list[bytes]:
    """The output of each stored response with an item that the input refers to, as JSON. Those that are not stored are
    left out."""
    names = dict.fromkeys(item.response for item in body.input if isinstance(item, ReferenceItem))
    return [found.output for name in names if (found := store.get(caller.name, name)) is not None]


def put(store: ResponseStore, client: str, items: bytes, response: replies.Response) -> None:
    """Store an ended response, with the items before its own."""
    output = memoryview(orjson.dumps(response["output"]))  # megabytes, copied as rarely as it can be
    stored = StoredResponse(orjson.dumps(response), b"".join([items.removesuffix(b"]"), b",", output[1:]]), len(items))
    store.add(client, response["id"], stored)


async def stored_response(http: HttpRequest) -> Response:
    """`GET` and `DELETE /v1/responses/{name}`. Raises `ApiError`: 404, or 400 for a stream."""
    store: ResponseStore = http.app.state.service.responses
    client, name = http.state.caller.name, http.path_params["name"]
    if http.method == "DELETE" and store.delete(client, name):
        deleted: replies.Deleted = {"id": name, "object": "response", "deleted": True}
        return json_response(orjson.dumps(deleted))
    found = store.get(client, name)
    if found is None:
        return await no_response(http)
    if http.query_params.get("stream") == "true":
        raise bad_request("A stored response cannot be streamed; leave stream out.", "stream")
    return json_response(found.response)


async def no_response(http: HttpRequest) -> Response:
    """Answers whatever else is asked of a response. Raises `ApiError` 404."""
    stored = http.app.state.service.responses.most
    message = "No such response is stored." if stored else "Responses are not stored here, so this one cannot be found."
    raise ApiError(404, message, code="response_not_found")


def head_of(model: str, body: ResponseRequest, defaults: Defaults) -> replies.Response:
    """The response before any output. Some clients require even the fields that never vary here."""
    reasoning = body.reasoning or ReasoningConfig()
    return {
        "id": f"{RESPONSE}{secrets.token_hex(12)}",
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
        "tools": body.shown_tools,
        "tool_choice": choice_of(body),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "text": as_json(body.text or TextConfig()),
        "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
        "metadata": as_json(body.metadata or {}),
        "user": as_json(body.user),
        "safety_identifier": as_json(body.safety_identifier),
        "prompt_cache_key": as_json(body.prompt_cache_key),
        "max_tool_calls": as_json(body.max_tool_calls),
        "previous_response_id": body.previous_response_id,
        "top_logprobs": body.top_logprobs or 0,
        "truncation": "disabled",
        "background": False,
        "store": body.keep is not None,
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
