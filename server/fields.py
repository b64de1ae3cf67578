"""What the types of requests are made of: a base that is liberal about what it does not know, and strict numbers.

Lists say `fail_fast`: what is wrong with the first bad item is enough, and a million errors take seconds to build.
"""

from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator


class Body(BaseModel):
    """An object inside a request. A null is as good as a field left out, and fields that are not here are ignored.

    The strings below fields are what /openapi.json says of them.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: object) -> object:
        return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


class RequestBody(Body):
    """A whole request, of `size` bytes. `ignored` names top-level fields that are not known here, and `skipped`.

    `unsupported` are those that would change the answer if they were honoured, and that are refused for it.
    """

    unsupported: ClassVar[frozenset[str]] = frozenset()

    model: str | None = None
    _ignored: tuple[str, ...] = PrivateAttr(())
    _size: int = PrivateAttr(0)

    @property
    def ignored(self) -> tuple[str, ...]:
        return self._ignored + self.skipped

    @property
    def skipped(self) -> tuple[str, ...]:
        """Parts of known fields that are ignored, too."""
        return ()

    @property
    def size(self) -> int:
        return self._size

    def note(self, size: int, ignored: tuple[str, ...] = ()) -> None:
        """What is known of the body that it came in."""
        self._size, self._ignored = size, ignored


def _integral(value: object) -> object:
    """2.0 is 2: languages without integers write it so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Flag = Annotated[bool, Field(strict=True)]
Integral = BeforeValidator(_integral)
Int64 = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63), Integral]
Tokens = Annotated[int, Field(strict=True, ge=1), Integral]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
"""Without `_integral`, which would be a call for each of a prompt's tokens."""
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]

NoEffect = Annotated[object, Field(description="Accepted and without effect.")]
"""A field that this service knows, and that would not change an answer here."""

Schema: TypeAlias = dict[str, Any]
"""As it was sent: whatever may stand where a keyword has its value."""
