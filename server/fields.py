"""Building blocks of request types: a base that tolerates unknown fields, and strict numbers.

Lists are `fail_fast`: the first bad item is enough, and a million errors take seconds to build.
"""

from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PrivateAttr,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class Body(BaseModel):
    """An object inside a request. A null counts as a field left out, and unknown fields are ignored.

    The strings below fields are their descriptions in /openapi.json.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: object) -> object:
        return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value

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
    """A whole request of `size` bytes. `ignored` names what had no effect: unknown top-level fields, and `skipped`.

    `unsupported` are fields that are refused, because they would change the answer if they were honoured.
    """

    unsupported: ClassVar[frozenset[str]] = frozenset()

    model: str | None = None
    _ignored: tuple[str, ...] = PrivateAttr(())
    _size: int = PrivateAttr(0)

    @property
    def ignored(self) -> tuple[str, ...]:
        return self._ignored

    @property
    def skipped(self) -> tuple[str, ...]:
        """Parts of known fields that are ignored."""
        return ()

    @property
    def size(self) -> int:
        return self._size

    def note(self, size: int, ignored: tuple[str, ...] = ()) -> None:
        """Record facts about the request's body."""
        self._size, self._ignored = size, ignored


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

Schema: TypeAlias = dict[str, Any]
"""Any JSON value, as it was sent."""
