"""Where JSON Schemas hold other schemas: the one walk that reading and rewriting them share."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias
from urllib.parse import unquote

Schema: TypeAlias = dict[str, Any]
"""As it was sent: whatever may stand where a keyword has its value."""

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
