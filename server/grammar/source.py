"""Builds llguidance grammars from rules and clients' schemas and patterns.

Takes as long as they make it take, so it runs in `server.grammar.process`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import NamedTuple

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from server.grammar.json_schema import MALFORMED, Schema, SchemaError
from server.grammar.pattern import TOO_MUCH, Pattern, sentence_for, written
from server.grammar.rewrite import inline, rewrite, without

LIMITS = LLParserLimits(step_lexer_fuel=50_000, max_lexer_states=50_000, max_items_in_row=5000, verbose_errors=False)
"""llguidance's limits: about 4 ms per step of a row, and 12 MB for all rows of a grammar."""

START = "start: answer"
MAX_SOURCE = 2**22  # characters
STEPS = 64  # steps of a trial; enough to reach a tool's arguments


@dataclass(frozen=True)
class Part:
    """A schema inside a grammar. `param` is the request field it came from."""

    schema: Schema
    strict: bool
    param: str


@dataclass(frozen=True)
class Plan:
    """What to compile: rules, one per line, which refer to the parts as `a0`, `a1` and so on.

    The first rule defines `start` and ends with `answer`.
    """

    rules: tuple[str, ...]
    parts: tuple[Part | Pattern, ...]

    @property
    def key(self) -> str:
        """Equal for plans of the same grammar."""
        parts = [(p.schema, p.strict) if isinstance(p, Part) else (p.kind, p.texts) for p in self.parts]
        return json.dumps([self.rules, parts], separators=(",", ":"))


class PartError(SchemaError):
    """A fault in a part of a grammar, as a sentence, and the request field it came from."""

    def __init__(self, sentence: str, param: str) -> None:
        super().__init__(sentence)
        self.param = param


def write(plan: Plan, tokens: LLTokenizer) -> str:
    """The plan's grammar, known to compile. Raises `PartError`.

    Keywords that the compiler rejects are dropped from schemas that are not strict.
    """
    schemas = [_rewritten(part) if isinstance(part, Part) else {} for part in plan.parts]
    while True:
        source = assembled(plan, schemas)
        if not (error := _first_error(source, tokens)):
            return source
        n = _part_at_fault(error, plan)
        part, reason = plan.parts[n], _reason(error)
        if isinstance(part, Pattern):
            raise PartError(sentence_for(part, error), part.param)
        less = schemas[n] if part.strict else reason.leave_out(schemas[n], error)
        if less == schemas[n]:
            raise PartError(reason.sentence_for(error), part.param)
        schemas[n] = less


def matcher_of(source: str, tokens: LLTokenizer) -> LLMatcher:
    """A matcher in its initial state, or in an error state. Its copies share what it has computed."""
    matcher = LLMatcher(tokens, LLMatcher.grammar_from_lark(source), log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()  # the first step finds errors that compiling does not
    return matcher


def _first_error(source: str, tokens: LLTokenizer) -> str:
    """The compiler's error, or that of one of the first steps, which are random but tend to end strings."""
    matcher, dice = matcher_of(source, tokens), Random(0)
    if not matcher.is_error() and not source.startswith(f"{START}\n"):
        # Skips a thought at the start, where every step is unconstrained.
        matcher = matcher_of(re.sub(r"\Astart: .*", START, source), tokens)
    quote = tokens.tokenize_str('"')[0]
    for step in range(STEPS):
        if matcher.is_error() or matcher.is_stopped():
            break
        mask = matcher.compute_bitmask()
        tries = [quote] * (step % 8 == 7) + dice.choices(range(tokens.vocab_size), k=100)
        if (token := next((one for one in tries if mask[one >> 3] >> (one & 7) & 1), _lowest(mask))) is None:
            return "" if step or matcher.is_accepting() else "Unsatisfiable"
        matcher.consume_token(token)
    return matcher.get_error()


def _lowest(mask: bytes) -> int | None:
    """The lowest allowed token."""
    return next((8 * n + (byte & -byte).bit_length() - 1 for n, byte in enumerate(mask) if byte), None)


def _rewritten(part: Part) -> Schema:
    try:
        return rewrite(part.schema, part.strict)
    except SchemaError as error:
        raise PartError(str(error), part.param) from None


def assembled(plan: Plan, schemas: Sequence[Schema]) -> str:
    """The grammar of a plan with rewritten schemas; those of patterns are not looked at."""
    pairs = enumerate(zip(plan.parts, schemas, strict=True))
    bodies = [f"a{n}: {_body(part, schema)}" for n, (part, schema) in pairs]
    source = "\n".join([*plan.rules, *bodies, ""])
    if len(source) > MAX_SOURCE:
        raise PartError(TOO_COMPLEX, plan.parts[0].param)
    return source


def _body(part: Part | Pattern, schema: Schema) -> str:
    if isinstance(part, Part):
        return inline(schema, part.strict)
    try:
        return written(part)
    except SchemaError as error:
        raise PartError(str(error), part.param) from None


def _part_at_fault(error: str, plan: Plan) -> int:
    """The index of the part on the line that the error names; 0 if it names none. Only the last takes several lines."""
    line = re.match(r"(?:at )?(\d+)\(", error)
    n = int(line[1]) - len(plan.rules) - 1 if line else 0
    return min(max(n, 0), len(plan.parts) - 1)


# llguidance's errors and our sentences for them. None repeats client input except names of keywords and formats.

TOO_COMPLEX = "The schema is too complex to compile."


class Reason(NamedTuple):
    """Words that identify an error, a sentence for the client, and the keywords at fault, if known."""

    words: str
    sentence: str
    keywords: tuple[str, ...] = ()

    def sentence_for(self, error: str) -> str:
        match = re.search(self.words, error)
        groups = match.groups() if match else ()
        return self.sentence.format(*(group.replace('"', "") for group in groups if group))

    def leave_out(self, schema: Schema, error: str) -> Schema:
        """The schema without keywords that may be at fault, surely wrong ones first; unchanged if there are none."""
        for is_right in (_is_right, _is_never_right):
            for keyword in self.keywords:
                less = without(schema, keyword, partial(is_right, keyword, error))
                if less != schema:
                    return less
        return schema


def _is_right(keyword: str, error: str, value: object) -> bool:
    match keyword, value:
        case "pattern", str():
            return _compiles(value)
        case "patternProperties", dict():
            return all(map(_compiles, value))
        case "$ref", str():
            circle = re.search(CIRCLE, error)
            return value.startswith("#") and not (circle and circle[1].endswith(value))
        case _:
            return False


def _is_never_right(keyword: str, error: str, value: object) -> bool:
    return False


def _compiles(pattern: str) -> bool:
    return not LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema({"type": "string", "pattern": pattern}))


ORDER = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
PATTERNS = ("pattern", "patternProperties")
CIRCLE = r"circular references[^:]*: (\S+)"
REASONS = (
    Reason(r"Unimplemented keys: \[([\w\", $]+)\]", "The schema uses keywords that cannot be enforced: {}."),
    Reason(r"Unknown format: ([\w-]{1,30})\b", "The schema uses the format {}, which cannot be enforced."),
    Reason(r"Unknown format", "The schema uses a format that cannot be enforced."),
    Reason(r"look-?around", "A pattern in the schema uses look-around, which cannot be enforced.", PATTERNS),
    Reason(
        r"regex parse error|failed to compile regex|invalid regex",
        "A pattern in the schema is not a regular expression.",
        PATTERNS,
    ),
    Reason(r"oneOf constraints", "The schema uses oneOf with alternatives that may overlap; use anyOf."),
    Reason(r"min/maxProperties", "The schema uses minProperties or maxProperties in a way that cannot be enforced."),
    Reason(r"disjoint", "The schema uses patternProperties that may overlap.", ("patternProperties",)),
    Reason(r"Unsatisfiable|NoExtension", "No value could satisfy the schema."),
    Reason(CIRCLE, "The schema has a recursive $ref next to other keywords, which cannot be enforced.", ("$ref",)),
    Reason(r"registry|Pointer|Unresolvable|Anchor", "A $ref in the schema points nowhere inside it.", ("$ref", "$id")),
    Reason(r"URI reference", MALFORMED, ("$id", "$ref")),
    Reason(r"multipleOf", "The schema uses multipleOf with numbers that are too large.", ("multipleOf",)),
    Reason(r"range:", MALFORMED, ORDER),
    Reason(r"if regex is empty", TOO_COMPLEX, ("pattern",)),
    Reason(TOO_MUCH, TOO_COMPLEX, ("pattern",)),
    Reason(r"", MALFORMED),
)


def _reason(error: str) -> Reason:
    return next(reason for reason in REASONS if re.search(reason.words, error))
