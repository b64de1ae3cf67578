"""Speculation: what it drafts, when it is worth its time, and that no answer depends on it."""

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.packed.engine import PackedEngine
from batching.packed.kv_cache import BLOCK_SIZE
from batching.packed.speculation import (
    MAX_MATCH,
    MIN_MATCH,
    History,
    StepCost,
    num_matching,
    preface,
    propose,
)
from batching.stream import Row
from batching.types import Forced, Request
from tests.batching.conftest import request
from tests.batching.packed.test_engine import VOCABULARY, Run, alone
from tests.tiny import tiny_model

texts = st.lists(st.integers(0, 3), max_size=40)


pytestmark = pytest.mark.usefixtures("one_thread")


def match(text: Sequence[int], end: int) -> int:
    """How many tokens before `end` are the text's last ones, MAX_MATCH at most."""
    lengths = range(1, min(MAX_MATCH, end) + 1)
    return max((n for n in lengths if text[end - n : end] == text[len(text) - n :]), default=0)


@given(texts, st.integers(1, 5))
def test_a_draft_continues_the_latest_of_the_best_earlier_places(text: list[int], count: int) -> None:
    places = [(match(text, end), end) for end in range(1, len(text)) if match(text, end) >= MIN_MATCH]
    wanted: list[int] = []
    if places:
        end = max(places)[1]
        repeated = text[end:] * count
        wanted = repeated[:count]
    assert propose(np.array(text, dtype=np.int32), count) == wanted


@given(texts.filter(bool), texts, st.integers(1, 60))
def test_a_history_is_the_text_with_all_that_was_added(prompt: list[int], output: list[int], room: int) -> None:
    history = History(prompt, len(output) + room)
    for token in output:
        history.add([token])
    assert history.propose(3) == propose(np.array(prompt + output, dtype=np.int32), 3)


def test_a_text_beyond_the_longest_history_has_no_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batching.packed.speculation.MAX_HISTORY", 10)
    history = History([1, 2] * 4, 100)
    assert history.propose(2) == [1, 2]
    history.add([1, 2, 1])
    assert history.propose(2) == []


@given(st.lists(st.integers(0, 99), min_size=MAX_MATCH, max_size=9, unique=True), texts.filter(bool))
def test_an_answer_begins_as_predicted_whatever_else_the_prompt_holds(tail: list[int], answer: list[int]) -> None:
    prediction = [100 + token for token in answer]
    prompt = [*tail[-MAX_MATCH:], 77, *tail]
    history = History(preface(prompt, prediction, len(answer)), 0)
    assert num_matching(history.propose(len(answer)), prediction) == len(answer)


@given(st.floats(0, 1), st.integers(1, 64), st.floats(0.001, 1), st.floats(0, 1), st.integers(0, 7))
def test_no_draft_makes_a_step_worth_less(rate: float, rows: int, one: float, more: float, limit: int) -> None:
    cost = StepCost(one, more)

    def tokens_a_second(count: int) -> float:
        return (rows + sum(rate**place for place in range(1, count + 1))) / (one + more * (rows - 1 + count))

    chosen = cost.worth_drafting(rate, rows, limit)
    assert 0 <= chosen <= limit
    assert tokens_a_second(chosen) >= tokens_a_second(0) * (1 - 1e-9)


def test_the_rate_follows_what_is_accepted() -> None:
    history = History([1], 10)
    for _ in range(20):
        history.judge(3, 3)
    assert history.rate > 0.99
    for _ in range(20):
        history.judge(0, 1)
    assert history.rate < 0.01


class OneTokenGrammar:
    """Every token must be one of a few; the answer may end anywhere."""

    def __init__(self, allowed: Sequence[int]) -> None:
        self._allowed = allowed

    def matcher(self) -> "OneTokenGrammar":
        return self

    def fill(self, allowed: Any) -> bool:
        for token in self._allowed:
            allowed[token // 32] |= np.array(1 << (token % 32), dtype=np.uint32).view(np.int32)
        return True

    def advance(self, token: int) -> None:
        if token not in self._allowed:
            raise ValueError("not allowed")


def quoting_request(dice: random.Random) -> Request:
    """Any settings, and a text that repeats itself: few different tokens, some of them likely."""
    few = dice.sample(range(VOCABULARY), dice.randint(2, 6))
    prompt = tuple(dice.choices(few, k=dice.randint(1, 2 * BLOCK_SIZE)))
    settings: dict[str, Any] = {"max_tokens": dice.randint(1, 40), "seed": dice.getrandbits(64) - 2**63}
    settings["logit_bias"] = tuple((token, dice.choice([5.0, 50.0])) for token in few)
    if dice.random() < 0.7:
        settings |= {"temperature": dice.choice([0.01, 0.7, 1.0])}
        settings |= dice.choice([{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}])
    settings |= dice.choice([{}, {}, {"repetition_penalty": 1.3}, {"presence_penalty": 1.0, "frequency_penalty": 0.5}])
    settings |= dice.choice([{}, {}, {"stop_token_ids": frozenset(few[:1])}])
    settings |= dice.choice([{}, {}, {"min_tokens": dice.randint(1, settings["max_tokens"])}])
    settings |= dice.choice([{}, {}, {"forced": Forced(dice.randint(1, 9), few[0], tuple(few[:2]))}])
    settings |= dice.choice([{}, {}, {"top_logprobs": dice.randint(0, 3)}])
    asked = request(prompt, **settings)
    asked = dice.choice([asked, asked, replace(asked, grammar=OneTokenGrammar(few))])
    return dice.choice([asked, replace(asked, prediction=tuple(dice.choices(few, k=dice.randint(1, 30))))])


def always(cost: StepCost, rate: float, num_rows: int, limit: int) -> int:
    return limit


NUM_ROWS = int(os.environ.get("SPECULATION_ROWS", "60"))
"""More of them make a longer run."""


@pytest.mark.parametrize("num_blocks", [64, 9])
def test_every_answer_is_the_one_without_drafts(num_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepCost, "worth_drafting", always)
    engine = PackedEngine(tiny_model(), num_slots=6, token_budget=num_blocks * BLOCK_SIZE, prefill_chunk=32)
    dice, accepted = random.Random(num_blocks), 0
    for _ in range(NUM_ROWS // 12):
        asked = [quoting_request(dice) for _ in range(12)]
        leaving = set(dice.sample(range(12), 2))

        def leave(run: Run, leaving: set[int] = leaving) -> None:
            for number in leaving:
                if len(run.sent[run.rows[number]]) >= number:
                    run.rows[number].cancelled = True

        run = Run(engine, asked, first=4, joining=lambda: dice.randint(0, 2), after=leave)
        for number, (sent, wanted) in enumerate(zip(run.answers, alone("qwen3", asked), strict=True)):
            assert sent == wanted[: len(sent)]
            assert number in leaving or sent == wanted
        assert_logprobs_are_of_their_tokens(run)
        accepted += sum(row.num_accepted_tokens for row in run.rows)
        assert engine.pool.num_free == engine.pool.num_blocks
    assert accepted > NUM_ROWS, "it would prove nothing if no draft were right"


def assert_logprobs_are_of_their_tokens(run: Run) -> None:
    for row in run.rows:
        if row.request.sampling.top_logprobs is not None:
            assert [logprob.token for logprob in run.logprobs[row]] == run.sent[row]


def passes_for(engine: PackedEngine, asked: Request, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Row]:
    count = 0
    forward: Any = engine.runner.forward

    def counted(*arguments: Any) -> None:
        nonlocal count
        count += 1
        forward(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "forward", counted)
        run = Run(engine, [asked])
    return count, run.rows[0]


def test_a_predicted_answer_takes_a_fraction_of_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepCost, "worth_drafting", always)
    engine = PackedEngine(tiny_model(), num_slots=1, token_budget=500)
    asked = request(tuple(range(30)), max_tokens=40, temperature=1.0)
    [answer] = alone("qwen3", [asked])
    plain, _ = passes_for(engine, asked, monkeypatch)
    predicted, row = passes_for(engine, replace(asked, prediction=tuple(answer)), monkeypatch)
    assert plain == len(answer)
    assert predicted <= len(answer) // 4 + 3
    assert row.num_accepted_tokens >= len(answer) * 3 // 4 - 3


def test_without_speculation_nothing_is_drafted() -> None:
    engine = PackedEngine(tiny_model(), num_slots=1, token_budget=500, max_draft_tokens=0)
    run = Run(engine, [request((1, 2) * 20, max_tokens=40)])
    assert run.rows[0].num_drafted_tokens == 0


def test_batch_invariance_has_no_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepCost, "worth_drafting", always)
    engine = PackedEngine(tiny_model(), num_slots=1, token_budget=500, batch_invariant=True)
    run = Run(engine, [request((1, 2) * 20, max_tokens=40)])
    assert run.rows[0].num_drafted_tokens == 0
