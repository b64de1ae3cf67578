"""Rows held to a grammar: the law of each against its own grammar, and against the rest of the batch."""

import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from batching import grammar as subject
from batching.padded import PaddedEngine
from batching.sampling import Sampler
from batching.types import Finish, Grammar, Matcher, Request
from batching.worker import BatchSteps
from tests.batching.conftest import loose_row, request
from tests.tiny import tiny_model

CPU = torch.device("cpu")
VOCABULARY = 70  # no multiple of 32
STOP = frozenset({7, 69})


class Steps:
    """A grammar of so many sets of tokens, one a step. It may end after each of `ends`, and it is complete at last."""

    def __init__(self, *allowed: set[int], ends: set[int] | None = None) -> None:
        self.allowed = allowed
        self.ends = {len(allowed)} if ends is None else ends

    def matcher(self) -> Matcher:
        return StepMatcher(self)


class StepMatcher:
    def __init__(self, grammar: Steps) -> None:
        self.grammar = grammar
        self.taken: list[int] = []

    def fill(self, allowed: NDArray[np.int32]) -> bool:
        assert not allowed.any()
        step = len(self.taken)
        for token in self.grammar.allowed[step] if step < len(self.grammar.allowed) else ():
            allowed[token // 32] |= np.left_shift(np.int32(1), np.int32(token % 32))
        return step in self.grammar.ends

    def advance(self, token: int) -> None:
        if token not in self.grammar.allowed[len(self.taken)]:
            raise ValueError(token)
        self.taken.append(token)


class Broken:
    """A grammar that fails at one of the things asked of it, from some step on."""

    def __init__(self, at: str, step: int = 0) -> None:
        self.at = at
        self.left = step

    def matcher(self) -> Matcher:
        if self.at == "matcher":
            raise RuntimeError(self.at)
        return self

    def fill(self, allowed: NDArray[np.int32]) -> bool:
        self.left -= 1
        if self.at == "fill" and self.left < 0:
            raise RuntimeError(self.at)
        if self.at != "nothing" or self.left >= 0:
            allowed[0] = 2
        return False

    def advance(self, token: int) -> None:
        if self.at == "advance":
            raise KeyError(self.at)


def row(grammar: Grammar | None = None, **settings: Any) -> Request:
    settings = {"max_tokens": 100, "stop_token_ids": STOP, **settings}
    return replace(request(**settings), grammar=grammar)


def noise(steps: int, rows: int, seed: int = 0) -> Tensor:
    return torch.randn(steps, rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def draw(rows: Sequence[Request], steps: Tensor) -> list[list[int]]:
    """Tokens of every row, from logits [steps, rows, vocabulary]."""
    sampler = Sampler(rows, VOCABULARY, CPU)
    return torch.stack([sampler(logits.clone()) for logits in steps], dim=1).tolist()


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 2.0, "top_k": 3},
    {"temperature": 0.01, "top_p": 0.1},
    {"temperature": 1.0, "min_p": 0.9},
    {"temperature": 1.0, "presence_penalty": 2.0, "repetition_penalty": 9.0},
]
SENTENCE = Steps({1}, {2, 31, 32, 33}, {63, 64}, {0, 68}, {1, 2, 3, 4, 5})


@pytest.mark.parametrize("settings", SETTINGS)
def test_only_tokens_of_the_grammar_are_chosen_and_then_a_stop_token(settings: dict[str, Any]) -> None:
    for seed in range(20):
        [tokens] = draw([row(SENTENCE, seed=seed, **settings)], noise(6, 1, seed))
        assert all(token in allowed for token, allowed in zip(tokens, SENTENCE.allowed, strict=False))
        assert tokens[5] in STOP


def test_a_text_may_end_early_or_go_on_where_both_are_allowed() -> None:
    grammar = Steps({1}, {2}, {3}, ends={1, 3})
    logits = torch.zeros(3, 2, VOCABULARY)
    logits[1, 0, 69] = logits[1, 1, 2] = 1.0
    stopped, went_on = draw([row(grammar)] * 2, logits)
    assert stopped[:2] == [1, 69]
    assert went_on == [1, 2, 3]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_row_is_independent_of_its_batch(settings: dict[str, Any]) -> None:
    steps = noise(8, 4)
    plain = [row(seed=seed, **settings) for seed in range(4)]
    grammars = [None, SENTENCE, None, Steps({5}, {6})]
    mixed = [replace(request, grammar=grammar) for request, grammar in zip(plain, grammars, strict=True)]
    without, together = draw(plain, steps), draw(mixed, steps)
    assert [together[0], together[2]] == [without[0], without[2]]
    for place in (1, 3):
        assert draw([mixed[place]], steps[:, [place]]) == [together[place]]


def test_a_row_that_has_stopped_takes_any_token() -> None:
    steps = noise(30, 2)
    tokens = draw([row(Steps({1})), row(SENTENCE)], steps)
    after = steps[2:, 0].argmax(-1).tolist()
    assert tokens[0][1] in STOP
    assert tokens[0][2:] == after


def test_a_row_without_stop_tokens_is_free_once_its_grammar_is_complete() -> None:
    steps = noise(30, 1)
    [tokens] = draw([row(Steps({1}, {2}), stop_token_ids=frozenset())], steps)
    assert tokens[:2] == [1, 2]
    assert tokens[2:] == steps[2:, 0].argmax(-1).tolist()


def test_stop_tokens_outside_the_vocabulary_are_no_way_to_end() -> None:
    [tokens] = draw([row(Steps({1}), stop_token_ids=frozenset({-1, 70, 10**6}))], noise(3, 1))
    assert tokens[0] == 1


def test_a_grammar_wins_over_what_was_ruled_out_before() -> None:
    logits = torch.zeros(2, 1, VOCABULARY)
    logits[:, 0, [1, 2, 3, 7, 69]] = -math.inf
    for settings in SETTINGS:
        [tokens] = draw([row(Steps({1, 2, 3}), **settings)], logits)
        assert tokens[0] in {1, 2, 3}
        assert tokens[1] in STOP


@pytest.mark.parametrize("at", ["matcher", "fill", "advance", "nothing"])
@pytest.mark.parametrize("step", [0, 3])
def test_a_grammar_that_fails_harms_nobody(at: str, step: int, caplog: pytest.LogCaptureFixture) -> None:
    steps = noise(20, 3)
    plain = [row(), row(SENTENCE), row()]
    with caplog.at_level(logging.WARNING, logger="batching.grammar"):
        tokens = draw([*plain[:2], row(Broken(at, step))], steps)
    assert [record.message for record in caplog.records] == ["request r continues without its grammar"]
    assert tokens[:2] == draw(plain, steps)[:2]
    assert not set(tokens[2]) & STOP, "an answer that broke its grammar is not one that ended well"


def test_a_matcher_that_takes_too_long_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(subject, "SLOW_START", 0.0)
    monkeypatch.setattr(subject, "SLOW_STEP", 0.0)
    [tokens] = draw([row(SENTENCE)], noise(40, 1))
    assert "without its grammar" in caplog.text
    assert not set(tokens) & STOP


def test_the_helper_thread_ends_with_the_batch() -> None:
    others = threading.enumerate()  # a thread of another test may not have ended yet
    sampler = Sampler([row(SENTENCE)], VOCABULARY, CPU)
    sampler(noise(1, 1)[0])
    [helper] = [
        thread for thread in threading.enumerate() if thread.name.startswith("grammar_") and thread not in others
    ]
    del sampler
    helper.join(timeout=60)
    assert not helper.is_alive()


def test_an_engine_holds_its_rows_to_their_grammars() -> None:
    news: list[tuple[int, int, Finish | None]] = []
    engine = PaddedEngine(tiny_model(), token_budget=4096)
    sentence = Steps({999}, {1, 2, 998}, {31, 32})
    rows = [
        loose_row(row(None, max_tokens=6, stop_token_ids=frozenset())),
        loose_row(row(sentence)),
        loose_row(row(sentence, max_tokens=2)),
        loose_row(row(Broken("advance"), max_tokens=4)),
    ]
    alone: list[int] = []
    engine.run(rows, BatchSteps(lambda step, running: news.extend((rows.index(e[0]), e[1], e[2]) for e in step)))
    first = loose_row(rows[0].request)
    engine.run([first], BatchSteps(lambda step, running: alone.extend(e[1] for e in step)))
    tokens = [[token for place, token, _ in news if place == at] for at in range(4)]
    finishes = {place: finish for place, _, finish in news if finish}
    assert tokens[0] == alone
    assert [token in {*allowed} for token, allowed in zip(tokens[1], [*sentence.allowed, STOP], strict=True)] == [
        True
    ] * 4
    assert finishes == {0: Finish.LENGTH, 1: Finish.STOP, 2: Finish.LENGTH, 3: Finish.LENGTH}
