"""Turns JSON Schemas as clients write them into schemas that the compiler can enforce.

Pure functions that build new schemas; their input must have passed `json_schema.bound`.
"""

import json
import re
from collections.abc import Callable, Iterator
from urllib.parse import quote

from server.grammar.json_schema import (
    PATTERN_PART,
    TYPES,
    Faults,
    Schema,
    SchemaError,
    check_names,
    counts_properties,
    held,
    mapped,
    resolve,
    rewritten,
    subschemas,
)

ROUNDS = 50


def terminates(schema: Schema, references: set[str]) -> bool:
    """Whether a value of finite size can satisfy the schema, considering its references to itself.

    A fixed point: starts with no reference known to be finite and adds those that follow until nothing changes.
    """
    targets = {ref: resolve(schema, ref) for ref in references}
    finite: set[str] = {ref for ref, target in targets.items() if target is None}
    for _ in range(ROUNDS):
        seen: dict[int, bool] = {}
        known = {ref for ref, target in targets.items() if ref in finite or _finite(target, finite, seen)}
        if known == finite:
            return _finite(schema, finite, {})
        finite = known
    return True


def _finite(node: object, finite: set[str], seen: dict[int, bool]) -> bool:
    if not isinstance(node, dict) or "const" in node or "enum" in node:
        return True
    if id(node) not in seen:
        seen[id(node)] = True
        seen[id(node)] = _is_finite(node, lambda inner: _finite(inner, finite, seen), finite)
    return seen[id(node)]


def _is_finite(node: Schema, inner: Callable[[object], bool], finite: set[str]) -> bool:
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


def _listed(node: Schema, key: str) -> list[object]:
    value = node.get(key)
    return value if isinstance(value, list) else []


LAYOUT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


def rewrite(schema: Schema, strict: bool) -> Schema:
    """The enforceable part of a schema. Members keep their order, which becomes the answer's order.

    What cannot be enforced is left out, or raises `SchemaError` if the schema is strict. A schema that no answer could
    satisfy always raises it.
    """
    check_names(schema)
    if strict and any(map(counts_properties, subschemas(schema))):
        raise SchemaError("The schema uses minProperties in a way that cannot be enforced.")
    kept = _without_faults(_without_nulls(schema) if strict else tidied(schema), strict)
    if not terminates(kept, set(_references(kept))):
        raise SchemaError("The schema refers to itself endlessly, so no answer could satisfy it.")
    return kept


def inline(schema: Schema, strict: bool) -> str:
    """A rewritten schema as part of a grammar, with its objects closed."""
    options = LAYOUT | {"lenient": not strict}
    return "%json " + json.dumps(_guarded(closed(schema)) | {"x-guidance": options}, separators=(",", ":"))


def without(schema: Schema, keyword: str, keeps: Callable[[object], bool]) -> Schema:
    """The schema without the keyword wherever `keeps` is false for its value."""

    def change(node: Schema) -> Schema:
        if keyword in node and not keeps(node[keyword]):
            node = {key: value for key, value in node.items() if key != keyword} | INSTEAD.get(keyword, {})
        return rewritten(node, change)

    return change(schema)


INSTEAD: dict[str, Schema] = {"patternProperties": {"additionalProperties": True}}
"""What replaces a keyword that is left out, so that everything it allowed stays allowed."""


def _references(schema: Schema) -> Iterator[str]:
    return (reference for node in subschemas(schema) if isinstance(reference := node.get("$ref"), str))


# Liberal reading

SYNONYMS = {
    **dict.fromkeys(("str", "text", "char", "date", "datetime", "time", "uuid", "url", "uri", "email"), "string"),
    **dict.fromkeys(("int", "int32", "int64", "long", "short"), "integer"),
    **dict.fromkeys(("float", "float32", "float64", "double", "decimal", "numeric", "real"), "number"),
    "bool": "boolean",
    **dict.fromkeys(("dict", "map", "struct", "record"), "object"),
    **dict.fromkeys(("list", "tuple", "set", "sequence"), "array"),
    **dict.fromkeys(("none", "nil"), "null"),
}
"""Other languages' names for JSON's types, as tool authors use them."""

TYPE_NAME = re.compile(r"(?P<name>\w+)(?:(?P<array>(?:\[\d*\])+)|\[.*\]|<.*>)?")
"""Python's `list[int]`, Java's `List<Integer>`, TypeScript's `number[]`."""


def tidied(schema: Schema) -> Schema:
    """The schema with the nearest JSON types, with no type for "any", with null where OpenAPI allows it, and without
    null members."""
    kept = {key: value for key, value in schema.items() if value is not None or key in ("const", "default")}
    if "type" in kept:
        kept["type"] = _nearest(kept["type"])
        if kept["type"] is None:
            del kept["type"]
    if kept.get("nullable") is True:
        kept = _nullable({key: value for key, value in kept.items() if key != "nullable"})
    return mapped(kept, _tidied)


def _nullable(schema: Schema) -> Schema:
    """The schema for the same values or null."""
    kept, typed = schema.copy(), schema.get("type")
    if typed is not None:
        kept["type"] = list(dict.fromkeys([*(typed if isinstance(typed, list) else [typed]), "null"]))
    if isinstance(listed := schema.get("enum"), list) and None not in listed:
        kept["enum"] = [*listed, None]
    if combined := {key: kept.pop(key) for key in ("$ref", "allOf", "anyOf", "oneOf") if key in kept}:
        kept["anyOf"] = [combined, {"type": "null"}]
    return kept


def _tidied(inner: object) -> Schema | bool:
    if isinstance(inner, str):  # a type name in place of a property's schema
        inner = {"type": inner}
    if isinstance(inner, dict):
        return tidied(inner)
    return inner if isinstance(inner, bool) else True


def _nearest(kind: object) -> str | list[str | None] | None:
    """One or more types by their JSON Schema names; None for any type."""
    if not isinstance(kind, list):
        return _named(kind)
    kinds = [_named("null" if one is None else one) for one in kind]
    return None if None in kinds else list(dict.fromkeys(kinds)) or None


def _named(kind: object) -> str | None:
    match = TYPE_NAME.fullmatch(kind.strip().lower()) if isinstance(kind, str) else None
    if match is None:
        return None
    name = "array" if match["array"] else match["name"]
    return name if name in TYPES else SYNONYMS.get(name)


def _without_nulls(schema: Schema) -> Schema:
    kept = {key: value for key, value in schema.items() if value is not None or key in ("const", "default")}
    return rewritten(kept, _without_nulls)


# What cannot be enforced


def _without_faults(schema: Schema, strict: bool) -> Schema:
    faults = Faults(schema)

    def change(node: Schema) -> Schema:
        reasons = dict(faults.of(node))
        if strict and reasons:
            raise SchemaError(next(iter(reasons.values())))
        kept = {key: value for key, value in node.items() if key not in reasons}
        return rewritten(_with_a_uri(_of_a_known_draft(kept)), change)

    return change(schema)


DRAFTS = {f"draft-0{n}": f"http://json-schema.org/draft-0{n}/schema#" for n in (4, 6, 7)} | {
    date: f"https://json-schema.org/draft/{date}/schema" for date in ("2019-09", "2020-12")
}


def _of_a_known_draft(schema: Schema) -> Schema:
    """The schema with its draft by the name that the compiler knows, or without one: it would fetch any other."""
    if "$schema" not in schema:
        return schema
    for draft, name in DRAFTS.items():
        if draft in str(schema["$schema"]):
            return schema | {"$schema": name}
    return {key: value for key, value in schema.items() if key != "$schema"}


def _with_a_uri(schema: Schema) -> Schema:
    """The schema with its reference as the URI that the compiler requires: people write names as they are."""
    return schema | {"$ref": quote(schema["$ref"], URI_SIGNS, errors="replace")} if "$ref" in schema else schema


URI_SIGNS = "%#/?:@!$&'()*+,;="


# Closed objects


def closed(schema: Schema) -> Schema:
    """The schema with every object that lists properties restricted to them, unless it says something about others.

    Small models tend to invent properties where they are allowed. Parts that apply to the same object (`allOf`, a
    choice beside `properties` ...) are left as they are, and the restriction to what they list is put beside them.
    """
    shared = {id(part) for node in subschemas(schema) if _is_joined(node) for part in _parts(node, schema)}

    def change(node: Schema) -> Schema:
        kept = rewritten(node, change) | {key: node[key] for key in ("not", "if") if key in node}
        if id(node) in shared:
            return kept
        joined = _is_joined(node)
        limits = _limits([node, *_parts(node, schema)] if joined else [node])
        if not limits:
            return kept
        if joined:
            return kept | {"allOf": [*kept.get("allOf", ()), limits]}
        return kept | limits | {key: limits[key] | kept.get(key, {}) for key in ("properties", "patternProperties")}

    return change(schema)


IN_PLACE = ("allOf", "anyOf", "oneOf", "if", "then", "else", "dependentSchemas")
LISTS = ("properties", "patternProperties", "required", "additionalProperties")


def _is_joined(node: Schema) -> bool:
    """Whether more than one part may list properties of the same object."""
    choices = sum(keyword in node for keyword in IN_PLACE if keyword != "allOf")
    own = any(keyword in node for keyword in LISTS)
    return own + ("$ref" in node) + len(node.get("allOf", ())) + choices > 1


def _parts(node: Schema, root: Schema) -> list[Schema]:
    """The other schemas that apply, or may apply, to the same value as this one."""
    parts: dict[int, Schema] = {id(node): node}
    todo = [node]
    while todo:
        part = todo.pop()
        inner = [one for keyword in IN_PLACE if keyword in part for one in held(keyword, part[keyword])]
        if "$ref" in part:
            inner.append(resolve(root, part["$ref"]))
        for one in inner:
            if isinstance(one, dict) and id(one) not in parts:
                parts[id(one)] = one
                todo.append(one)
    return list(parts.values())[1:]


def _limits(parts: list[Schema]) -> Schema:
    """Keywords that restrict an object to the properties that these parts list; empty if they list none or say more."""
    if any("additionalProperties" in part or part.get("unevaluatedProperties", False) is not False for part in parts):
        return {}
    if not any("properties" in part or "patternProperties" in part for part in parts):
        return {}
    listed = [name for part in parts for name in part.get("properties", {})]
    patterns = {name: True for part in parts for name in part.get("patternProperties", {})}
    required = [name for part in parts for name in part.get("required", ())]
    names = dict.fromkeys([*listed, *required], True)
    return {"properties": names, "patternProperties": patterns, "additionalProperties": False}


# Patterns


def _guarded(node: Schema) -> Schema:
    """The schema with U+0001 kept out of every negated character class in a pattern.

    The compiler lets an escaped quote or backslash through a class that excludes it but no control character.
    """
    kept = rewritten(node, _guarded)
    if "pattern" in kept:
        kept["pattern"] = _guard(kept["pattern"])
    if "patternProperties" in kept:
        kept["patternProperties"] = {_guard(name): inner for name, inner in kept["patternProperties"].items()}
    return kept


def _guard(pattern: str) -> str:
    """The first character of a class stays itself: a bracket would now end it, and a dash make a range."""
    parts = (part[0] for part in PATTERN_PART.finditer(pattern))
    return "".join(re.sub(r"^\[\^([]-]?)", lambda start: "[^\\x01" + re.escape(start[1]), part) for part in parts)
