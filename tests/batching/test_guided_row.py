"""What the host tells the device of a row's next token: its grammar's choice, or the one token it is told to say."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from batching.grammar import Watched
from batching.types import Forced, Request, Words
from tests.batching.conftest import request
from tests.batching.test_guided_decoding import Steps

VOCABULARY = 100


@pytest.fixture
def helper() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def tokens(words: Words) -> set[int]:
    """Those whose bit is set."""
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:VOCABULARY]
    return set(np.flatnonzero(bits).tolist())


def held(grammar: Steps) -> Request:
    return replace(request(stop_token_ids=frozenset({0})), grammar=grammar)


def test_a_grammar_says_what_may_come_next_and_then_the_stop_token(helper: ThreadPoolExecutor) -> None:
    watched = Watched(held(Steps({5, 6}, {70})), VOCABULARY, helper)
    assert tokens(watched.allowed()) == {5, 6}
    watched.told(6)
    assert tokens(watched.allowed()) == {70}
    watched.told(70)
    assert tokens(watched.allowed()) == {0}


def test_two_rows_on_one_thread_do_not_mix(helper: ThreadPoolExecutor) -> None:
    first, second = (Watched(held(Steps({n}, {n + 1})), VOCABULARY, helper) for n in (10, 20))
    first.told(10)
    assert tokens(second.allowed()) == {20}
    assert tokens(first.allowed()) == {11}


def test_a_forced_token_is_the_only_one(helper: ThreadPoolExecutor) -> None:
    watched = Watched(request(forced=Forced(after=2, unless=9, tokens=(33, 9))), VOCABULARY, helper)
    allowed = []
    for token in (1, 2, 33, 9):
        allowed.append(tokens(watched.allowed()))
        watched.told(token)
    everything = set(range(VOCABULARY))
    assert [*allowed, tokens(watched.allowed())] == [everything, everything, {33}, {9}, everything]


def test_only_rows_with_a_rule_are_watched() -> None:
    assert Watched.wants(held(Steps({1})))
    assert Watched.wants(request(forced=Forced(1, 2, (3,))))
    assert not Watched.wants(request(temperature=1.0, presence_penalty=1.0))
