"""Schemas and patterns of any bytes: what is made of them compiles, and means what they mean."""

from __future__ import annotations

import asyncio
import re
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import orjson
from jsonschema_rs import validator_for

from server.grammar.json_schema import (
    ALONE_OR_LISTED,
    BY_NAME,
    FORMS,
    MAX_PATTERN,
    Schema,
    SchemaError,
    bound,
    subschemas,
    written_out,
)
from server.grammar.rewrite import _guard, closed, rewrite, tidied
from server.grammar.sandbox import Sandbox
from server.grammar.source import Part, PartError, Plan
from tests.live import BYTES, END

KEYWORDS = sorted({*FORMS, *ALONE_OR_LISTED, *BY_NAME, "const", "enum", "format", "uniqueItems", "$schema", "default"})
NAMES = ("a", "b", "type", "properties", "$ref", "x" * 2001, "é", "")
SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 2**53, 2**63, -(2**200), 0.0, 0.5, 1e-20, 1e300, -1.5),
    *("", "a", "string", "integer", "number", "object", "array", "null", "any", "FLOAT", "List[int]", "date", "color"),
    *("#", "#/$defs/a", "#/properties/a", "#/items", "#a", "https://example.org/x", "http://json-schema.org/draft-07/"),
    *("^[^a]{2,3}$", "(?!a)b", "(a{99}){99}", "([", r"^\d+$", ".*a.*", "x" * 2001, "[^" * 500, r"\bx", r"(a)\1"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, 0, 1, -3, 2.5, "", "a", "ab", "aab", "2024-01-01", [], [1], ["a", 1], [[]], {}, {"a": 1}),
    *({"a": "x", "b": 2}, {"b": {"a": None}}, {"x": 1}, {"type": "a"}, [{"a": 1}], {"a": {"a": {"a": {}}}}),
)
LIMITS = re.compile(
    r"No value could|no answer could|too complex|too much time|without an end|nested too|members|too large|too long"
)
"""What may be wrong with a schema that is not strict."""


def fuzz_schema(data: bytes) -> None:
    """A schema is refused in a sentence, or is held to: its grammar compiles, and closing it only forbids.

    One that is not strict is refused for its size or because nothing satisfies it, and for nothing else.
    """
    strict, schema = bool(data[:1] and data[0] & 1), schema_of(data[1:])
    assert tidied(tidied(schema)) == tidied(schema)
    if (kept := _rewritten(schema, strict)) is None:
        return
    assert rewrite(kept, strict) == kept
    _only_forbids(kept)
    error = _error_of(schema, strict)
    assert error is None or _is_fair(error, strict), error


def _rewritten(schema: Schema, strict: bool) -> Schema | None:
    error = None
    try:
        bound(schema)
        return rewrite(schema, strict)
    except SchemaError as raised:
        error = str(raised)
    assert _is_fair(error, strict), error
    return None


def _is_fair(error: str, strict: bool) -> bool:
    return error.endswith(".") and (strict or LIMITS.search(error) is not None)


def schema_of(data: bytes) -> Schema:
    """JSON as it is, or a schema of known keywords that the bytes choose, because few bytes at random are JSON."""
    try:
        found = orjson.loads(data)
        return found if isinstance(found, dict) else {"const": found}
    except orjson.JSONDecodeError:
        return _schema(iter(data), depth=0)


def _schema(choices: Iterator[int], depth: int) -> Schema:
    size = next(choices, 0) % 4 if depth < 6 else 0
    keywords = [KEYWORDS[next(choices, 0) % len(KEYWORDS)] for _ in range(size)]
    return {keyword: _keyword(keyword, choices, depth + 1) for keyword in keywords}


def _keyword(keyword: str, choices: Iterator[int], depth: int) -> Any:
    choice = next(choices, 0)
    if choice % 8 == 7:  # anything
        return SCALARS[next(choices, 0) % len(SCALARS)]
    if keyword in BY_NAME:
        return {NAMES[next(choices, 0) % len(NAMES)]: _schema(choices, depth) for _ in range(choice % 3)}
    if keyword in ALONE_OR_LISTED and choice % 2:
        return [_schema(choices, depth) for _ in range(choice % 3)]
    if keyword in ALONE_OR_LISTED:
        return _schema(choices, depth)
    if keyword in ("enum", "required", "type") and choice % 2:
        return [SCALARS[next(choices, 0) % len(SCALARS)] for _ in range(choice % 3)]
    return SCALARS[next(choices, 0) % len(SCALARS)]


def _only_forbids(kept: Schema) -> None:
    if any("oneOf" in node for node in subschemas(kept)):  # alternatives that overlapped may not when closed
        return
    try:
        before, after = validator_for(kept), validator_for(closed(kept))
    except ValueError:  # a pattern or reference that this validator does not know
        return
    for value in VALUES:
        assert before.is_valid(value) or not after.is_valid(value), value


@cache
def sandbox() -> Sandbox:
    return Sandbox(BYTES.backend_tokenizer.to_str(), END)


def _error_of(schema: Schema, strict: bool) -> str | None:
    try:
        asyncio.run(sandbox().write(Plan(("start: answer", "answer: a0"), (Part(schema, strict, "schema"),))))
    except PartError as error:
        return str(error)
    return None


def fuzz_pattern(data: bytes) -> None:
    """A pattern is measured in linear time, and what is made of it matches what it matched, but for U+0001."""
    pattern, *texts = (piece.decode(errors="ignore") for piece in data.split(b"\xff"))
    if written_out(pattern) > MAX_PATTERN // 10:
        return
    try:
        with warnings.catch_warnings(action="ignore"):  # about what other dialects mean by it
            before, after = re.compile(pattern), re.compile(_guard(pattern))
    except (re.error, OverflowError, RecursionError):
        return
    for text in (*texts, "", "a", "]", "^", '"', "\\", "a]b"):
        text = text[:8].replace("\x01", "")
        assert bool(before.search(text)) is bool(after.search(text)), (pattern, text)
    assert not re.fullmatch(_guard("[^a]"), "\x01")
