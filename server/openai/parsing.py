"""From a body's bytes to a checked request of a type, or to the first thing that is wrong with it."""

import re
from typing import TypeVar

from pydantic import (
    ValidationError,
)
from pydantic_core import from_json

from server.fields import RequestBody
from server.http.errors import ApiError, bad_request

Checked = TypeVar("Checked", bound=RequestBody)


def parse(kind: type[Checked], body: bytes, *, refuse_unknown: bool = False) -> Checked:
    """Parse a JSON body as a request of type `kind`.

    Raises `ApiError` 400 for the first field at fault: one with a wrong value, one that would change the answer and is
    not supported, or with `refuse_unknown` an unknown one.
    """
    fields = _decode(body)
    for name in sorted(kind.unsupported):
        if fields.get(name):
            raise unsupported(name)
    ignored = tuple(key for key, value in fields.items() if key not in kind.model_fields and value is not None)
    if ignored and refuse_unknown:
        raise unsupported(ignored[0])
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        raise explain(error) from None
    request.note(len(body), ignored)
    if request.ignored and refuse_unknown:
        raise unsupported(request.ignored[0])
    return request


MAX_PARTS, MAX_ITEMS = 100_000, 1_000_000
"""Objects, lists and members of a body, and its values. Parsing more would hold the GIL for a tenth of a second."""

MAX_STRINGS = 250_000
"""Strings that are told apart from what is around them; after that many, the rest of a body counts as structure."""


def _decode(body: bytes) -> dict[str, object]:
    if _has_too_many_parts(body):
        raise bad_request(
            f"The body has more than {MAX_PARTS:,} objects, lists and members, or {MAX_ITEMS:,} values.",
            code="too_large",
        )
    try:
        fields = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise bad_request(
            f"The body is not valid JSON: {str(error).split(' at line')[0]}.", code="invalid_json"
        ) from None
    if not isinstance(fields, dict):
        raise bad_request("The body must be a JSON object.")
    return fields


def _has_too_many_parts(body: bytes) -> bool:
    return len(body) > MAX_PARTS and _exceeds(body) and _exceeds(structure(body))


def _exceeds(text: bytes) -> bool:
    """Counts objects, lists and members by their brackets and colons, values by their commas."""
    return sum(map(text.count, b"{[:")) > MAX_PARTS or text.count(b",") > MAX_ITEMS


def structure(body: bytes) -> bytes:
    """JSON without its strings, in which code and tables have brackets, colons and commas of their own.

    In a few calls that each take milliseconds. What is not JSON is parsed up to its fault, and up to there this holds.
    """
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
    return b"".join(unescaped.split(b'"', 2 * MAX_STRINGS)[::2])


def unsupported(name: str) -> ApiError:
    """Repeats the field's name only if it is safe to print in a log or a terminal."""
    shown = name if re.fullmatch(r"[\w.]{1,80}", name, re.ASCII) else None
    field = f"The field {shown}" if shown else "A field of the request"
    return bad_request(f"{field} is not supported.", shown, "unsupported_field")


def explain(error: ValidationError) -> ApiError:
    """One sentence about the first error. Never repeats a value from the request."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    message = first["msg"].removeprefix("Value error, ").removesuffix(".")
    param = ".".join(map(str, first["loc"]))
    if not param:
        return bad_request(f"{message[:1].upper()}{message[1:]}.")
    return bad_request(f"{param}: {message[:1].lower()}{message[1:]}.", param)
