"""JSON Schemas as clients send them: what can be compiled within bounds, and how it becomes part of a grammar.

Pure functions; none repeats what was sent but for names of keywords.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from server.errors import ApiError, bad_request

Schema = dict[str, Any]

MAX_BYTES = 128 * 1024  # of schema as compact JSON, all tools together
MAX_DEPTH = 64  # of JSON values inside one another; two a level of nested objects
MAX_NODES = 10_000  # members of all objects and arrays
MAX_MEMBERS = 1000  # of one object; compiling takes time in the square of its properties
MAX_PATTERN = 2000  # characters that a pattern stands for, counted repetitions written out
MAX_MULTIPLE = 10_000  # least common multiple of all multipleOf, each without its decimal point; it becomes states
ROUNDS = 50
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


def refused(message: str, param: str) -> ApiError:
    return bad_request(message, param, "unsupported_schema")


def inline(schema: Schema, strict: bool, param: str) -> str:
    """The schema as part of a grammar. Members keep their order, which is that of the answer's."""
    options = LAYOUT | {"lenient": not strict}
    try:
        text = json.dumps(schema | {"x-guidance": options}, separators=(",", ":"), allow_nan=False)
        return "%json " + (json.dumps(_guarded(json.loads(text)), separators=(",", ":")) if "[^" in text else text)
    except RecursionError:
        raise refused("The schema is nested too deeply.", param) from None
    except ValueError:
        raise refused("The schema is not valid JSON.", param) from None


def _guarded(node: Any, key: str = "") -> Any:
    """The schema with U+0001 kept out of every negated character class in a pattern.

    llguidance lets an escaped quote or backslash through where a class excludes it but no control character.
    """
    match node:
        case dict() if key not in ("const", "default"):
            named = key == "patternProperties"
            return {(_guard(name) if named else name): _guarded(value, name) for name, value in node.items()}
        case list() if key not in ("enum", "examples", "const", "default"):
            return [_guarded(value) for value in node]
        case str() if key == "pattern":
            return _guard(node)
    return node


def _guard(pattern: str) -> str:
    parts = (part[0] for part in PATTERN_PART.finditer(pattern))
    return "".join(
        re.sub(r"^\[\^(\]?)", lambda start: "[^\\x01" + start[1].replace("]", "\\]"), part) for part in parts
    )


def parameters_of(schema: Schema | None, param: str) -> Schema:
    """The schema of a tool's arguments, which are an object whatever it says."""
    if schema is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if schema.get("type", "object") != "object":
        raise refused("The parameters of a function must be of type object.", param)
    return {"type": "object"} | schema


def check_size(size: int, param: str) -> None:
    if size > MAX_BYTES:
        raise refused(f"The schema is too large: at most {MAX_BYTES // 1024} KiB are read.", param)


def check(schema: Schema, strict: bool, param: str) -> None:
    """Refuse what would take the compiler too much time or memory, or end it, and what no answer could satisfy.

    Keywords are told by their names alone, so data that looks like one counts as one. Raises `ApiError` 400.
    """
    multiple, references = 1, set()
    for nodes, (depth, key, value) in enumerate(_walk(schema)):
        if depth > MAX_DEPTH:
            raise refused("The schema is nested too deeply.", param)
        if nodes > MAX_NODES or (isinstance(value, dict) and len(value) > MAX_MEMBERS):
            raise refused("The schema has more members than can be compiled.", param)
        match key, value:
            case "pattern", str() if written_out(value) > MAX_PATTERN:
                raise refused("A pattern in the schema repeats too much.", param)
            case "multipleOf", int() | float() if not isinstance(value, bool):
                multiple = math.lcm(multiple, _digits(value))
            case "$ref", str():
                references.add(value)
        if strict and isinstance(value, dict) and _counts_properties(value):
            raise refused("The schema uses minProperties in a way that cannot be enforced.", param)
    if multiple > MAX_MULTIPLE:
        raise refused("The schema uses multipleOf with numbers that are too large.", param)
    if not terminates(schema, references):
        raise refused("The schema refers to itself without an end, so no answer could satisfy it.", param)


def _walk(schema: Schema) -> Iterator[tuple[int, str, Any]]:
    """Every value inside, with its depth and the name of the member it is, without recursion."""
    todo: list[tuple[int, str, Any]] = [(1, "", schema)]
    while todo:
        depth, key, value = todo.pop()
        yield depth, key, value
        if isinstance(value, dict):
            todo.extend((depth + 1, name, inner) for name, inner in value.items())
        elif isinstance(value, list):
            todo.extend((depth + 1, "", inner) for inner in value)


def _digits(number: float) -> int:
    """A number without sign and decimal point: 25 for 0.25."""
    digits = Decimal(str(number)).normalize().as_tuple()
    return int("".join(map(str, digits.digits)) + "0" * max(int(digits.exponent), 0)) or 1


def _counts_properties(schema: Schema) -> bool:
    """Whether names are counted that may be repeated, because a grammar does not remember those it has let pass."""
    least, required = schema.get("minProperties"), schema.get("required")
    return isinstance(least, int) and least > max(1, len(required) if isinstance(required, list) else 0)


PATTERN_PART = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL)


def written_out(pattern: str) -> int:
    """Roughly how many characters a pattern has once counted repetitions, also nested ones, are written out."""
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


def terminates(schema: Schema, references: set[str]) -> bool:
    """Whether a value of finite size can satisfy the schema, as far as references to itself go.

    Starts with no reference known to be finite and adds those that the known ones make so, until there are no more.
    """
    targets = {ref: _resolve(schema, ref) for ref in references}
    finite: set[str] = {ref for ref, target in targets.items() if target is None}
    for _ in range(ROUNDS):
        seen: dict[int, bool] = {}
        found = {ref for ref, target in targets.items() if ref in finite or _finite(target, finite, seen)}
        if found == finite:
            return _finite(schema, finite, {})
        finite = found
    return True


def _resolve(schema: Schema, reference: str) -> Any:
    """What a reference into the schema points to; None for any other, which is the compiler's to judge."""
    if not reference.startswith("#") or (reference != "#" and not reference.startswith("#/")):
        return None
    node: Any = schema
    for name in unquote(reference).split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict):
            node = node.get(name)
        elif isinstance(node, list) and name.isdecimal() and int(name[:9]) < len(node):
            node = node[int(name[:9])]
        else:
            return None
    return node


def _finite(node: Any, finite: set[str], seen: dict[int, bool]) -> bool:
    if not isinstance(node, dict) or "const" in node or "enum" in node:
        return True
    if id(node) not in seen:
        seen[id(node)] = True
        seen[id(node)] = _is_finite(node, lambda inner: _finite(inner, finite, seen), finite)
    return seen[id(node)]


def _is_finite(node: Schema, inner: Callable[[Any], bool], finite: set[str]) -> bool:
    reference = node.get("$ref")
    if isinstance(reference, str) and reference not in finite:
        return False
    if not all(map(inner, _listed(node, "allOf"))):
        return False
    for choice in map(_listed, (node, node), ("anyOf", "oneOf")):
        if choice and not any(map(inner, choice)):
            return False
    if node.get("type") in ("object", ["object"]):
        properties = node.get("properties")
        fields = properties if isinstance(properties, dict) else {}
        rest = node.get("additionalProperties", True)
        return all(inner(fields.get(name, rest)) for name in _listed(node, "required") if isinstance(name, str))
    if node.get("type") in ("array", ["array"]) and isinstance(least := node.get("minItems", 0), int):
        first = _listed(node, "prefixItems")[: max(least, 0)]
        return all(map(inner, first)) and (least <= len(first) or inner(node.get("items", True)))
    return True


def _listed(node: Schema, key: str) -> list[Any]:
    value = node.get(key)
    return value if isinstance(value, list) else []
