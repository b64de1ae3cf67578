"""Checks what part of a JSON Schema can be enforced within bounds, before anything is compiled.

Pure functions in linear time. No error repeats client input except names of keywords.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, TypeAlias, TypeGuard
from urllib.parse import unquote

Schema: TypeAlias = dict[str, Any]
"""A JSON Schema, or any JSON object, as it was sent."""

# The keywords of JSON Schema 2020-12, draft 7 and OpenAPI that hold schemas: by name, or alone or in a list.
BY_NAME = frozenset(["properties", "patternProperties", "dependentSchemas", "$defs", "definitions", "schemas"])
ALONE_OR_LISTED = (
    frozenset(["items", "prefixItems", "contains", "additionalItems", "unevaluatedItems"])
    | frozenset(["additionalProperties", "unevaluatedProperties", "propertyNames"])
    | frozenset(["allOf", "anyOf", "oneOf", "not", "if", "then", "else", "components", "contentSchema"])
)


def values(root: object) -> Iterator[tuple[int, str, object]]:
    """Every value inside, data or schema, with its depth and member name, without recursion."""
    todo: list[tuple[int, str, object]] = [(1, "", root)]
    while todo:
        depth, key, value = todo.pop()
        yield depth, key, value
        if isinstance(value, dict):
            todo.extend((depth + 1, name, inner) for name, inner in value.items())
        elif isinstance(value, list):
            todo.extend((depth + 1, "", inner) for inner in value)


def subschemas(schema: Schema) -> Iterator[Schema]:
    """The schema and every object subschema, without recursion."""
    todo: list[object] = [schema]
    while todo:
        if isinstance(node := todo.pop(), dict):
            yield node
            for keyword, value in node.items():
                todo.extend(held(keyword, value))


def held(keyword: str, value: object) -> list[object]:
    """The values at the places where a keyword's value has schemas."""
    if keyword in BY_NAME:
        return list(value.values()) if isinstance(value, dict) else []
    if keyword in ALONE_OR_LISTED:
        return value if isinstance(value, list) else [value]
    return []


def rewritten(schema: Schema, change: Callable[[Schema], Schema]) -> Schema:
    """The schema with its object subschemas replaced. Members keep their order."""
    return mapped(schema, lambda inner: change(inner) if isinstance(inner, dict) else inner)


def mapped(schema: Schema, change: Callable[[object], object]) -> Schema:
    """The schema with its direct subschemas replaced, objects or not. Members keep their order."""
    return {keyword: _mapped(keyword, value, change) for keyword, value in schema.items()}


def _mapped(keyword: str, value: object, change: Callable[[object], object]) -> object:
    if keyword in BY_NAME and isinstance(value, dict):
        return {name: change(inner) for name, inner in value.items()}
    if keyword in ALONE_OR_LISTED:
        return [change(inner) for inner in value] if isinstance(value, list) else change(value)
    return value


def resolve(schema: Schema, reference: str) -> object:
    """The target of a reference into the schema; None for any other reference, which is left to the compiler."""
    if not reference.startswith("#") or (reference != "#" and not reference.startswith("#/")):
        return None
    node: object = schema
    for name in unquote(reference).split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict):
            node = node.get(name)
        elif isinstance(node, list) and name.isdecimal() and int(name[:9]) < len(node):
            node = node[int(name[:9])]
        else:
            return None
    return node


MAX_LENGTH = 256 * 1024  # characters of all schemas in a grammar
MAX_DEPTH = 64  # nesting of JSON values; each level of nested objects takes two
MAX_MEMBERS = 20_000  # total members of all objects and arrays
MAX_PROPERTIES = 1000  # members of one object; compile time is quadratic in them
MAX_PATTERN = 2000  # characters of a pattern with counted repetitions expanded
MAX_PATTERN_LENGTH = 8192
MAX_LITERAL = 2000  # bytes of a name or fixed string; the time of each step is proportional: half a millisecond here
MAX_BITS = 4096  # of an integer; Python refuses to print much longer ones
MAX_MULTIPLE = 10_000  # least common multiple of all multipleOf, without decimal points; it becomes automaton states

MALFORMED = "The schema is not a valid JSON Schema."


class SchemaError(ValueError):
    """A fault in a schema or pattern, as a sentence for the client."""


def bound(*parts: object, length: int = MAX_LENGTH) -> None:
    """Refuse schemas that are too large, of more characters than `length`, reading no more than it takes to find out.

    Raises `SchemaError`, also for numbers that JSON cannot express.
    """
    characters = members = 0
    for part in parts:
        for depth, key, value in values(part):
            inside = len(value) if isinstance(value, dict | list) else 0
            members += inside
            characters += _length(value) + len(key) + 4
            if depth > MAX_DEPTH:
                raise SchemaError("The schema is nested too deeply.")
            if members > MAX_MEMBERS:
                raise SchemaError("The schema has more members than can be compiled.")
            if characters > length:
                raise SchemaError(f"The schema is too large; the limit is {length // 1024} KiB.")


def _length(value: object) -> int:
    """Approximate length of a string or number in JSON."""
    match value:
        case str():
            return len(value)
        case float() if not math.isfinite(value):
            raise SchemaError("The schema is not valid JSON.")
        case int() if value.bit_length() > MAX_BITS:
            raise SchemaError("The schema has a number that is too long.")
        case int():
            return value.bit_length() // 3
        case _:
            return 4


def check_names(schema: Schema) -> None:
    """Refuse names so long that every step would be slow, and more names than can be compiled. Raises `SchemaError`."""
    for _, key, value in values(schema):
        if isinstance(value, dict) and len(value) > MAX_PROPERTIES:
            raise SchemaError("The schema has more members than can be compiled.")
        if _written(key) > MAX_LITERAL:
            raise SchemaError("The schema has a name that is too long.")


# What each keyword may hold


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


def _limit(value: object) -> bool:
    return isinstance(value, bool) or _number(value)  # in draft 4, true makes the other limit exclusive


def _schema(value: object) -> bool:
    return isinstance(value, dict | bool)


def _schemas(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_schema, value))


def _named(value: object) -> bool:
    return isinstance(value, dict) and all(map(_schema, value.values()))


def _strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _types(value: object) -> bool:
    kinds = value if isinstance(value, list) else [value]
    return bool(kinds) and all(isinstance(kind, str) and kind in TYPES for kind in kinds)


TYPES = frozenset(["string", "number", "integer", "boolean", "object", "array", "null"])
FORMS: dict[str, Callable[[object], bool]] = {
    "type": _types,
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), _count),
    **dict.fromkeys(("minimum", "maximum"), _number),
    **dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum"), _limit),
    "multipleOf": lambda value: _number(value) and value > 0,
    **dict.fromkeys(("pattern", "format", "$ref", "$id", "$anchor"), lambda value: isinstance(value, str)),
    "required": _strings,
    "enum": lambda value: isinstance(value, list),
    **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions"), _named),
    **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), _schemas),
    "items": lambda value: _schema(value) or value == [] or _schemas(value),
    **dict.fromkeys(("additionalProperties", "additionalItems"), _schema),
}
"""Checks of keyword values that the compiler requires."""


@dataclass
class Faults:
    """Finds what cannot be enforced in the schemas of one document, which must have passed `bound`."""

    root: Schema
    _multiple: int = 1
    _places: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._places = {id(node) for node in subschemas(self.root)}

    def of(self, node: Schema) -> Iterator[tuple[str, str]]:
        """Keywords of this schema (not its subschemas) that cannot be enforced, each with a sentence that says why."""
        for keyword, value in node.items():
            if keyword in FORMS and not FORMS[keyword](value):
                yield keyword, MALFORMED
            elif sentence := self._fault(keyword, value):
                yield keyword, sentence

    def _fault(self, keyword: str, value: object) -> str | None:
        match keyword, value:
            case "pattern", str() if written_out(value) > MAX_PATTERN:
                return "A pattern in the schema repeats too much."
            case "patternProperties", dict() if any(written_out(name) > MAX_PATTERN for name in value):
                return "A pattern in the schema repeats too much."
            case "enum", []:
                return "No value could satisfy the schema."
            case "const" | "enum", _ if any(_written(text) > MAX_LITERAL for _, _, text in values(value)):
                return "The schema has a fixed value that is too long."
            case "multipleOf", int() | float() if not self._takes_multiple(_digits(value)):
                return "The schema uses multipleOf with numbers that are too large."
            case "$ref", str() if not self._leads_somewhere(value):
                return "A $ref in the schema points nowhere inside it."
        return None

    def _takes_multiple(self, digits: int) -> bool:
        multiple = math.lcm(self._multiple, digits)
        if multiple > MAX_MULTIPLE:
            return False
        self._multiple = multiple
        return True

    def _leads_somewhere(self, reference: str) -> bool:
        """Whether a reference points to a schema in this document or is by name, which is left to the compiler."""
        if reference == "#" or reference.startswith("#/"):
            target = resolve(self.root, reference)
            return isinstance(target, bool) or id(target) in self._places
        return "#/" not in reference


def _written(value: object) -> int:
    """Length in bytes of a string in JSON; 0 for anything else."""
    return len(json.dumps(value, ensure_ascii=False).encode(errors="replace")) if isinstance(value, str) else 0


def counts_properties(schema: Schema) -> bool:
    """Whether the schema counts properties that may repeat, since a grammar cannot remember names it has accepted."""
    least, required = schema.get("minProperties"), schema.get("required")
    return isinstance(least, int) and least > max(1, len(required) if isinstance(required, list) else 0)


def _digits(number: float) -> int:
    """A number without sign and decimal point: 25 for 0.25."""
    digits = Decimal(str(number)).normalize().as_tuple()
    return int("".join(map(str, digits.digits)) + "0" * max(int(digits.exponent), 0)) or 1


# A class may be left open, so that no bracket restarts the search: every character is examined once.
PATTERN_PART = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]?|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL)


def written_out(pattern: str) -> int:
    """Approximate length of a pattern with counted repetitions expanded, nested ones included."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        return len(pattern)
    sums, last = [0], 0
    for part in PATTERN_PART.finditer(pattern):
        match part[0]:
            case "(":
                sums.append(0)
            case ")" if len(sums) > 1:
                last = sums.pop()
                sums[-1] += last
            case _ if part[1]:
                times = max(int(part[1][:9]), int((part[2] or "0")[:9]), 1)
                sums[-1] += last * (times - 1)
                last *= times
            case _:
                last = 1
                sums[-1] += 1
    return sum(sums)
