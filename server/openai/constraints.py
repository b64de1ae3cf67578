"""What an answer must match, under all the names that it has: those of OpenAI, vLLM, SGLang, llama.cpp and TGI.

All of them become one `Part` or `Pattern` of a grammar.
"""

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import from_json

from server.fields import Body, Flag, NoEffect
from server.grammar.json_schema import Schema
from server.grammar.pattern import Kind, Pattern
from server.grammar.source import Part

MAX_TEXT = 2**16  # characters of a pattern
MAX_OFFERED = 1024  # strings to choose from

Constraint: TypeAlias = Part | Pattern


def _schema(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return from_json(value, allow_inf_nan=False)
    except ValueError:
        raise ValueError("must be a JSON Schema, as an object or as its JSON text") from None


def _bounded(choices: list[str]) -> list[str]:
    if sum(map(len, choices)) > MAX_TEXT:
        raise ValueError(f"the choices can have at most {MAX_TEXT:,} characters together")
    return choices


AnySchema = Annotated[Schema, BeforeValidator(_schema, json_schema_input_type=Schema | str)]
Text = Annotated[str, Field(strict=True, min_length=1, max_length=MAX_TEXT)]
Choices = Annotated[
    list[Text],
    Field(min_length=1, max_length=MAX_OFFERED, fail_fast=True),
    AfterValidator(_bounded),
]


class JsonSchema(Body):
    """`json_schema` of a response format.

    With `strict`, a schema that cannot be enforced completely is refused; otherwise the rest is left to the model.
    """

    name: str | None = None
    """The schema's name; it has no effect."""
    description: str | None = None
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: Flag | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema", "json", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    schema_: Annotated[AnySchema | None, Field(alias="schema")] = None
    """The schema itself, for any JSON type, as in llama.cpp."""
    regex: Text | None = None
    """For the type regex; also called pattern."""
    grammar: Text | None = None
    """For the type grammar: GBNF or Lark."""
    value: object = None
    """What the type needs, as in TGI: a schema, a regular expression or a grammar."""

    @classmethod
    def _prepared(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Puts the field `value`, or `pattern`, under the name that its type says."""
        kind = fields.get("type")
        if kind == "regex" and "pattern" in fields:
            fields["regex"] = fields["pattern"]
        if "value" not in fields:
            return fields
        given = fields.pop("value")
        match kind:
            case "json" | "json_object" | "json_schema":
                whole = isinstance(given, dict) and isinstance(given.get("schema"), dict)
                field = "json_schema" if whole and kind == "json_schema" else "schema"
            case "regex" | "grammar":
                field = kind
            case _:
                raise ValueError("value needs the type json, json_object, json_schema, regex or grammar")
        if field in fields:
            raise ValueError(f"value and {field} are the same, so send only one of the two")
        return fields | {field: given}

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> Self:
        schemas = [schema for schema in (self.json_schema, self.schema_) if schema is not None]
        if self.type == "json_schema" and not schemas:
            raise ValueError("the type json_schema needs a json_schema")
        if len(schemas) > self.type.startswith("json") or (self.json_schema and self.type != "json_schema"):
            raise ValueError("json_schema needs the type json_schema, and only one schema can be given")
        for kind in ("regex", "grammar"):
            if (getattr(self, kind) is None) == (self.type == kind):
                raise ValueError(f"the field {kind} and the type {kind} need each other")
        return self

    @property
    def constraint(self) -> Constraint | None:
        """None for text."""
        param = "response_format"
        if self.regex is not None:
            return Pattern("regex", (self.regex,), param)
        if self.grammar is not None:
            return Pattern("grammar", (self.grammar,), param)
        if self.json_schema is not None:
            return Part(self.json_schema.schema_, bool(self.json_schema.strict), param)
        if self.schema_ is not None:
            return Part(self.schema_, strict=False, param=param)
        return None if self.type == "text" else any_object(param)


class StructuredOutputs(Body):
    """As in vLLM; exactly one of these."""

    json_: Annotated[AnySchema | None, Field(alias="json")] = None
    json_object: Flag | None = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    """GBNF or Lark."""
    disable_fallback: NoEffect = None
    disable_any_whitespace: NoEffect = None

    @classmethod
    def _prepared(cls, fields: dict[str, Any]) -> dict[str, Any]:
        for name in ("structural_tag", "whitespace_pattern", "disable_additional_properties"):
            if fields.get(name):
                raise ValueError(f"{name} is not supported")
        return fields

    @property
    def constraints(self) -> list[Constraint]:
        found = _named(self, INNER, "structured_outputs.")
        return [*found, *([any_object("structured_outputs.json_object")] if self.json_object else [])]


INNER: dict[str, Literal["json"] | Kind] = {"json_": "json", "regex": "regex", "choice": "choice", "grammar": "grammar"}
OUTER: dict[str, Literal["json"] | Kind] = {
    "guided_json": "json",
    "json_schema": "json",
    "guided_regex": "regex",
    "regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "ebnf": "grammar",
    "grammar": "grammar",
}


class Constraints(Body):
    """The fields that constrain an answer, besides a response format; request types inherit from this one."""

    structured_outputs: StructuredOutputs | None = None
    guided_json: AnySchema | None = None
    """The older form of `structured_outputs.json`."""
    guided_regex: Text | None = None
    """The older form of `structured_outputs.regex`."""
    guided_choice: Choices | None = None
    """The older form of `structured_outputs.choice`."""
    guided_grammar: Text | None = None
    """The older form of `structured_outputs.grammar`."""
    guided_decoding_backend: NoEffect = None
    regex: Text | None = None
    """SGLang's name for `structured_outputs.regex`."""
    ebnf: Text | None = None
    """SGLang's name for `structured_outputs.grammar`."""
    json_schema: AnySchema | None = None
    """SGLang's and llama.cpp's name for `structured_outputs.json`."""
    grammar: Text | None = None
    """llama.cpp's name for `structured_outputs.grammar`."""


CONSTRAINING = frozenset([*OUTER, "structured_outputs", "response_format"])
"""Fields that constrain an answer. At most one of them may be set."""


def constraints_of(body: Constraints, wanted: ResponseFormat | None) -> list[Constraint]:
    """All that the answer must match; `wanted` is the response format."""
    found = [wanted.constraint] if wanted and wanted.constraint else []
    return [*found, *(body.structured_outputs.constraints if body.structured_outputs else ()), *_named(body, OUTER)]


def any_object(param: str) -> Part:
    return Part({"type": "object"}, strict=True, param=param)


def _named(body: Body, names: dict[str, Literal["json"] | Kind], prefix: str = "") -> list[Constraint]:
    """The constraints in the fields of these names that are set."""
    given = [(name, kind, value) for name, kind in names.items() if (value := getattr(body, name)) is not None]
    return [_constraint(kind, value, prefix + name.rstrip("_")) for name, kind, value in given]


def _constraint(kind: Literal["json"] | Kind, value: Any, param: str) -> Constraint:
    if kind == "json":
        return Part(value, strict=False, param=param)
    return Pattern(kind, tuple(value) if kind == "choice" else (value,), param)
