"""The token bitmask that the host sends for a row: what its grammar allows, or the one token forced on it."""

from dataclasses import replace

import numpy as np
import torch

from batching.grammar import Bitmask, GuidedRow
from batching.types import Forced, Request
from tests.batching.conftest import request
from tests.batching.test_guided_decoding import Steps

VOCABULARY = 100


class Rows:
    """Guided rows in a bitmask of their own, each at its place."""

    def __init__(self, *requests: Request) -> None:
        self.bitmask = Bitmask(len(requests) + 1, VOCABULARY, torch.device("cpu"))
        self.guided = [GuidedRow(request, VOCABULARY) for request in requests]
        self.places = list(range(len(requests)))
        for guided, place in zip(self.guided, self.places, strict=True):
            self.bitmask.begin(guided, place)

    def accept(self, number: int, *tokens: int) -> None:
        count = len(tokens)
        self.bitmask.accept_tokens([self.guided[number]] * count, tokens, [self.places[number]] * count)

    def move(self, number: int, place: int) -> None:
        self.places[number] = place
        self.bitmask.begin(self.guided[number], place)

    def allowed(self, number: int) -> set[int]:
        words = self.bitmask.wait()[self.places[number]].numpy()
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:VOCABULARY]
        return set(np.flatnonzero(bits).tolist())


def held(grammar: Steps) -> Request:
    return replace(request(stop_token_ids=frozenset({0})), grammar=grammar)


EVERYTHING = set(range(VOCABULARY))


def test_a_grammar_says_what_may_come_next_and_then_the_stop_token() -> None:
    rows = Rows(held(Steps({5, 6}, {70})))
    assert rows.allowed(0) == {5, 6}
    rows.accept(0, 6)
    assert rows.allowed(0) == {70}
    rows.accept(0, 70)
    assert rows.allowed(0) == {0}
    rows.accept(0, 0)
    assert rows.allowed(0) == EVERYTHING, "it has finished"


def test_a_row_does_not_change_what_another_is_allowed() -> None:
    rows = Rows(held(Steps({10}, {11})), held(Steps({20}, {21})))
    rows.accept(0, 10)
    assert rows.allowed(1) == {20}
    assert rows.allowed(0) == {11}


def test_tokens_that_come_together_are_accepted_in_order() -> None:
    rows = Rows(held(Steps({10}, {11}, {12})))
    rows.accept(0, 10, 11)
    assert rows.allowed(0) == {12}


def test_a_row_takes_its_state_to_another_place() -> None:
    rows = Rows(held(Steps({10}, {11}, {12})), request(forced=Forced(after=1, unless=9, tokens=(33, 9))))
    rows.accept(0, 10)
    rows.accept(1, 1)
    rows.move(0, 2)
    assert rows.allowed(0) == {11}
    rows.move(1, 0)
    assert rows.allowed(1) == {33}
    rows.accept(0, 11)
    assert rows.allowed(0) == {12}


def test_a_forced_token_is_the_only_one() -> None:
    rows = Rows(request(forced=Forced(after=2, unless=9, tokens=(33, 9))))
    allowed = []
    for token in (1, 2, 33, 9):
        allowed.append(rows.allowed(0))
        rows.accept(0, token)
    assert [*allowed, rows.allowed(0)] == [EVERYTHING, EVERYTHING, {33}, {9}, EVERYTHING]


def test_after_its_forced_tokens_a_row_goes_on_with_its_grammar() -> None:
    forced = request(forced=Forced(after=1, unless=9, tokens=(2,)), stop_token_ids=frozenset({0}))
    rows = Rows(replace(forced, grammar=Steps({1}, {2, 3}, {4, 5})))
    allowed = []
    for token in (1, 2):
        allowed.append(rows.allowed(0))
        rows.accept(0, token)
    assert [*allowed, rows.allowed(0)] == [{1}, {2}, {4, 5}]


def test_only_rows_with_a_grammar_or_forced_tokens_are_guided() -> None:
    assert GuidedRow.is_needed(held(Steps({1})))
    assert GuidedRow.is_needed(request(forced=Forced(1, 2, (3,))))
    assert not GuidedRow.is_needed(request(temperature=1.0, presence_penalty=1.0))
