"""Request types: a base that tolerates unknown fields, strict numbers, and `parse`, from a body's bytes to such a type.

Lists are `fail_fast`: the first bad item is enough, and a million errors take seconds to build.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, from_json

from server.http.errors import ApiError, bad_request


class Body(BaseModel):
    """An object inside a request. A null counts as a field left out, and unknown fields are ignored.

    The strings below fields are their descriptions in /openapi.json.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return cls._prepared({key: item for key, item in value.items() if item is not None})

    @classmethod
    def _prepared(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields, none of them null, as they are to be checked: types that accept other spellings, or refuse some,
        do it here. Raises ValueError."""
        return fields

    @property
    def skipped(self) -> tuple[str, ...]:
        """Parts of known fields that are ignored, as reported to the client."""
        return ()

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler, /) -> JsonSchemaValue:
        """In the document, too, a field that may be left out may be null."""
        found = handler(core_schema)
        shape = handler.resolve_ref_schema(found)
        required = shape.get("required", ())
        for name, field in shape.get("properties", {}).items():
            if name not in required and not _may_be_null(field):
                described = {key: field.pop(key) for key in ("default", "description", "title") if key in field}
                shape["properties"][name] = {"anyOf": [field, {"type": "null"}]} | described
        return found


def _may_be_null(field: dict[str, Any]) -> bool:
    """Whether a field's schema says so. One without a type takes anything."""
    kinds = field.get("anyOf") or field.get("oneOf") or [field]
    return any(kind.get("type") == "null" or not kind.keys() & {"type", "$ref", "const", "enum"} for kind in kinds)


class RequestBody(Body):
    """A whole request. `unsupported` are fields that are refused, because they would change the answer if they were
    honoured."""

    unsupported: ClassVar[frozenset[str]] = frozenset()

    model: str | None = None


def _integral(value: object) -> object:
    """2.0 is 2, because languages without integers write it that way."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Flag = Annotated[bool, Field(strict=True)]
Integral = BeforeValidator(_integral)
Int64 = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63), Integral]
Tokens = Annotated[int, Field(strict=True, ge=1), Integral]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
"""Without `_integral`, which would add a call for each prompt token."""
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]

NoEffect = Annotated[object, Field(description="Accepted, without effect.")]
"""A known field that does not affect answers here."""


# From bytes to a request

Checked = TypeVar("Checked", bound=RequestBody)


def parse(kind: type[Checked], body: bytes, *, refuse_unknown: bool = False) -> tuple[Checked, tuple[str, ...]]:
    """Parse a JSON body as a request of type `kind`. Also returns what has no effect: unknown fields, and `skipped`.

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
    return request, ignored


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
