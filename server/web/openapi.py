"""The document of /openapi.json, from the types that check requests and those of what is answered. Made on a helper
thread when first asked for.

A new endpoint is one entry in `OPERATIONS`. The paths without /v1 are left out: they are the same handlers again.
"""

from dataclasses import dataclass, field
from functools import cache, partial
from typing import TypeAlias

import orjson
from pydantic import ConfigDict, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from server import replies
from server.observe.metrics import CONTENT_TYPE
from server.openai.requests import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from server.openai.responses_request import ResponseRequest
from server.sse import MEDIA_TYPE
from server.version import VERSION

JsonObject: TypeAlias = dict[str, object]

ABOUT = """An OpenAI-compatible server of one model that answers several requests in one batch.

Every path under /v1 is also there without it. A field that is not listed is ignored and named in the
answer's X-Ignored-Fields, unless it would change the answer and cannot be honoured: then it is refused by its name.
An answer names its request in X-Request-Id, which a client may set: up to 64 letters, digits and characters of `_.:-`.
"""

CHUNKS = (
    "With `stream` the answer comes as server-sent events: `data: ` and the JSON of one chunk, an empty line, and at "
    "last `data: [DONE]`. An answer that fails midway ends with an event that holds an error, and no `[DONE]`."
)
EVENTS = (
    "With `stream` the answer comes as server-sent events, each with its type in both the frame and the JSON. The last "
    "is response.completed, response.incomplete, or response.failed. Nothing is stored, so an answer cannot be had a "
    "second time, and every path under this one is a 404."
)

STATUSES = {
    200: "The answer.",
    400: "The request is not valid; `param` names the first field at fault.",
    401: "A known API key is needed.",
    404: "There is no model of that name.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is of another type than JSON.",
    429: "All places in the queue are taken.",
    500: "The model or the service failed on this request.",
    503: "The model is loading, or the service is stopping.",
    504: "The time limit for requests passed.",
}
RETRIED_AFTER = (429, 503)
READING = (400, 404, 408, 413, 415, 500, 503)
"""What can go wrong with any request that has a body."""
QUEUED = (429, 504)
"""And with one that waits for its turn."""

HEADERS = {
    "RequestId": {"description": "The request's id, as in the log.", "schema": {"type": "string"}},
    "RetryAfter": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 0}},
    "Authenticate": {"description": "The scheme of keys.", "schema": {"const": "Bearer"}},
}
NAME: JsonObject = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}


@dataclass(frozen=True)
class Operation:
    """One method of one path, by the types of what it takes and gives. `examples` are bodies without their model."""

    path: str
    summary: str
    gives: object
    takes: object = None
    event: object = None
    """What a stream is made of."""
    about: str = ""
    examples: dict[str, JsonObject] = field(default_factory=dict)
    errors: tuple[int, ...] = ()
    """Besides those that all of its kind can give."""
    unwell: object = replies.Error
    """What a 503 holds."""
    media: str = "application/json"
    open: bool = False
    """Whether no API key is asked for."""

    @property
    def method(self) -> str:
        return "post" if self.takes else "get"

    def statuses(self, asks_key: bool) -> list[int]:
        errors = [*self.errors, *(READING if self.takes else ()), *(QUEUED if self.event else ())]
        return [200, *sorted(errors + [401] * asks_key)]


HI = [{"role": "user", "content": "Say hello."}]
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
        {"Plain": {"messages": HI, "max_tokens": 64}, "Streamed": {"messages": HI} | STREAMED},
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
        "Continue a conversation, in OpenAI's newer form",
        replies.Response,
        ResponseRequest,
        replies.ResponseEvent,
        EVENTS,
        {
            "Plain": {"input": "Say hello.", "max_output_tokens": 64},
            "Streamed": {"input": "Say hello.", "stream": True},
        },
    ),
    Operation(
        "/v1/tokenize",
        "Count tokens as the model does",
        replies.Tokenized,
        TokenizeRequest,
        examples={"Of a text": ONCE, "Of a conversation": {"messages": HI}},
    ),
    Operation(
        "/v1/detokenize",
        "The text of token ids",
        replies.Detokenized,
        DetokenizeRequest,
        examples={"Plain": {"tokens": [1, 2, 3]}},
    ),
    Operation("/v1/models", "The names the model is served under", replies.ModelList, errors=(500,)),
    Operation("/v1/models/{name}", "One of these names", replies.Model, errors=(404, 500)),
    health("/health", "Whether requests are taken"),
    health("/health/ready", "The same"),
    health("/health/live", "Whether the process can still come to serve: a 503 means that it needs a restart"),
    Operation("/metrics", "Metrics for Prometheus", str, media=CONTENT_TYPE, open=True),
    Operation("/version", "What runs", replies.Version),
)


class Untitled(GenerateJsonSchema):
    """A field's title would be its name again."""

    def field_title_should_be_set(self, schema: object) -> bool:
        return False


@cache
def schemas() -> tuple[dict[object, JsonObject], JsonObject]:
    """The schema of each type that an operation names, most a reference, and the components that these refer to."""
    named = [kind for each in OPERATIONS for kind in (each.takes, each.gives, each.event, each.unwell) if kind]
    kinds = tuple(dict.fromkeys(named))
    config = ConfigDict(use_attribute_docstrings=True, arbitrary_types_allowed=True)
    together = TypeAdapter(tuple[kinds], config=config)  # type: ignore[valid-type]
    found = together.json_schema(ref_template="#/components/schemas/{model}", schema_generator=Untitled)
    return dict(zip(kinds, found["prefixItems"], strict=True)), found["$defs"]


def schema_of(kind: object) -> JsonObject:
    return {"schema": schemas()[0][kind]}


@cache
def encoded(model: str, keyed: bool) -> bytes:
    return orjson.dumps(document(model, keyed))


def document(model: str, keyed: bool) -> JsonObject:
    """The OpenAPI 3.1 document. `model` is the name in its examples; `keyed`, whether API keys are asked for."""
    security = {"securitySchemes": {"apiKey": {"type": "http", "scheme": "bearer"}}} if keyed else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": "microbatch", "version": VERSION, "description": ABOUT},
        "paths": {each.path: {each.method: describe(each, model, keyed)} for each in OPERATIONS},
        "components": {"schemas": schemas()[1], "headers": HEADERS} | security,
    }


def describe(operation: Operation, model: str, keyed: bool) -> JsonObject:
    """The document's Operation Object."""
    asks_key = keyed and not operation.open
    found: JsonObject = {
        "summary": operation.summary,
        "description": operation.about,
        "operationId": operation.path.removeprefix("/v1").strip("/").replace("/", "_").replace("{name}", "one"),
        "parameters": [NAME | {"example": model}] if "{name}" in operation.path else None,
        "requestBody": request_body(operation, model) if operation.takes else None,
        "responses": {str(status): response(operation, status) for status in operation.statuses(asks_key)},
        "security": [{"apiKey": []}] if asks_key else None,
    }
    return {key: value for key, value in found.items() if value}


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
        return {"application/json": schema_of(operation.unwell if status == 503 else replies.Error)}
    found: JsonObject = {operation.media: schema_of(operation.gives)}
    if operation.event:
        # What an event's data holds has a place in the standard, itemSchema, only from OpenAPI 3.2 on.
        found[MEDIA_TYPE] = {"x-event-schema": schemas()[0][operation.event]}
    return found
