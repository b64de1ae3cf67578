"""Rows of any settings that come and go at random moments: each must be what it is alone, whatever its batch was.

`DIFFERENTIAL=1000` asks for so many rows of each engine instead of some hundreds.
"""

import asyncio
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from batching.batcher import Batcher, BatchingConfig
from batching.engine import Engine
from batching.packed.engine import PackedEngine
from batching.padded import PaddedEngine
from batching.queue import QueueLimits
from batching.stream import Stream
from batching.types import Forced, Grammar, Request, TokenLogprob
from server.grammar.compiler import Grammars
from server.grammar.source import Part
from tests.batching.conftest import PATIENCE, request
from tests.tiny import SHAPE, tiny_model

VOCABULARY: int = SHAPE["vocab_size"]
ROWS = int(os.environ.get("DIFFERENTIAL", "160"))
CROWD = 40
"""Rows that are under way in one go."""

ENGINES: dict[str, Callable[[], Engine]] = {
    "generate": lambda: PaddedEngine(tiny_model(), token_budget=8192),
    "packed": lambda: PackedEngine(tiny_model(), num_slots=8, token_budget=1000, prefill_chunk=32),
}
"""Every engine there is, on the same tiny model."""

SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False},
    {"enum": ["sea", "lamp", "keeper"]},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 4},
]

Answer = tuple[list[int], list[TokenLogprob]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level vocabulary as wide as the tiny model's: 256 bytes, pairs of letters, and an end."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    bytes_ = sorted({*map(chr, range(0x21, 0x7F)), *map(chr, range(0xA1, 0xAD)), *map(chr, range(0xAE, 0x144))})
    pairs = [one + other for one in letters for other in letters]
    pieces = [*bytes_, *pairs][: VOCABULARY - 1]
    found = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[]))
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<|end|>")


async def grammars() -> list[Grammar]:
    compiler = Grammars(tokenizer())
    return [await compiler.of(Part(schema, True, "")) for schema in SCHEMAS]


def some_request(dice: random.Random, id: str, forms: list[Grammar]) -> Request:
    """Any prompt with any settings."""
    settings: dict[str, Any] = {"max_tokens": dice.randint(1, 24), "seed": dice.getrandbits(64) - 2**63}
    if dice.random() < 0.7:
        settings |= {"temperature": dice.choice([0.01, 0.7, 1.0, 2.0])}
        settings |= dice.choice([{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}, {"top_p": 0.5, "top_k": 300}])
    settings |= dice.choice([{}, {}, {"repetition_penalty": 1.3}, {"presence_penalty": 1.0, "frequency_penalty": 0.5}])
    if dice.random() < 0.3:
        settings["stop_token_ids"] = frozenset(dice.sample(range(VOCABULARY), 100))
        settings["min_tokens"] = dice.choice([0, 0, 5])
    if dice.random() < 0.2:
        settings["logit_bias"] = tuple((token, dice.uniform(-9, 9)) for token in dice.sample(range(VOCABULARY), 5))
    if dice.random() < 0.2:
        settings["top_logprobs"] = dice.choice([0, 3])
    if dice.random() < 0.1:
        settings["forced"] = Forced(after=dice.randint(1, 9), unless=7, tokens=(7, 8, 9))
    prompt = tuple(dice.randrange(VOCABULARY) for _ in range(dice.randint(1, 48)))
    found = request(prompt, id=id, client=dice.choice("ab"), **settings)
    if dice.random() < 0.25 and found.sampling.forced is None:
        end = frozenset({VOCABULARY - 1})
        return replace(found, grammar=dice.choice(forms), sampling=replace(found.sampling, stop_token_ids=end))
    return found


async def read(stream: Stream, most: int = 1000) -> Answer:
    """The whole answer, or its first tokens, `most` at least, of a reader that leaves then."""
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    async with stream:
        async for delta in stream:
            tokens += delta.tokens
            logprobs += delta.logprobs
            if len(tokens) >= most:
                break
    return tokens, logprobs


async def come_and_go(batcher: Batcher, asked: Request, dice: random.Random) -> Answer:
    """Come at some moment, and perhaps leave at another."""
    await asyncio.sleep(dice.uniform(0.0, 0.2))
    return await read(batcher.submit(asked), dice.choice([1000, 1000, 1000, dice.randint(1, 8)]))


def check_same(asked: Request, together: Answer, alone: Answer) -> None:
    """What came in company is what comes alone, as far as the reader stayed."""
    tokens, logprobs = together
    assert tokens == alone[0][: len(tokens)], asked
    assert tokens, asked
    for one, other in zip(logprobs, alone[1], strict=False):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3), asked


@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_is_what_it_is_alone_whoever_comes_and_goes(engine: str) -> None:
    dice = random.Random(ROWS)

    async def main() -> None:
        forms = await grammars()
        batcher = Batcher(ENGINES[engine], BatchingConfig(8, 0.002, QueueLimits(10 * CROWD)))
        await batcher.start()
        for first in range(0, ROWS, CROWD):
            crowd = [some_request(dice, str(first + n), forms) for n in range(min(CROWD, ROWS - first))]
            moments = [random.Random(dice.random()) for _ in crowd]
            together = await asyncio.gather(*map(lambda a, m: come_and_go(batcher, a, m), crowd, moments))
            for asked, answer in zip(crowd, together, strict=True):
                check_same(asked, answer, await read(batcher.submit(asked)))
        await batcher.drain(0)

    asyncio.run(asyncio.wait_for(main(), PATIENCE * max(1, ROWS // 100)))
