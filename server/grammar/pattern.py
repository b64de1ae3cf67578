"""What an answer can be held to besides a schema: a regular expression, choices, or a grammar in GBNF or Lark.

Reading a grammar takes as long as it makes it take, so `written` runs in `server.grammar.process`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from server.grammar.json_schema import MAX_LITERAL, MAX_PATTERN, SchemaError, written_out

# A string may be left open, so that no quote restarts the search: every character is examined once.
LITERAL = re.compile(r'"((?:[^"\\]|\\.)*)("?)', re.DOTALL)

LARK = re.compile(r"^\s*(%llguidance\b|[?!]?start\s*(\[[^\]\n]*\]\s*)?:(?!:=))", re.MULTILINE)
"""What only a grammar in Lark has. The library's own search does not know modifiers, and takes GBNF's `start ::=`."""

Kind: TypeAlias = Literal["regex", "choice", "grammar"]


@dataclass(frozen=True)
class Pattern:
    """The whole answer must match the text, or one of several choices. `param` is the request field it came from."""

    kind: Kind
    texts: tuple[str, ...]
    param: str


def check(pattern: Pattern) -> None:
    """Refuse what would make every step slow. Takes linear time. Raises `SchemaError`."""
    match pattern.kind:
        case "regex" if written_out(pattern.texts[0]) > MAX_PATTERN:
            raise SchemaError("The regular expression is too long, or repeats too much.")
        case "choice" if any(len(text.encode()) > MAX_LITERAL for text in pattern.texts):
            raise SchemaError(f"A choice can have at most {MAX_LITERAL:,} bytes.")
        case "grammar" if any(
            end and len(text.encode()) > MAX_LITERAL for text, end in LITERAL.findall(pattern.texts[0])
        ):
            raise SchemaError(f"A string in the grammar can have at most {MAX_LITERAL:,} bytes.")


def written(pattern: Pattern) -> str:
    """The pattern as the right side of a Lark rule. Raises `SchemaError` if it is a grammar that cannot be read."""
    match pattern.kind:
        case "regex":
            return f"/{_escaped(pattern.texts[0])}/"
        case "choice":
            return " | ".join(json.dumps(text, ensure_ascii=False) for text in pattern.texts)
        case "grammar":
            return f"%lark {{\n{_lark(pattern.texts[0])}\n}}"


def _escaped(regex: str) -> str:
    """The regular expression without a bare slash, which would end it. Line breaks stay, because in verbose mode they
    end a comment or mean nothing."""
    return re.sub(r"\\?/|\\\n|\\.", _one_escaped, regex)


def _one_escaped(found: re.Match[str]) -> str:
    return {"/": r"\/", "\\\n": r"\n"}.get(found[0], found[0])


def _lark(grammar: str) -> str:
    if LARK.search(grammar):
        return grammar
    try:
        return gbnf_to_lark(_spelled(grammar))
    except GbnfToLarkError as error:
        line = grammar.count("\n", 0, error.pos.pos) + 1
        raise SchemaError(f"The grammar is neither Lark nor GBNF, which has an error in line {line}.") from None
    except RecursionError:
        raise SchemaError(TOO_COMPLEX.format("grammar")) from None
    except Exception as error:  # the library raises nothing more specific
        raise SchemaError(next(said for words, said in RULES if words in str(error))) from None


def _spelled(grammar: str) -> str:
    """GBNF with its long escapes as characters, because the library drops their leading zeros."""
    return re.sub(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", _character, grammar)


def _character(found: re.Match[str]) -> str:
    code = int(found[1] or found[2] or "0", 16)
    if 0x7F < code < 0xD800 or 0xDFFF < code < 0x110000:
        return chr(code)
    return f"\\x{code:02x}" if 0 < code <= 0x7F else found[0]


TOO_COMPLEX = "The {} is too complex to compile."
NAMES: dict[Kind, str] = {"regex": "regular expression", "choice": "list of choices", "grammar": "grammar"}
RULES = (
    ("No 'root' rule", "The grammar needs a rule named root in GBNF, or start in Lark."),
    (
        "already exists",
        "Two rules of the grammar have names that differ only in case or dashes, or one beside root is named start.",
    ),
    ("", "The grammar uses a rule that it does not define."),
)
TOO_MUCH = r"too (large|big|many)|fuel|[Ll]imit|precomputation|TooComplex|determine|max is"
"""What llguidance's errors say about anything that is too complex."""

SENTENCES = (
    (r"look-?around", "The {} uses look-around, which cannot be enforced."),
    (r"unknown name", "The {} uses a rule that it does not define."),
    (r"Unsatisfiable|NoExtension", "No text could match the {}."),
    (TOO_MUCH, TOO_COMPLEX),
    (r"", "The {} is malformed."),
)
"""llguidance's errors and our sentences for them, which repeat nothing that was sent."""


def sentence_for(pattern: Pattern, error: str) -> str:
    return next(said for words, said in SENTENCES if re.search(words, error)).format(NAMES[pattern.kind])
