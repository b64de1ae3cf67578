"""The document of /openapi.json, from the types that check requests. Made on a helper thread when first asked for.

A new endpoint is one entry in `OPERATIONS`. The paths without /v1 are left out: they are the same handlers again.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias

import orjson
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from server import replies
from server.metrics import CONTENT_TYPE
from server.response_request import ResponseRequest
from server.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from server.sse import MEDIA_TYPE
from server.version import VERSION

Json: TypeAlias = dict[str, Any]

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

HEADERS: Json = {
    "RequestId": {"description": "The request's id, as in the log.", "schema": {"type": "string"}},
    "RetryAfter": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 0}},
    "Authenticate": {"description": "The scheme of keys.", "schema": {"const": "Bearer"}},
}


@dataclass(frozen=True)
class Operation:
    """One method of one path. `examples` are bodies without their model."""

    path: str
    summary: str
    gives: type[BaseModel] | str
    """The answer's type, or the media type of a text."""
    takes: type[BaseModel] | None = None
    event: type[BaseModel] | None = None
    """What a stream is made of."""
    about: str = ""
    errors: tuple[int, ...] = ()
    unwell: type[BaseModel] = replies.Error
    """What a 503 holds."""
    open: bool = False
    """Whether no API key is asked for."""
    examples: Json = field(default_factory=dict)

    @property
    def method(self) -> str:
        return "post" if self.takes else "get"


HI = [{"role": "user", "content": "Say hello."}]

OPERATIONS = (
    Operation(
        "/v1/chat/completions",
        "Continue a conversation",
        replies.ChatCompletion,
        ChatRequest,
        replies.ChatChunk,
        CHUNKS,
        errors=(*READING, 429, 504),
        examples={
            "Plain": {"messages": HI, "max_tokens": 64},
            "Streamed": {"messages": HI, "stream": True, "stream_options": {"include_usage": True}},
        },
    ),
    Operation(
        "/v1/completions",
        "Continue a text",
        replies.TextCompletion,
        CompletionRequest,
        replies.TextChunk,
        CHUNKS,
        errors=(*READING, 429, 504),
        examples={
            "Plain": {"prompt": "Once upon a time", "max_tokens": 64},
            "Streamed": {"prompt": "Once upon a time", "stream": True},
        },
    ),
    Operation(
        "/v1/responses",
        "Continue a conversation, in OpenAI's newer form",
        replies.Answered,
        ResponseRequest,
        replies.AnswerEvent,
        EVENTS,
        errors=(*READING, 429, 504),
        examples={
            "Plain": {"input": "Say hello.", "max_output_tokens": 64},
            "Streamed": {"input": "Say hello.", "stream": True},
        },
    ),
    Operation(
        "/v1/tokenize",
        "Count tokens as the model does",
        replies.Tokenized,
        TokenizeRequest,
        errors=READING,
        examples={"Of a text": {"prompt": "Once upon a time"}, "Of a conversation": {"messages": HI}},
    ),
    Operation(
        "/v1/detokenize",
        "The text of token ids",
        replies.Detokenized,
        DetokenizeRequest,
        errors=READING,
        examples={"Plain": {"tokens": [1, 2, 3]}},
    ),
    Operation("/v1/models", "The names the model is served under", replies.ModelList, errors=(500,)),
    Operation("/v1/models/{name}", "One of these names", replies.Model, errors=(404, 500)),
    Operation("/health", "Whether requests are taken", replies.Health, errors=(503,), unwell=replies.Health, open=True),
    Operation("/health/ready", "The same", replies.Health, errors=(503,), unwell=replies.Health, open=True),
    Operation(
        "/health/live",
        "Whether the process can still come to serve: a 503 means that it needs a restart",
        replies.Health,
        errors=(503,),
        unwell=replies.Health,
        open=True,
    ),
    Operation("/metrics", "Metrics for Prometheus", CONTENT_TYPE, open=True),
    Operation("/version", "What runs", replies.Version),
)


class Untitled(GenerateJsonSchema):
    """A field's title would be its name again."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@cache
def encoded(model: str, keyed: bool) -> bytes:
    return orjson.dumps(document(model, keyed))


def document(model: str, keyed: bool) -> Json:
    """The OpenAPI 3.1 document. `model` is the name in its examples; `keyed`, whether API keys are asked for."""
    paths = {each.path: {each.method: describe(each, model, keyed)} for each in OPERATIONS}
    security = {"securitySchemes": {"apiKey": {"type": "http", "scheme": "bearer"}}} if keyed else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": "microbatch", "version": VERSION, "description": ABOUT},
        "paths": paths,
        "components": {"schemas": schemas(), "headers": HEADERS} | security,
    }


def schemas() -> Json:
    """Every type that an operation names, and those that they name in turn."""
    named = [kind for each in OPERATIONS for kind in (each.takes, each.gives, each.event, each.unwell)]
    kinds = dict.fromkeys(kind for kind in named if isinstance(kind, type))
    _, found = models_json_schema(
        [(kind, "validation") for kind in kinds],
        ref_template="#/components/schemas/{model}",
        schema_generator=Untitled,
    )
    definitions: Json = found["$defs"]
    return definitions


def describe(operation: Operation, model: str, keyed: bool) -> Json:
    """The document's Operation Object."""
    asks_key = keyed and not operation.open
    errors = (401, *operation.errors) if asks_key else operation.errors
    responses = {str(status): failure(operation, status) for status in sorted(errors)}
    found: Json = {
        "summary": operation.summary,
        "operationId": operation.path.removeprefix("/v1").strip("/").replace("/", "_").replace("{name}", "one"),
        "responses": {"200": success(operation)} | responses,
    }
    if operation.about:
        found["description"] = operation.about
    if operation.takes:
        found["requestBody"] = request_body(operation, model)
    if "{name}" in operation.path:
        found["parameters"] = [name_of(model)]
    return found | ({"security": [{"apiKey": []}]} if asks_key else {})


def name_of(model: str) -> Json:
    return {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}, "example": model}


def request_body(operation: Operation, model: str) -> Json:
    examples = {name: {"value": {"model": model} | body} for name, body in operation.examples.items()}
    content = {"application/json": {"schema": reference(operation.takes), "examples": examples}}
    return {"required": True, "content": content}


def success(operation: Operation) -> Json:
    if isinstance(operation.gives, str):
        return response(200, {operation.gives: {"schema": {"type": "string"}}})
    content: Json = {"application/json": {"schema": reference(operation.gives)}}
    if operation.event:
        # What an event's data holds has a place in the standard, itemSchema, only from OpenAPI 3.2 on.
        content[MEDIA_TYPE] = {"x-event-schema": reference(operation.event)}
    return response(200, content)


def failure(operation: Operation, status: int) -> Json:
    kind = operation.unwell if status == 503 else replies.Error
    return response(status, {"application/json": {"schema": reference(kind)}})


def response(status: int, content: Json) -> Json:
    headers = {"X-Request-Id": "RequestId"}
    if status in RETRIED_AFTER:
        headers["Retry-After"] = "RetryAfter"
    if status == 401:
        headers["WWW-Authenticate"] = "Authenticate"
    named = {name: {"$ref": f"#/components/headers/{header}"} for name, header in headers.items()}
    return {"description": STATUSES[status], "headers": named, "content": content}


def reference(kind: type[BaseModel] | None) -> Json:
    return {"$ref": f"#/components/schemas/{kind.__name__}"} if kind else {}
