"""Every error a client can get, in OpenAI's shape: one table from exceptions to status, type and code.

Wording matters, because clients classify errors by their text. RAGFlow retries for minutes when a body contains a
number such as that of a throttling status, or words such as those in `RETRIED`; and it gives up at once on a body with
"invalid", "capacity" or "quota" in it. So a 4xx body but for 408 and 429 never contains the former, and a 429 or 503
body never the latter.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import orjson
from starlette.responses import Response

from batching.errors import (
    BatchingError,
    DeadlineExceeded,
    Drained,
    EngineError,
    NotReady,
    OutOfMemory,
    QueueFull,
    TooBusy,
    TooLarge,
)
from server.replies import BUSY, Error, ErrorDetails

RETRIED = re.compile(r"429|500|502|503|504|rate.?limit|server|time.?out|too many|retry|unavailable", re.IGNORECASE)

FINAL = {"x-should-retry": "false"}
"""A retry would do the same work and fail the same way. OpenAI's SDKs, which otherwise send a request up to three times
on a status of 500 or above, honour this header."""

LATER = {"retry-after": "5"}
"""Loading and restarting take seconds, in which OpenAI's SDKs would otherwise have sent all their retries."""


@dataclass
class ApiError(Exception):
    """An error response. `param` names the field at fault, if there is one."""

    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def refusal(self) -> bool:
        """Whether the request was refused before the queue. An accepted request is logged when its row ends."""
        return self.status < 500 or self.code in BUSY or (self.code or "").startswith("service_")

    @property
    def reason(self) -> str | None:
        """The reason to count a refusal by; None for an accepted request, and for what is counted where it is refused:
        by the batcher, or while the model is not ready."""
        if self.code in BUSY:
            return self.code
        return (self.code or "bad_request") if self.status < 500 and self.status != 429 else None

    def body(self) -> bytes:
        """The JSON body."""
        param = self.param and self.worded(self.param)
        details: ErrorDetails = {
            "message": self.worded(self.message),
            "type": self.type,
            "param": param,
            "code": self.code,
        }
        error: Error = {"error": details}
        return orjson.dumps(error)

    def worded(self, text: str) -> str:
        """A text of the body, without what would make clients retry a request that will fail again."""
        if self.status >= 500 or self.status in (408, 429):
            return text
        # Three characters, because with a single one "rate…limit" would still match.
        return RETRIED.sub("[…]", text)

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def thousands(tokens: int) -> str:
    """A short token count such as 34.3k, which cannot be mistaken for a status code."""
    return str(tokens) if tokens < 100 else f"{tokens / 1000:.1f}k"


def from_batching(error: BatchingError) -> ApiError:
    """The error response for a request that the batcher could not answer."""
    match error:
        case QueueFull():
            seconds = str(round(error.retry_after))
            message = f"The queue is full; try again in {seconds} s."
            return ApiError(429, message, "rate_limit_error", "queue_full", headers={"retry-after": seconds})
        case TooBusy():
            seconds = str(round(error.retry_after))
            message = f"The queue is too long to answer this request in time; try again in {seconds} s."
            return ApiError(429, message, "rate_limit_error", "too_busy", headers={"retry-after": seconds})
        case TooLarge():
            message = "This request exceeds the queue limits; ask for fewer choices or fewer tokens."
            return bad_request(message, code="too_large")
        case NotReady():
            return not_ready(error.state)
        case Drained():
            message = "The service is shutting down; send the request again."
            return ApiError(503, message, "server_error", "stopping", headers=LATER)
        case DeadlineExceeded():
            message = "The request did not finish within the time limit."
            return ApiError(504, message, "server_error", "deadline_exceeded", headers=FINAL)
        case OutOfMemory():
            message = "The device ran out of memory on this request."
            return ApiError(500, message, "server_error", "out_of_memory", headers=FINAL)
        case EngineError():
            return ApiError(500, "The model failed on this request.", "server_error", "engine_error")
        case _:
            return internal()


def not_ready(state: str) -> ApiError:
    """The error response while the model is loading or the service is shutting down."""
    message = {
        "starting": "The model is still loading; try again in a few seconds.",
        "draining": "The service is shutting down and accepts no new requests.",
        "stopped": "The service has stopped.",
        "failed": "The model is down; the service needs a restart.",
    }[state]
    return ApiError(503, message, "server_error", f"service_{state}", headers=LATER)


def internal() -> ApiError:
    return ApiError(500, "Internal error; see the service's log for details.", "server_error", "internal_error")
