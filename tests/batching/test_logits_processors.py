"""Laws of the logits processors: logit bias, minimum lengths, forced tokens."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from batching.logits_processors import ForcedTokens, LogitBias, Penalties
from batching.sampling import Sampler
from batching.types import Forced, Request
from tests.batching.conftest import request

CPU = torch.device("cpu")
VOCAB = 16
STEPS = 10
STOP = 3
CLOSE = 7
OFF = -float("inf")


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


def draw(requests: Sequence[Request], logits: Tensor) -> list[list[int]]:
    """Tokens of every row, from logits [steps, rows, vocabulary]."""
    sampler = Sampler(requests, VOCAB, CPU)
    return torch.stack([sampler(step.clone()) for step in logits], dim=1).tolist()


def preferring(*tokens: int) -> Tensor:
    """Logits [steps, 1, vocabulary] of a row that wants these tokens, one a step, and the last one on and on."""
    wanted = [tokens[min(step, len(tokens) - 1)] for step in range(STEPS)]
    return torch.nn.functional.one_hot(torch.tensor(wanted), VOCAB).float()[:, None] * 9


# Every row is as it is alone


def asking(**settings: Any) -> Request:
    return request((1, 2, 3), **settings)


TOKENS = st.integers(0, VOCAB - 1)
BIASES = st.dictionaries(TOKENS, st.floats(-100, 100), max_size=4).map(lambda found: tuple(found.items()))
FORCED = st.builds(
    Forced, st.integers(1, STEPS), TOKENS, st.lists(TOKENS, min_size=1, max_size=3).map(tuple), TOKENS | st.none()
)
ADJUSTED = st.fixed_dictionaries(
    {"seed": st.integers(-(2**63), 2**63 - 1), "temperature": st.sampled_from([0.0, 0.7, 2.0])},
    optional={
        "logit_bias": BIASES,
        "min_tokens": st.integers(0, STEPS),
        "stop_token_ids": st.frozensets(TOKENS, max_size=3),
        "forced": FORCED | st.none(),
        "presence_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.5, 2),
    },
).map(lambda settings: asking(**settings))


@given(st.lists(ADJUSTED, min_size=1, max_size=5), st.integers(0, 1000))
def test_an_adjusted_row_is_the_same_alone_and_in_any_batch(rows: list[Request], seed: int) -> None:
    logits = noise(seed, STEPS, len(rows), VOCAB)
    alone = [draw([row], logits[:, place : place + 1])[0] for place, row in enumerate(rows)]
    assert draw(rows, logits) == alone


@given(ADJUSTED, st.integers(0, 1000))
def test_a_row_without_logits_processors_has_its_logits_untouched(mate: Request, seed: int) -> None:
    logits = noise(seed, STEPS, 3, VOCAB)
    sampler = Sampler([request(), mate, request()], VOCAB, CPU)
    for step in logits:
        seen = step.clone()
        sampler(seen)
        assert torch.equal(seen[[0, 2]], step[[0, 2]])


def test_what_no_row_asks_for_is_not_made() -> None:
    plain = [request(), request(stop_token_ids=frozenset({STOP}))]
    assert all(kind.of(plain, VOCAB, CPU) is None for kind in (Penalties, LogitBias, ForcedTokens))
    assert Sampler(plain, VOCAB, CPU).is_plain_argmax


# Biases


@given(st.lists(BIASES, min_size=1, max_size=4), st.integers(0, 1000))
def test_a_bias_is_added_exactly_and_nowhere_else(biases: list[tuple[tuple[int, float], ...]], seed: int) -> None:
    processor = LogitBias.of([request(logit_bias=bias) for bias in biases], VOCAB, CPU)
    logits = noise(seed, len(biases), VOCAB)
    expected = logits.clone()
    for row, bias in enumerate(biases):
        for token, value in bias:
            expected[row, token] = logits[row, token] + torch.tensor(value)
    for _ in range(3):  # the same at every step
        found = logits.clone()
        if processor is None:
            assert not any(biases)
            return
        processor.apply(found)
        processor.accept_tokens(torch.zeros(len(biases), dtype=torch.int64))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_large_bias_decides_for_or_against_a_token(temperature: float) -> None:
    logits = noise(1, 1, 1, VOCAB).expand(STEPS, 1, VOCAB)
    favourite = int(logits[0, 0].argmax())
    wanted, unwanted = (
        draw([request(temperature=temperature, seed=5, logit_bias=((token, bias),))], logits)[0]
        for token, bias in [(STOP, 100.0), (favourite, -100.0)]
    )
    assert wanted == [STOP] * STEPS
    assert favourite not in unwanted


# Least lengths


@pytest.mark.parametrize("least", [0, 1, 2, 5, STEPS])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stop_token_is_kept_out_until_the_least_length_and_no_longer(least: int, temperature: float) -> None:
    stubborn = preferring(STOP) * 9  # any draw lands on it where it may
    row = request(min_tokens=least, stop_token_ids=frozenset({STOP}), temperature=temperature)
    [tokens] = draw([row], stubborn)
    assert [token == STOP for token in tokens] == [place >= least for place in range(STEPS)]


def test_a_least_length_holds_for_its_own_row_and_all_of_its_own_stop_tokens() -> None:
    logits = preferring(STOP).expand(STEPS, 3, VOCAB) + preferring(CLOSE).expand(STEPS, 3, VOCAB) / 2
    both = frozenset({STOP, CLOSE})
    rows = [
        request(min_tokens=4, stop_token_ids=both),
        request(stop_token_ids=both),
        request(min_tokens=2, stop_token_ids=frozenset({STOP})),
    ]
    first, second, third = draw(rows, logits)
    assert not both & set(first[:4])
    assert first[4:] == [STOP] * (STEPS - 4)
    assert second == [STOP] * STEPS
    assert third == [CLOSE] * 2 + [STOP] * (STEPS - 2)


def test_no_bias_brings_a_stop_token_in_before_the_least_length() -> None:
    row = request(min_tokens=3, stop_token_ids=frozenset({STOP}), logit_bias=((STOP, 100.0),))
    [tokens] = draw([row], noise(2, STEPS, 1, VOCAB))
    assert [token == STOP for token in tokens] == [False] * 3 + [True] * (STEPS - 3)


@pytest.mark.parametrize("stop", [-1, VOCAB, 10 * VOCAB])
def test_a_stop_token_that_the_model_lacks_masks_nothing(stop: int) -> None:
    wanted = preferring(VOCAB - 1)
    row = request(min_tokens=3, stop_token_ids=frozenset({STOP, stop}))
    assert draw([row], wanted) == [[VOCAB - 1] * STEPS]


def test_a_token_that_is_impossible_stays_so_whatever_is_added() -> None:
    logits = noise(3, 1, VOCAB)
    logits[0, STOP] = OFF
    processor = LogitBias.of([request(logit_bias=((STOP, 100.0),))], VOCAB, CPU)
    assert processor is not None
    processor.apply(logits)
    assert logits[0, STOP] == OFF


# Forced tokens


def forced(after: int, **settings: Any) -> Request:
    """A row whose thinking ends after so many tokens, with a newline (4), `CLOSE` and a newline."""
    return request(forced=Forced(after=after, unless=CLOSE, tokens=(4, CLOSE, 4)), **settings)


@pytest.mark.parametrize("after", [1, 2, 5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forced_tokens_come_after_the_budget_and_then_the_row_is_free(after: int, temperature: float) -> None:
    [tokens] = draw([forced(after, temperature=temperature)], preferring(9) * 9)
    assert tokens == [9] * after + [4, CLOSE, 4] + [9] * (STEPS - after - 3)


@pytest.mark.parametrize("said_at", [0, 1, 4])
def test_a_row_that_ended_its_thinking_itself_is_never_forced(said_at: int) -> None:
    wanted = [9] * said_at + [CLOSE, 9]
    [tokens] = draw([forced(5)], preferring(*wanted))
    assert tokens == wanted[:-1] + [9] * (STEPS - said_at - 1)


def test_a_row_that_ends_its_thinking_too_late_was_forced_once() -> None:
    [tokens] = draw([forced(3)], preferring(9, 9, 9, CLOSE, 9, 9, 9, CLOSE, 9))
    assert tokens == [9, 9, 9, 4, CLOSE, 4, 9, CLOSE, 9, 9]


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("said", [5, 9])
def test_a_row_that_does_not_begin_with_a_thought_is_never_forced(said: int, after: int) -> None:
    rows = [request(forced=Forced(after, CLOSE, (CLOSE, 4), first=first)) for first in (5, None)]
    begun, free = draw(rows, preferring(said, 9).expand(STEPS, 2, VOCAB))
    assert free == [said] + [9] * (after - 1) + [CLOSE, 4] + [9] * (STEPS - after - 2)
    assert begun == (free if said == 5 else [said] + [9] * (STEPS - 1))


def test_what_is_forced_is_forced_through_bias_penalties_and_cuts() -> None:
    row = forced(
        2,
        logit_bias=((4, -100.0), (CLOSE, -100.0)),
        temperature=2.0,
        top_k=1,
        top_p=0.1,
        frequency_penalty=2.0,
        repetition_penalty=2.0,
    )
    [tokens] = draw([row], noise(4, STEPS, 1, VOCAB))
    assert tokens[2:5] == [4, CLOSE, 4]


def test_rows_of_one_batch_are_forced_each_in_its_own_time() -> None:
    logits = preferring(9).expand(STEPS, 4, VOCAB)
    rows = [forced(1), request(), forced(3), forced(20)]
    assert draw(rows, logits) == [
        [9, 4, CLOSE, 4, 9, 9, 9, 9, 9, 9],
        [9] * STEPS,
        [9, 9, 9, 4, CLOSE, 4, 9, 9, 9, 9],
        [9] * STEPS,
    ]
