"""Errors in the form of Anthropic's API."""

import re

import orjson
from starlette.responses import Response

from server.http.errors import ApiError
from server.openai.anthropic_replies import AnthropicError, AnthropicErrorDetails, Unthreaded

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
NO_THREADS: Unthreaded = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
"""By this Anthropic's clients know that they have to send the whole conversation with each of its requests."""


def speaks_anthropic(path: str) -> bool:
    """Whether errors on this path have this form."""
    return PATHS.fullmatch(path) is not None


def error_of(error: ApiError, request_id: str) -> AnthropicError:
    kind = KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    message = (TOO_LONG if error.code == "context_length_exceeded" else "") + error.worded(error.message)
    found: AnthropicErrorDetails = {"type": kind, "message": message}
    if (error.code, error.param) == ("unsupported_field", "thread"):
        found["details"] = NO_THREADS
    return {"type": "error", "error": found, "request_id": request_id}


def response_of(error: ApiError, request_id: str) -> Response:
    headers = {**error.headers, "request-id": request_id}
    body = orjson.dumps(error_of(error, request_id))
    return Response(body, error.status, headers, media_type="application/json")
