"""From a body's bytes to a checked request of a type, or to the first thing that is wrong with it."""

import re
from collections.abc import Iterator
from typing import TypeVar

from pydantic import ValidationError
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
    unknown = tuple(key for key, value in fields.items() if key not in kind.model_fields and value is not None)
    if unknown and refuse_unknown:
        raise unsupported(unknown[0])
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        raise explain(error) from None
    ignored = unknown + request.skipped
    if ignored and refuse_unknown:
        raise unsupported(ignored[0])
    request.note(len(body), ignored)
    return request


MAX_PARTS, MAX_ITEMS, MAX_BARE_BYTES = 100_000, 2**18, 2**21
"""Objects, lists and members of a body, its values, and its bytes outside of strings, white space aside.

A body is parsed and validated in two calls that hold the GIL; this bounds each to about 30 ms.
"""

PIECE_BYTES = 65_536
"""Bytes of a body that are scanned at a time, in well under a millisecond."""


def _decode(body: bytes) -> dict[str, object]:
    if len(body) > MAX_PARTS:
        check_parts(body)
    try:
        fields = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise bad_request(
            f"The body is not valid JSON: {str(error).split(' at line')[0]}.", code="invalid_json"
        ) from None
    if not isinstance(fields, dict):
        raise bad_request("The body must be a JSON object.")
    return fields


def check_parts(body: bytes) -> None:
    """Raises `ApiError` 400 for more parts than can be parsed at once."""
    parts = items = bare = 0
    for piece in structure(body):
        parts += sum(map(piece.count, b"{[:"))
        items += piece.count(b",")
        bare += len(piece)
        if parts > MAX_PARTS or items > MAX_ITEMS or bare > MAX_BARE_BYTES:
            raise bad_request(
                f"The body has more than {MAX_PARTS:,} objects, lists and members, {MAX_ITEMS:,} values, or "
                f"{MAX_BARE_BYTES // 2**20} MiB outside of strings.",
                code="too_large",
            )


def structure(body: bytes) -> Iterator[bytes]:
    """JSON without its strings and white space, in pieces: code in strings has brackets, colons and commas of its own.

    What is not JSON is parsed up to its fault, and up to there this holds.
    """
    inside, escape = False, b""
    for start in range(0, len(body), PIECE_BYTES):
        piece = escape + body[start : start + PIECE_BYTES]
        whole = piece.rstrip(b"\\")
        escape = b"\\" * ((len(piece) - len(whole)) % 2)  # of the first character of the next piece
        texts = piece.removesuffix(escape).replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')
        yield b"".join(texts[inside::2]).translate(None, b" \t\r\n")
        inside ^= len(texts) % 2 == 0


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
