"""What tests of structured output share: a tokenizer with its compiler, and how schemas are written in a line."""

import asyncio
import re
from collections.abc import Coroutine
from functools import cache
from random import Random
from typing import Any, TypeVar

import numpy as np
import pytest
from jsonschema import Draft202012Validator, FormatChecker  # type: ignore[import-untyped]
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from batching import checkpoint
from batching.types import TokenBitmask
from server.grammar.compiler import Grammars, TokenGrammar, TokenMatcher
from server.grammar.json_schema import Schema
from server.grammar.source import Part
from server.http.errors import RETRIED, ApiError
from server.openai.constraints import any_object
from server.settings import parse
from tests.conftest import TEST_TOKENIZER

ANY_OBJECT = any_object("response_format")
TEXT = {"type": "string"}
INT = {"type": "integer"}


def record(*required: str, **properties: Schema) -> Schema:
    """An object of just these properties, all of them required unless some are named."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required or properties),
        "additionalProperties": False,
    }


def many(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


# jsonschema's own check of times wants none with a zone, which the standard asks for.
FORMATS_CHECKED = FormatChecker(formats=("date", "email", "ipv4", "ipv6", "uuid"))
Result = TypeVar("Result")


def around(name: str) -> tuple[str, str]:
    """Qwen's format of a call."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": ', "}\n</tool_call>"


class Kit:
    """A tokenizer and its compiler."""

    def __init__(self, folder: str) -> None:
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)  # type: ignore[assignment]
        self.grammars = Grammars(self.tokenizer)
        self.width = len(self.tokenizer) + 267  # as Qwen3's logits are wider than its tokenizer
        single = (self.encode(text) for text in ('"', "}", "]", '"}', '"]', "}}", "]}", "@", ":", "</tool_call>"))
        self.closers = sorted({ids[0] for ids in single if len(ids) == 1})

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)

    def schema(self, schema: Schema, strict: bool = True, **options: Any) -> TokenGrammar:
        return run(self.grammars.of(Part(schema, strict, "response_format"), **options))

    def next(self, matcher: TokenMatcher) -> tuple[NDArray[np.bool_], bool]:
        """For each token whether it may come next, and whether the text may end."""
        allowed: TokenBitmask = np.zeros(-(-self.width // 32), np.int32)
        may_end = matcher.fill(allowed)
        bits = np.unpackbits(allowed.view(np.uint8), bitorder="little").view(np.bool_)
        assert not bits[len(self.tokenizer) :].any()
        return bits, may_end

    def walk(self, grammar: TokenGrammar, random: Random, patience: int) -> str:
        """A random text of the grammar. After so many tokens it makes for the end."""
        matcher, taken = grammar.matcher(), list[int]()
        while len(taken) < 2000:
            bits, may_end = self.next(matcher)
            hurry = len(taken) >= patience
            if may_end and (hurry or not bits.any()):
                return self.decode(taken)
            ids = [token for token in self.closers if bits[token]] if hurry and random.random() < 0.8 else []
            taken.append(int(random.choice(ids or np.flatnonzero(bits))))
            matcher.advance(taken[-1])
        raise AssertionError("no end: " + self.decode(taken)[:1000])

    def accepts(self, grammar: TokenGrammar, text: str) -> bool:
        matcher = grammar.matcher()
        try:
            for token in self.encode(text):
                matcher.advance(token)
        except ValueError:
            return False
        return self.next(matcher)[1]


def strict(schema: Schema) -> Part:
    return Part(schema, True, "response_format")


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(coroutine)


@cache
def kit_of(name: str) -> Kit:
    return Kit(checkpoint.locate(None, "auto", parse([]).cache_dir) if name == "demo" else str(TEST_TOKENIZER))


def refusal(coroutine: Coroutine[Any, Any, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        run(coroutine)
    assert caught.value.status == 400
    assert RETRIED.search(caught.value.message) is None
    assert re.fullmatch(r"[A-Z][^.;]+[.;]( ?[^.]+\.)?|.*: [\w$, ]+\.", caught.value.message)
    return caught.value


def valid(schema: Schema, value: Any) -> bool:
    return bool(Draft202012Validator(schema, format_checker=FORMATS_CHECKED).is_valid(value))
