"""The document of /openapi.json, generated from the types of requests and replies on a helper thread when first
requested.

A new endpoint is one entry in `OPERATIONS`. The paths without /v1 are left out, because they are the same handlers.
"""

from dataclasses import dataclass, field
from functools import cache, partial
from typing import TypeAlias

import orjson
from pydantic import ConfigDict, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from server import replies
from server.observe.metrics import CONTENT_TYPE
from server.openai import anthropic_replies, responses_replies
from server.openai.anthropic_request import CountRequest, MessageRequest
from server.openai.completions import CompletionRequest
from server.openai.requests import ChatRequest
from server.openai.responses_request import ResponseRequest
from server.openai.tokenize import DetokenizeRequest, TokenizeRequest
from server.sse import MEDIA_TYPE
from server.version import VERSION

JsonObject: TypeAlias = dict[str, object]

ABOUT = """An OpenAI-compatible server that answers requests to one model in shared batches.

Every path under /v1 also works without /v1. An unlisted field is ignored and named in the response header
X-Ignored-Fields, unless it would change the answer and cannot be honoured: then it is refused by name.
Every response has the request's id in X-Request-Id. Clients may set it: up to 64 letters, digits and `_.:-`.
"""

CHUNKS = (
    "With `stream` the answer is sent as server-sent events: `data: ` and the JSON of one chunk, an empty line, and "
    "finally `data: [DONE]`. An answer that fails midway ends with an error event and no `[DONE]`."
)
EVENTS = (
    "With `stream` the answer is sent as server-sent events, each with its type in both the frame and the JSON. The "
    "last is response.completed, response.incomplete or response.failed. Responses are stored if a setting says so."
)
MESSAGE_EVENTS = (
    "With `stream` the answer is sent as server-sent events, each with its type in both the frame and the JSON. The "
    "last is message_stop, or error if the answer fails midway. The API key may also be sent in the header X-Api-Key."
)

STATUSES = {
    200: "The answer.",
    400: "The request is not valid; `param` names the first field at fault.",
    401: "A valid API key is required.",
    404: "No such model.",
    408: "Timed out reading the request body.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too many requests are waiting.",
    500: "The model or the service failed on this request.",
    503: "The model is loading, the service is shutting down, or too much is in flight.",
    504: "The request did not finish within the time limit.",
}
RETRIED_AFTER = (429, 503)
READING = (400, 404, 408, 413, 415, 429, 500, 503)
"""Errors of any request with a body. Too many may wait to be read or tokenized, too."""
QUEUED = (504,)
"""Errors of requests that go through the queue, in addition."""

HEADERS = {
    "RequestId": {"description": "The request's id, as in the log.", "schema": {"type": "string"}},
    "RetryAfter": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 0}},
    "Authenticate": {"description": "The authentication scheme.", "schema": {"const": "Bearer"}},
}
RESPONSE_ID = "resp_0a1b2c3d4e5f60718293a4b5"
NAME: JsonObject = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}


@dataclass(frozen=True)
class Operation:
    """One method of one path, with its request and reply types. `examples` are bodies without `model`."""

    path: str
    summary: str
    gives: object
    takes: object = None
    event: object = None
    """The type of a stream's events."""
    about: str = ""
    examples: dict[str, JsonObject] = field(default_factory=dict)
    errors: tuple[int, ...] = ()
    """Statuses in addition to those of its kind."""
    error: object = replies.Error
    """The type of an error's body."""
    unwell: object = None
    """The type of a 503 body, if it is another one."""
    media: str = "application/json"
    open: bool = False
    """Whether it needs no API key."""
    method: str = ""
    """By default post for requests with a body, else get."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", self.method or ("post" if self.takes else "get"))

    def statuses(self, asks_key: bool) -> list[int]:
        errors = [*self.errors, *(READING if self.takes else ()), *(QUEUED if self.event else ())]
        return [200, *sorted(errors + [401] * asks_key)]


HI = [{"role": "user", "content": "Say hello."}]
ASK: JsonObject = {"messages": HI, "max_tokens": 64}
SAY: JsonObject = {"input": "Say hello."}
ONCE: JsonObject = {"prompt": "Once upon a time"}
STREAMED: JsonObject = {"stream": True, "stream_options": {"include_usage": True}}

health = partial(Operation, gives=replies.Health, errors=(503,), unwell=replies.Health, open=True)

OPERATIONS = (
    Operation(
        "/v1/chat/completions",
        "Continue a conversation",
        replies.ChatCompletion,
        ChatRequest,
        replies.ChatChunk,
        CHUNKS,
        {"Plain": ASK, "Streamed": {"messages": HI} | STREAMED},
    ),
    Operation(
        "/v1/completions",
        "Continue a text",
        replies.TextCompletion,
        CompletionRequest,
        replies.TextChunk,
        CHUNKS,
        {"Plain": ONCE | {"max_tokens": 64}, "Streamed": ONCE | STREAMED},
    ),
    Operation(
        "/v1/responses",
        "Continue a conversation, in OpenAI's newer format",
        responses_replies.Response,
        ResponseRequest,
        responses_replies.ResponseEvent,
        EVENTS,
        {"Plain": SAY | {"max_output_tokens": 64}, "Streamed": SAY | {"stream": True}},
    ),
    Operation(
        "/v1/responses/input_tokens",
        "Count the tokens of a response's prompt",
        responses_replies.InputTokens,
        ResponseRequest,
        examples={"Plain": SAY},
    ),
    Operation("/v1/responses/{name}", "Show a stored response", responses_replies.Response, errors=(400, 404, 500)),
    Operation(
        "/v1/responses/{name}",
        "Delete a stored response",
        responses_replies.Deleted,
        errors=(404, 500),
        method="delete",
    ),
    Operation(
        "/v1/messages",
        "Continue a conversation, in Anthropic's format",
        anthropic_replies.AnthropicMessage,
        MessageRequest,
        anthropic_replies.MessageEvent,
        MESSAGE_EVENTS,
        {"Plain": ASK, "Streamed": ASK | {"stream": True}},
        error=anthropic_replies.AnthropicError,
    ),
    Operation(
        "/v1/messages/count_tokens",
        "Count the tokens of a conversation, in Anthropic's format",
        anthropic_replies.Counted,
        CountRequest,
        examples={"Plain": {"messages": HI}},
        error=anthropic_replies.AnthropicError,
    ),
    Operation(
        "/v1/tokenize",
        "Tokenize a text or a conversation",
        replies.Tokenized,
        TokenizeRequest,
        examples={"Of a text": ONCE, "Of a conversation": {"messages": HI}},
    ),
    Operation(
        "/v1/detokenize",
        "Turn token ids into text",
        replies.Detokenized,
        DetokenizeRequest,
        examples={"Plain": {"tokens": [1, 2, 3]}},
    ),
    Operation("/v1/models", "List the model's names", replies.ModelList, errors=(500,)),
    Operation("/v1/models/{name}", "Show one of the model's names", replies.Model, errors=(404, 500)),
    health("/health", "Whether requests are accepted"),
    health("/health/ready", "The same"),
    health("/health/live", "Whether the process is healthy or still starting: a 503 means that it needs a restart"),
    Operation("/metrics", "Metrics for Prometheus", str, media=CONTENT_TYPE, open=True),
    Operation("/version", "What is running", replies.Version),
)


class Untitled(GenerateJsonSchema):
    """Without titles for fields, which would only repeat their names."""

    def field_title_should_be_set(self, schema: object) -> bool:
        return False


@cache
def schemas() -> tuple[dict[object, JsonObject], JsonObject]:
    """The schema of each type in an operation, mostly a reference, and the components that they refer to."""
    named = [
        kind for each in OPERATIONS for kind in (each.takes, each.gives, each.event, each.error, each.unwell) if kind
    ]
    kinds = tuple(dict.fromkeys(named))
    config = ConfigDict(use_attribute_docstrings=True, arbitrary_types_allowed=True)
    together = TypeAdapter(tuple[kinds], config=config)  # type: ignore[valid-type]
    document = together.json_schema(ref_template="#/components/schemas/{model}", schema_generator=Untitled)
    return dict(zip(kinds, document["prefixItems"], strict=True)), document["$defs"]


def schema_of(kind: object) -> JsonObject:
    return {"schema": schemas()[0][kind]}


@cache
def encoded(model: str, keyed: bool) -> bytes:
    return orjson.dumps(document(model, keyed))


def document(model: str, keyed: bool) -> JsonObject:
    """The OpenAPI 3.1 document. `model` is the name in its examples; `keyed`: whether API keys are required."""
    security = {"securitySchemes": {"apiKey": {"type": "http", "scheme": "bearer"}}} if keyed else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": "microbatch", "version": VERSION, "description": ABOUT},
        "paths": {path: methods_of(path, model, keyed) for path in dict.fromkeys(each.path for each in OPERATIONS)},
        "components": {"schemas": schemas()[1], "headers": HEADERS} | security,
    }


def methods_of(path: str, model: str, keyed: bool) -> JsonObject:
    return {each.method: describe(each, model, keyed) for each in OPERATIONS if each.path == path}


def describe(operation: Operation, model: str, keyed: bool) -> JsonObject:
    """The Operation Object."""
    asks_key = keyed and not operation.open
    example = RESPONSE_ID if operation.path.startswith("/v1/responses") else model
    operation_object: JsonObject = {
        "tags": [group_of(operation.path)],
        "summary": operation.summary,
        "description": operation.about,
        "operationId": operation_id(operation),
        "parameters": [NAME | {"example": example}] if "{name}" in operation.path else None,
        "requestBody": request_body(operation, model) if operation.takes else None,
        "responses": {str(status): response(operation, status) for status in operation.statuses(asks_key)},
        "security": [{"apiKey": []}] if asks_key else None,
    }
    return {key: value for key, value in operation_object.items() if value}


def group_of(path: str) -> str:
    """The heading in /docs that the operations of a path stand under."""
    groups = {"/v1/messages": "Anthropic", "/v1/tokenize": "Tokens", "/v1/detokenize": "Tokens", "/v1": "OpenAI"}
    return next((group for prefix, group in groups.items() if path.startswith(prefix)), "Service")


def operation_id(operation: Operation) -> str:
    path = operation.path.removeprefix("/v1").strip("/").replace("/", "_").replace("{name}", "one")
    return f"{path}_delete" if operation.method == "delete" else path


def request_body(operation: Operation, model: str) -> JsonObject:
    examples = {name: {"value": {"model": model} | body} for name, body in operation.examples.items()}
    return {"required": True, "content": {"application/json": schema_of(operation.takes) | {"examples": examples}}}


def response(operation: Operation, status: int) -> JsonObject:
    headers = {"X-Request-Id": "RequestId"}
    if status in RETRIED_AFTER:
        headers["Retry-After"] = "RetryAfter"
    if status == 401:
        headers["WWW-Authenticate"] = "Authenticate"
    named = {name: {"$ref": f"#/components/headers/{header}"} for name, header in headers.items()}
    return {"description": STATUSES[status], "headers": named, "content": content(operation, status)}


def content(operation: Operation, status: int) -> JsonObject:
    if status != 200:
        return {"application/json": schema_of((operation.unwell if status == 503 else None) or operation.error)}
    media_types: JsonObject = {operation.media: schema_of(operation.gives)}
    if operation.event:
        # The standard has a place for an event's schema (itemSchema) only since OpenAPI 3.2.
        media_types[MEDIA_TYPE] = {"x-event-schema": schemas()[0][operation.event]}
    return media_types
