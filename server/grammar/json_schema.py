"""What of a JSON Schema can be held to within bounds, told before anything is compiled.

Pure functions, linear in what they are given. None repeats what was sent but for names of keywords.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TypeGuard
from urllib.parse import unquote

from server.fields import Schema

# The keywords of JSON Schema 2020-12, draft 7 and OpenAPI that hold schemas: by name, or alone or in a list.
BY_NAME = frozenset(["properties", "patternProperties", "dependentSchemas", "$defs", "definitions", "schemas"])
ALONE_OR_LISTED = (
    frozenset(["items", "prefixItems", "contains", "additionalItems", "unevaluatedItems"])
    | frozenset(["additionalProperties", "unevaluatedProperties", "propertyNames"])
    | frozenset(["allOf", "anyOf", "oneOf", "not", "if", "then", "else", "components", "contentSchema"])
)


def values(root: object) -> Iterator[tuple[int, str, object]]:
    """Every value inside, data or schema, with its depth and the name of the member it is, without recursion."""
    todo: list[tuple[int, str, object]] = [(1, "", root)]
    while todo:
        depth, key, value = todo.pop()
        yield depth, key, value
        if isinstance(value, dict):
            todo.extend((depth + 1, name, inner) for name, inner in value.items())
        elif isinstance(value, list):
            todo.extend((depth + 1, "", inner) for inner in value)


def subschemas(schema: Schema) -> Iterator[Schema]:
    """The schema and every one in it that is an object, without recursion."""
    todo: list[object] = [schema]
    while todo:
        if isinstance(node := todo.pop(), dict):
            yield node
            for keyword, value in node.items():
                todo.extend(held(keyword, value))


def held(keyword: str, value: object) -> list[object]:
    """What stands where a keyword's value has schemas."""
    if keyword in BY_NAME:
        return list(value.values()) if isinstance(value, dict) else []
    if keyword in ALONE_OR_LISTED:
        return value if isinstance(value, list) else [value]
    return []


def rewritten(schema: Schema, change: Callable[[Schema], Schema]) -> Schema:
    """The schema with those in it that are objects replaced. Members keep their order."""
    return mapped(schema, lambda inner: change(inner) if isinstance(inner, dict) else inner)


def mapped(schema: Schema, change: Callable[[object], object]) -> Schema:
    """The schema with what stands where it has schemas, an object or not, replaced. Members keep their order."""
    return {keyword: _mapped(keyword, value, change) for keyword, value in schema.items()}


def _mapped(keyword: str, value: object, change: Callable[[object], object]) -> object:
    if keyword in BY_NAME and isinstance(value, dict):
        return {name: change(inner) for name, inner in value.items()}
    if keyword in ALONE_OR_LISTED:
        return [change(inner) for inner in value] if isinstance(value, list) else change(value)
    return value


def resolve(schema: Schema, reference: str) -> object:
    """What a reference into the schema points to; None for any other, which is the compiler's to judge."""
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


MAX_LENGTH = 256 * 1024  # characters of all schemas of one answer, as they were sent
MAX_DEPTH = 64  # of JSON values inside one another; two a level of nested objects
MAX_MEMBERS = 20_000  # of all objects and arrays
MAX_PROPERTIES = 1000  # members of one object; compiling takes time in the square of them
MAX_PATTERN = 2000  # characters that a pattern stands for, counted repetitions written out
MAX_PATTERN_LENGTH = 8192
MAX_LITERAL = 2000  # bytes of a name or a fixed string; each step takes time in proportion: half a millisecond here
MAX_BITS = 4096  # of an integer; Python writes no much longer one
MAX_MULTIPLE = 10_000  # least common multiple of all multipleOf, each without its decimal point; it becomes states

MALFORMED = "The schema is not a valid JSON Schema."


class SchemaError(ValueError):
    """What is wrong with a schema, as a sentence for whoever sent it."""


def bound(*parts: object) -> None:
    """Refuse what is too large to be looked at, at the cost of what is read before that is known.

    Raises `SchemaError`; also for a number that JSON has no form for.
    """
    length = members = 0
    for part in parts:
        for depth, key, value in values(part):
            inside = len(value) if isinstance(value, dict | list) else 0
            members += inside
            length += _length(value) + len(key) + 4
            if depth > MAX_DEPTH:
                raise SchemaError("The schema is nested too deeply.")
            if members > MAX_MEMBERS:
                raise SchemaError("The schema has more members than can be compiled.")
            if length > MAX_LENGTH:
                raise SchemaError(f"The schema is too large: at most {MAX_LENGTH // 1024} KiB are read.")


def _length(value: object) -> int:
    """Roughly how many characters a string or number is in JSON."""
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
    """Refuse names that would make every step slow, and more of them than can be compiled. Raises `SchemaError`."""
    for _, key, value in values(schema):
        if isinstance(value, dict) and len(value) > MAX_PROPERTIES:
            raise SchemaError("The schema has more members than can be compiled.")
        if _written(key) > MAX_LITERAL:
            raise SchemaError("The schema has a name that is too long.")


# What single keywords may say


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


def _limit(value: object) -> bool:
    return isinstance(value, bool) or _number(value)  # draft 4 says by true that the other limit is exclusive


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
"""What the value of a keyword must be for the compiler to read it."""


@dataclass
class Faults:
    """Finds what cannot be held to in the schemas of one document, which must be bounded."""

    root: Schema
    _multiple: int = 1
    _places: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._places = {id(node) for node in subschemas(self.root)}

    def of(self, node: Schema) -> Iterator[tuple[str, str]]:
        """Keywords of this schema, not of those in it, each with a sentence that says why it cannot be held to."""
        for keyword, value in node.items():
            if keyword in FORMS and not FORMS[keyword](value):
                yield keyword, MALFORMED
            elif told := self._told(keyword, value):
                yield keyword, told

    def _told(self, keyword: str, value: object) -> str | None:
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
                return "A $ref in the schema points to nothing inside it."
        return None

    def _takes_multiple(self, digits: int) -> bool:
        multiple = math.lcm(self._multiple, digits)
        if multiple > MAX_MULTIPLE:
            return False
        self._multiple = multiple
        return True

    def _leads_somewhere(self, reference: str) -> bool:
        """Whether it is one to a schema in this document, or one by a name, which is the compiler's to judge."""
        if reference == "#" or reference.startswith("#/"):
            target = resolve(self.root, reference)
            return isinstance(target, bool) or id(target) in self._places
        return "#/" not in reference


def _written(value: object) -> int:
    """Bytes of a string in JSON; 0 for anything else."""
    return len(json.dumps(value, ensure_ascii=False).encode(errors="replace")) if isinstance(value, str) else 0


def counts_properties(schema: Schema) -> bool:
    """Whether names are counted that may be repeated, because a grammar does not remember those it has let pass."""
    least, required = schema.get("minProperties"), schema.get("required")
    return isinstance(least, int) and least > max(1, len(required) if isinstance(required, list) else 0)


def _digits(number: float) -> int:
    """A number without sign and decimal point: 25 for 0.25."""
    digits = Decimal(str(number)).normalize().as_tuple()
    return int("".join(map(str, digits.digits)) + "0" * max(int(digits.exponent), 0)) or 1


# A class may be left open, so that no bracket makes the search start over: each character is looked at once.
PATTERN_PART = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]?|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL)


def written_out(pattern: str) -> int:
    """Roughly how many characters a pattern has once counted repetitions, also nested ones, are written out."""
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
