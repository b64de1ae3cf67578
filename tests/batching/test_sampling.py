"""The sampler of a batch against a slow reference of one row, written in plain Python floats (64 bits)."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from batching.sampling import CANDIDATES, Filter, Sampler, exponential
from batching.types import Sampling
from tests.batching.conftest import request, sampling

CPU = torch.device("cpu")
SEEDS = st.integers(-(2**63), 2**63 - 1)
LOGITS = st.lists(st.integers(-80, 80).map(lambda eighths: eighths / 8), min_size=1, max_size=40)
CUTS = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.1, 2.0),
        "top_k": st.integers(0, 45),
        "top_p": st.floats(0.01, 1.0),
        "min_p": st.floats(0.0, 1.0),
    }
)
PENALTIES = st.fixed_dictionaries(
    {
        "presence_penalty": st.floats(-2.0, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "repetition_penalty": st.floats(0.1, 3.0),
    }
)
ANY = st.builds(
    lambda seed, temperature, cuts, penalties: sampling(
        **{**cuts, **penalties, "seed": seed, "temperature": temperature}
    ),
    SEEDS,
    st.sampled_from([0.0, 0.01, 0.7, 1.0, 2.0]),
    st.one_of(st.just({}), CUTS),
    st.one_of(st.just({}), PENALTIES),
)


def draw(rows: Sequence[Sampling], steps: Tensor, prompts: Sequence[tuple[int, ...]] | None = None) -> list[list[int]]:
    """Tokens of every row, from logits [steps, rows, vocabulary]."""
    prompts = prompts or [(0,)] * len(rows)
    requests = [
        request(prompt, **{name: getattr(row, name) for name in Sampling.__dataclass_fields__})
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    sampler = Sampler(requests, steps.shape[-1], CPU)
    chosen = torch.stack([sampler(logits.clone()) for logits in steps], dim=1)
    return chosen.tolist()


def noise(seed: int, *shape: int, spread: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


# The reference


def scaled(logits: Sequence[float], temperature: float) -> list[float]:
    return [(logit - max(logits)) / temperature for logit in logits]


def kept(logits: Sequence[float], row: Sampling, slack: float) -> set[int]:
    """Tokens that the limits leave. `slack` loosens top_p and min_p by so much, against rounding."""
    values = scaled(logits, row.temperature)
    order = sorted(values, reverse=True)[: row.top_k or None]
    total = sum(map(math.exp, order))
    smallest, before = order[0], 0.0
    for value in order:
        inside_p = row.top_p >= 1.0 or before < (row.top_p + slack) * total
        if not (inside_p and math.exp(value) >= row.min_p - slack) and value != order[0]:
            break
        if inside_p and math.exp(value) >= row.min_p - slack:
            smallest = value
        before += math.exp(value)
    return {token for token, value in enumerate(values) if value >= smallest}


def penalise(logits: list[float], row: Sampling, prompt: Sequence[int], output: Sequence[int]) -> list[float]:
    """Penalties of one row: repetition as transformers has it, then frequency and presence as OpenAI has them."""
    result = list(logits)
    for token in {*prompt, *output}:
        result[token] *= row.repetition_penalty if result[token] <= 0 else 1 / row.repetition_penalty
    for token, count in Counter(output).items():
        result[token] -= count * row.frequency_penalty + row.presence_penalty
    return result


def splitmix64(x: int) -> int:
    """The mixer of Steele, Lea and Flood 2014 in Python's own integers, without their fixed width."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


# Limits


@given(LOGITS, CUTS)
def test_the_limits_leave_the_tokens_of_the_reference(logits: list[float], cuts: dict[str, Any]) -> None:
    row = sampling(**cuts)
    probabilities = Filter([row], CPU)(torch.tensor([logits]))[0]
    left = set(probabilities.nonzero().flatten().tolist())
    # exp of less than about -100 is zero in 32 bits.
    possible = {token for token, value in enumerate(scaled(logits, row.temperature)) if value > -80}
    assert kept(logits, row, -1e-5) & possible <= left
    assert left & possible <= kept(logits, row, 1e-5)


@given(LOGITS, CUTS)
def test_what_is_left_is_the_softmax_of_the_reference(logits: list[float], cuts: dict[str, Any]) -> None:
    row = sampling(**cuts)
    probabilities = Filter([row], CPU)(torch.tensor([logits]))[0].tolist()
    weights = [
        math.exp(value) if left else 0.0
        for value, left in zip(scaled(logits, row.temperature), probabilities, strict=True)
    ]
    assert probabilities == pytest.approx([weight / sum(weights) for weight in weights], abs=1e-5)


@pytest.mark.parametrize(
    ("cuts", "left"),
    [
        ({"top_k": 1}, {1, 3}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 3}, {1, 3, 0, 4}),
        ({"top_p": 0.1}, {1, 3}),
        ({"min_p": 0.3}, {1, 3, 0, 4}),
        ({"min_p": 1.0}, {1, 3}),
        ({}, {0, 1, 2, 3, 4}),
    ],
)
def test_tokens_tied_with_the_last_one_kept_stay(cuts: dict[str, Any], left: set[int]) -> None:
    logits = torch.tensor([[1.0, 2.0, -1.0, 2.0, 1.0]])
    probabilities = Filter([sampling(temperature=1.0, **cuts)], CPU)(logits)[0]
    assert set(probabilities.nonzero().flatten().tolist()) == left


@pytest.mark.parametrize("cuts", [{"top_p": 0.9}, {"top_p": 0.999}, {"top_k": 700}, {"min_p": 0.8}])
def test_limits_that_reach_beyond_the_candidates_are_found_all_the_same(cuts: dict[str, Any]) -> None:
    logits = noise(1, 1, 4 * CANDIDATES, spread=0.05)
    row = sampling(temperature=1.0, **cuts)
    left = set(Filter([row], CPU)(logits)[0].nonzero().flatten().tolist())
    assert len(left) > CANDIDATES
    assert kept(logits[0].tolist(), row, -1e-5) <= left <= kept(logits[0].tolist(), row, 1e-5)


@pytest.mark.parametrize("top_k", [CANDIDATES, CANDIDATES + 1, 3 * CANDIDATES])
def test_top_p_is_a_share_of_what_a_wide_top_k_leaves(top_k: int) -> None:
    logits = noise(1, 1, 4 * CANDIDATES, spread=0.05)
    row = sampling(temperature=1.0, top_k=top_k, top_p=0.2)
    left = set(Filter([row], CPU)(logits)[0].nonzero().flatten().tolist())
    assert len(left) < CANDIDATES
    assert kept(logits[0].tolist(), row, -1e-5) <= left <= kept(logits[0].tolist(), row, 1e-5)


# Penalties and greedy rows


@given(st.integers(0, 10**6), st.lists(st.integers(0, 11), min_size=1, max_size=8), PENALTIES)
def test_penalties_follow_their_formulas(seed: int, prompt: list[int], penalties: dict[str, float]) -> None:
    row = sampling(**penalties)
    steps = noise(seed, 8, 1, 12)
    output: list[int] = []
    for logits in steps[:, 0].tolist():
        expected = penalise(logits, row, prompt, output)
        first, second = sorted(expected, reverse=True)[:2]
        assume(first - second > 1e-4)
        output.append(expected.index(first))
    assert draw([row], steps, [tuple(prompt)]) == [output]


def test_presence_and_frequency_count_the_output_and_not_the_prompt() -> None:
    steps = torch.tensor([5.0, 4.9, 4.5]).repeat(4, 1, 1)
    assert draw([sampling(presence_penalty=0.3)], steps, [(0, 0, 1)]) == [[0, 1, 0, 0]]
    assert draw([sampling(frequency_penalty=0.3)], steps, [(0, 0, 1)]) == [[0, 1, 0, 1]]


def test_repetition_counts_prompt_and_output_once() -> None:
    steps = torch.tensor([5.0, 4.9, 4.5, -1.0]).repeat(4, 1, 1)
    assert draw([sampling(repetition_penalty=1.2)], steps, [(0, 0)]) == [[1, 2, 0, 0]]


def test_penalties_come_before_the_limits_of_a_sampled_row() -> None:
    steps = torch.tensor([5.0, 4.9, 4.5]).repeat(2, 1, 1)
    assert draw([sampling(temperature=1.0, top_k=1, repetition_penalty=1.5)], steps, [(0, 1)]) == [[2, 0]]


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_a_greedy_row_takes_its_largest_logit(seed: int, rows: int) -> None:
    steps = noise(seed, 3, rows, 50)
    assert draw([sampling(seed=seed)] * rows, steps) == steps.argmax(-1).T.tolist()


def test_only_greedy_rows_without_penalties_are_plain() -> None:
    plain, sampled, penalised = sampling(), sampling(temperature=1.0), sampling(presence_penalty=0.1)

    def is_plain(*rows: Sampling) -> bool:
        fields = [{name: getattr(row, name) for name in Sampling.__dataclass_fields__} for row in rows]
        return Sampler([request(**field) for field in fields], 10, CPU).is_plain_argmax

    assert is_plain(plain, plain)
    assert not is_plain(plain, sampled)
    assert not is_plain(plain, penalised)


# Independence


@given(st.lists(ANY, min_size=2, max_size=6), st.sampled_from([7, 300, 1000]), st.integers(0, 10**6), st.data())
@settings(max_examples=60, deadline=None)
def test_a_row_is_independent_of_its_batch(
    rows: list[Sampling], vocabulary: int, seed: int, data: st.DataObject
) -> None:
    steps = noise(seed, 4, len(rows), vocabulary, spread=data.draw(st.sampled_from([0.0, 0.05, 3.0, 1e4])))
    prompts = [tuple(range(place % 3 + 1)) for place in range(len(rows))]
    together = draw(rows, steps, prompts)
    order = data.draw(st.permutations(range(len(rows))))
    some = order[: data.draw(st.integers(1, len(rows)))]
    subset = draw([rows[row] for row in some], steps[:, some], [prompts[row] for row in some])
    assert subset == [together[row] for row in some]
    alone = some[0]
    assert draw([rows[alone]], steps[:, [alone]], [prompts[alone]]) == [together[alone]]


@pytest.mark.parametrize("spread", [0.02, 1.0])
def test_a_row_is_independent_of_its_batch_with_a_large_vocabulary(spread: float) -> None:
    rows = [sampling(temperature=1.0, seed=seed, top_p=0.5 + seed / 20) for seed in range(8)]
    steps = noise(5, 2, len(rows), 40_000, spread=spread)
    together = draw(rows, steps)
    assert [draw([row], steps[:, [place]])[0] for place, row in enumerate(rows)] == together


@pytest.mark.parametrize("seed", range(8))
def test_a_cut_that_falls_on_a_token_falls_alike_alone_and_in_any_batch(seed: int) -> None:
    rows = 16
    logits = noise(seed, 1, 40_000, spread=3.0).expand(rows, -1)
    weights = (logits[0] - logits[0].max()).sort(descending=True).values.exp()
    before = (weights.cumsum(-1) - weights)[200 : 200 + rows]
    # Each top_p is the sum of whole tokens, so that one bit more or less in the total moves the cut.
    cuts = [sampling(temperature=1.0, top_p=float(part)) for part in before / weights.sum()]
    together = Filter(cuts, CPU)(logits) > 0
    assert all(torch.equal(Filter([cut], CPU)(logits[:1])[0] > 0, together[place]) for place, cut in enumerate(cuts))


# Draws


EIGHT = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 1.5, 0.0, -9.0])
DRAWS = 8000


def check_frequencies(row: Sampling, drawn: Iterable[int]) -> None:
    """Raises unless so many tokens are as often among them as their probability says."""
    counts = Counter(drawn)
    probabilities = Filter([row], CPU)(EIGHT[None])[0].tolist()
    assert not any(counts[token] for token, p in enumerate(probabilities) if p == 0.0)
    expected = {token: p * DRAWS for token, p in enumerate(probabilities) if p > 0.0}
    distance = sum((counts[token] - number) ** 2 / number for token, number in expected.items())
    assert distance < 30  # chi-square with at most 7 degrees of freedom exceeds it once in 10,000 times


SOME_CUTS: list[dict[str, Any]] = [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.1}]


@pytest.mark.parametrize("cuts", SOME_CUTS)
def test_over_seeds_tokens_come_as_often_as_their_probability_says(cuts: dict[str, Any]) -> None:
    rows = [sampling(**{"temperature": 1.0, "seed": seed, **cuts}) for seed in range(DRAWS)]
    check_frequencies(rows[0], [first for (first,) in draw(rows, EIGHT.repeat(1, DRAWS, 1))])


def test_over_positions_tokens_come_as_often_as_their_probability_says() -> None:
    rows = [sampling(**{"temperature": 1.0, "seed": 0, **cuts}) for cuts in SOME_CUTS]
    for row, drawn in zip(rows, draw(rows, EIGHT.repeat(DRAWS, len(rows), 1)), strict=True):
        check_frequencies(row, drawn)


@given(LOGITS, CUTS, SEEDS)
def test_a_token_of_probability_zero_is_never_drawn(logits: list[float], cuts: dict[str, Any], seed: int) -> None:
    row = sampling(**cuts | {"seed": seed})
    ((token,),) = draw([row], torch.tensor([[logits]]))
    assert Filter([row], CPU)(torch.tensor([logits]))[0, token] > 0


def test_rounding_of_the_logits_changes_a_draw_only_in_a_dead_heat() -> None:
    """Flat logits, large vocabulary: what a search in summed probabilities gets wrong every few hundred draws."""
    rows = [sampling(temperature=1.0, seed=seed) for seed in range(64)]
    logits = noise(3, 20, len(rows), 20_000, spread=1.0)
    rounded = logits * (1 + 2e-6 * (noise(4, 20, len(rows), 20_000, spread=1.0) > 0))
    changed = sum(a != b for a, b in zip(draw(rows, logits), draw(rows, rounded), strict=True))
    assert changed == 0


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0, 2.0])
@pytest.mark.parametrize("cuts", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}])
def test_extreme_logits_give_probabilities(temperature: float, cuts: dict[str, Any]) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, 9999.0], [-1e4, -1e4, -1e4, -1e4], [0.0, 1e-4, -1e-4, 1e4]])
    rows = [sampling(temperature=temperature, seed=seed, **cuts) for seed in range(3)]
    probabilities = Filter(rows, CPU)(logits)
    assert bool(probabilities.isfinite().all())
    assert probabilities.sum(-1).tolist() == pytest.approx([1.0] * 3)
    tokens = draw(rows, logits[None])
    assert all(float(probabilities[row, token]) > 0 for row, (token,) in enumerate(tokens))


@pytest.mark.parametrize("cuts", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {"repetition_penalty": 2.0}])
def test_logits_that_are_not_numbers_still_give_a_token(cuts: dict[str, Any]) -> None:
    logits = torch.full((1, 2, 1000), math.nan)
    rows = [sampling(temperature=1.0, **cuts), sampling(**cuts)]
    assert all(0 <= token < 1000 for row in draw(rows, logits) for token in row)


def lowbias32(x: int) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


@given(SEEDS, st.integers(0, 10**6))
def test_a_time_is_a_mix_of_seed_position_and_token(seed: int, position: int) -> None:
    (times,) = exponential(torch.tensor([seed]), position, 50).tolist()
    key = splitmix64(splitmix64(seed % 2**64) + position) % 2**32
    for token, time in enumerate(times):
        bits = lowbias32((token * 0x9E3779B9 + key) % 2**32) % 2**31
        exact = -math.log1p(-(bits + 0.5) / 2**31)
        # In float32 a number next to 1 is known to 2**-24, which its logarithm makes larger by exp(exact).
        assert time == pytest.approx(exact, rel=1e-5, abs=2.0**-23 * math.exp(exact) if exact > 1 else 1e-9)
        assert time > 0


def test_times_are_exponential_and_differ_by_seed_position_and_token() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the first output of the published generator from state 0
    by_seed = exponential(torch.arange(-500, 500), 0, 1).flatten().tolist()
    by_position = [exponential(torch.tensor([7]), position, 1).item() for position in range(1000)]
    by_token = exponential(torch.tensor([7]), 0, 1000).flatten().tolist()
    for times in (by_seed, by_position, by_token):
        assert len(set(times)) > 995
        below = [1 - math.exp(-time) for time in times]  # uniform, if the times are exponential
        assert sum(below) / 1000 == pytest.approx(0.5, abs=0.03)
        mean_step = sum(abs(a - b) for a, b in pairwise(below)) / 999
        assert mean_step == pytest.approx(1 / 3, abs=0.03)  # neighbours are independent
