"""The token bitmask that the host sends for a row: what its grammar allows, or the one token forced on it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from batching.grammar import GuidedRow
from batching.types import Forced, Request, TokenBitmask
from tests.batching.conftest import request
from tests.batching.test_guided_decoding import Steps

VOCABULARY = 100


@pytest.fixture
def helper() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def tokens(words: TokenBitmask) -> set[int]:
    """Those whose bit is set."""
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:VOCABULARY]
    return set(np.flatnonzero(bits).tolist())


def held(grammar: Steps) -> Request:
    return replace(request(stop_token_ids=frozenset({0})), grammar=grammar)


def test_a_grammar_says_what_may_come_next_and_then_the_stop_token(helper: ThreadPoolExecutor) -> None:
    guided = GuidedRow(held(Steps({5, 6}, {70})), VOCABULARY, helper)
    assert tokens(guided.bitmask()) == {5, 6}
    guided.accept_token(6)
    assert tokens(guided.bitmask()) == {70}
    guided.accept_token(70)
    assert tokens(guided.bitmask()) == {0}


def test_two_rows_on_one_thread_do_not_mix(helper: ThreadPoolExecutor) -> None:
    first, second = (GuidedRow(held(Steps({n}, {n + 1})), VOCABULARY, helper) for n in (10, 20))
    first.accept_token(10)
    assert tokens(second.bitmask()) == {20}
    assert tokens(first.bitmask()) == {11}


def test_a_forced_token_is_the_only_one(helper: ThreadPoolExecutor) -> None:
    guided = GuidedRow(request(forced=Forced(after=2, unless=9, tokens=(33, 9))), VOCABULARY, helper)
    allowed = []
    for token in (1, 2, 33, 9):
        allowed.append(tokens(guided.bitmask()))
        guided.accept_token(token)
    everything = set(range(VOCABULARY))
    assert [*allowed, tokens(guided.bitmask())] == [everything, everything, {33}, {9}, everything]


def test_only_rows_with_a_grammar_or_forced_tokens_are_guided() -> None:
    assert GuidedRow.is_needed(held(Steps({1})))
    assert GuidedRow.is_needed(request(forced=Forced(1, 2, (3,))))
    assert not GuidedRow.is_needed(request(temperature=1.0, presence_penalty=1.0))
