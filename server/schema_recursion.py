"""Whether a JSON Schema that refers to itself can be satisfied by a value of finite size."""

from collections.abc import Callable

from server.schema_walk import Schema, resolve

ROUNDS = 50


def terminates(schema: Schema, references: set[str]) -> bool:
    """Whether a value of finite size can satisfy the schema, as far as references to itself go.

    Starts with no reference known to be finite and adds those that the known ones make so, until there are no more.
    """
    targets = {ref: resolve(schema, ref) for ref in references}
    finite: set[str] = {ref for ref, target in targets.items() if target is None}
    for _ in range(ROUNDS):
        seen: dict[int, bool] = {}
        found = {ref for ref, target in targets.items() if ref in finite or _finite(target, finite, seen)}
        if found == finite:
            return _finite(schema, finite, {})
        finite = found
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
