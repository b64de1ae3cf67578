"""From an HTTP request to a checked one: its body is read, decoded and checked, off the event loop if it is large."""

import logging
import re
from functools import partial
from typing import TypeVar

from starlette.requests import Request

from server.body import read_body
from server.errors import ApiError
from server.fields import RequestBody
from server.schema import parse
from server.service import Service

logger = logging.getLogger(__name__)

INLINE_BYTES = 65_536
"""A body of this size is decoded and checked in about a millisecond; larger ones go to a helper thread."""

MAX_NAMED = 20  # ignored fields that a header and a log line name
FIT = re.compile(r"[\w.-]{1,64}", re.ASCII)

Asked = TypeVar("Asked", bound=RequestBody)


def check_content_type(value: str) -> None:
    """Raises `ApiError` 415 for types that are not JSON: a page's form may send those anywhere without being asked."""
    kind = value.partition(";")[0].strip().lower()
    if kind and not (kind in ("application/json", "text/json") or kind.endswith("+json")):
        message = "The body must be JSON; send it with the header content-type: application/json."
        raise ApiError(415, message, code="unsupported_content_type")


async def read(http: Request, kind: type[Asked]) -> Asked:
    """The request of this kind. Raises `ApiError`: 400, 408, 413, 415 or 503.

    Fields that were ignored are named in the answer's `x-ignored-fields`, which `RequestId` writes.
    """
    service: Service = http.app.state.service
    check_content_type(http.headers.get("content-type", ""))
    body = await read_body(http, service.max_body_bytes)
    check = partial(parse, kind, body, refuse_unknown=service.settings.unknown_fields == "refuse")
    small = len(body) <= INLINE_BYTES
    asked = check() if small else await service.encoders.run(check, len(body), http.state.caller)
    if asked.ignored:
        http.app.state.metrics.ignored_fields.inc(len(asked.ignored))
        http.state.ignored = ", ".join(name if FIT.fullmatch(name) else "?" for name in asked.ignored[:MAX_NAMED])
        logger.debug("request %s: ignored fields %s", http.state.caller.request_id, http.state.ignored)
    return asked
