"""Log probabilities against float64: they are the model's own, whatever else a request asks for."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from batching.padded import PaddedEngine
from batching.sampling import Logprobs, OtherLogprobs, Sampler
from batching.types import Forced, Request, TokenLogprob
from batching.worker import BatchSteps, NewTokens
from tests.batching.conftest import loose_row, request
from tests.tiny import tiny_model

CPU = torch.device("cpu")
VOCAB = 40
CLOSE = 1e-5


def asking(**settings: Any) -> Request:
    return request((1, 2, 3), **settings)


TOPS = st.none() | st.integers(0, 20)
ASKING = st.fixed_dictionaries(
    {"top_logprobs": TOPS, "temperature": st.sampled_from([0.0, 0.3, 2.0]), "seed": st.integers(0, 2**63 - 1)},
    optional={
        "top_k": st.integers(1, 5),
        "top_p": st.floats(0.1, 1),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.5, 2),
        "logit_bias": st.just(((3, 100.0), (4, -100.0))),
        "min_tokens": st.just(2),
        "stop_token_ids": st.just(frozenset({5, 6})),
        "forced": st.just(Forced(2, 7, (8, 9))),
    },
).map(lambda settings: asking(**settings))


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


def noted(requests: Sequence[Request], logits: Tensor) -> list[dict[int, TokenLogprob]]:
    """What is told of each step of logits [steps, rows, vocabulary], by row."""
    sampler = Sampler(requests, VOCAB, CPU)
    found = []
    for step in logits:
        tokens = sampler(step.clone()).tolist()
        found.append(dict(sampler.logprobs))
        assert all(entry.token == tokens[row] for row, entry in found[-1].items())
    return found


def check(entry: TokenLogprob, logits: Tensor, wanted: int) -> None:
    """Against the raw logits [vocabulary] of the entry's step."""
    exact = logits.double().log_softmax(-1).tolist()
    assert entry.logprob == pytest.approx(exact[entry.token], abs=CLOSE)
    assert len(entry.top) == wanted
    assert [value for _, value in entry.top] == pytest.approx([exact[token] for token, _ in entry.top], abs=CLOSE)
    assert [value for _, value in entry.top] == pytest.approx(sorted(exact, reverse=True)[:wanted], abs=CLOSE)
    assert [value for _, value in entry.top] == sorted((value for _, value in entry.top), reverse=True)
    assert len({token for token, _ in entry.top}) == wanted


@given(st.lists(ASKING, min_size=1, max_size=5), st.integers(0, 1000))
def test_they_are_of_the_raw_logits_for_exactly_the_rows_that_ask(rows: list[Request], seed: int) -> None:
    logits = noise(seed, 4, len(rows), VOCAB)
    asked = {row: r.sampling.top_logprobs for row, r in enumerate(rows) if r.sampling.top_logprobs is not None}
    for step, found in zip(logits, noted(rows, logits), strict=True):
        assert set(found) == set(asked)
        for row, entry in found.items():
            check(entry, step[row], asked[row])


@given(st.lists(ASKING, min_size=2, max_size=5), st.integers(0, 1000))
def test_asking_changes_no_token_of_anyone(rows: list[Request], seed: int) -> None:
    logits = noise(seed, 4, len(rows), VOCAB)
    silent = [request((1, 2, 3), **(_settings(row) | {"top_logprobs": None})) for row in rows]
    asking, quiet = Sampler(rows, VOCAB, CPU), Sampler(silent, VOCAB, CPU)
    assert not quiet.logprobs
    for step in logits:
        assert asking(step.clone()).tolist() == quiet(step.clone()).tolist()


@given(st.lists(ASKING, min_size=1, max_size=5), st.integers(0, 1000))
def test_they_are_the_same_alone_and_in_any_batch(rows: list[Request], seed: int) -> None:
    logits = noise(seed, 4, len(rows), VOCAB)
    together = noted(rows, logits)
    for place, row in enumerate(rows):
        alone = noted([row], logits[:, place : place + 1])
        assert [step.get(0) for step in alone] == [step.get(place) for step in together]


def _settings(row: Request) -> dict[str, Any]:
    return {name: getattr(row.sampling, name) for name in type(row.sampling).__dataclass_fields__}


def test_the_chosen_token_is_told_whether_or_not_it_is_among_the_likeliest() -> None:
    logits = noise(1, 1, 2, VOCAB)
    least = int(logits[0, 0].argmin())
    rows = [request(top_logprobs=2, logit_bias=((least, 100.0),)), request(top_logprobs=2)]
    [found] = noted(rows, logits)
    assert found[0].token == least
    assert least not in dict(found[0].top)
    assert found[1].top[0] == (found[1].token, found[1].logprob)


def test_none_of_the_others_is_told_where_only_the_chosen_one_is_asked_for() -> None:
    [found] = noted([request(top_logprobs=0), request(top_logprobs=20)], noise(2, 1, 2, VOCAB))
    assert found[0].top == ()
    assert len(found[1].top) == 20


@given(st.lists(ASKING, min_size=1, max_size=4), st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=6), min_size=4))
def test_named_tokens_come_after_the_likeliest_of_their_row(rows: list[Request], names: list[list[int]]) -> None:
    logits = noise(7, 2, len(rows), VOCAB)
    naming = [
        request((1, 2, 3), **_settings(row) | {"logprob_token_ids": tuple(ids)})
        for row, ids in zip(rows, names, strict=False)
    ]
    for step, plain, found in zip(logits, noted(rows, logits), noted(naming, logits), strict=True):
        assert set(plain) == set(found)
        for place, entry in found.items():
            likeliest = plain[place].top
            assert entry.token == plain[place].token
            assert entry.top[: len(likeliest)] == likeliest
            rest = [token for token in dict.fromkeys(names[place]) if token not in dict(likeliest)]
            exact = step[place].double().log_softmax(-1).tolist()
            assert [token for token, _ in entry.top[len(likeliest) :]] == rest
            assert [value for _, value in entry.top[len(likeliest) :]] == pytest.approx(
                [exact[token] for token in rest], abs=CLOSE
            )


def test_on_their_way_from_a_gpu_they_are_the_same() -> None:
    from batching.packed.cuda_output import AsyncLogprobs

    width, logits = 2, noise(5, 3 * 2, VOCAB)
    tokens = torch.tensor([[3, 4], [5, -1], [6, 7]])
    asked = [request(top_logprobs=2, logprob_token_ids=(9,)), request(top_logprobs=0, logprob_token_ids=(1, 2, 3))]
    others = OtherLogprobs([each.sampling for each in asked])
    output = AsyncLogprobs([0, 1], others, torch.tensor([0, 1]), others.ids, logits, tokens)
    found = output.read(tokens.numpy())
    assert set(found) == {0, 1, 2}, "by place among the tokens that are given"
    for place, (row, at) in enumerate([(0, 0), (0, 1), (1, 0)]):
        wanted = Logprobs.of([asked[row]], CPU)
        assert wanted is not None
        wanted.read(logits[row * width + at][None])
        wanted.accept_tokens(tokens[row, at][None])
        assert found[place] == wanted.by_row[0]


def test_a_token_that_the_model_rules_out_has_a_probability_of_zero() -> None:
    logits = noise(3, 1, 1, VOCAB)
    logits[0, 0, 5:] = -float("inf")
    [found] = noted([request(top_logprobs=7)], logits)
    assert [value == -float("inf") for _, value in found[0].top] == [False] * 5 + [True] * 2


def test_an_engine_tells_each_row_that_asks_of_each_of_its_tokens() -> None:
    torch.set_num_threads(1)
    model = tiny_model()
    engine = PaddedEngine(model, token_budget=4096)
    requests = [
        request((5, 6, 7), max_tokens=4, top_logprobs=3, temperature=2.0, seed=1, repetition_penalty=1.5),
        request((9, 8), max_tokens=6),
        request((1, 2, 3, 4, 5, 6), max_tokens=3, top_logprobs=0),
        request((11,), max_tokens=6, top_logprobs=20, logit_bias=((77, 100.0),)),
    ]
    rows = [loose_row(request) for request in requests]
    told: dict[int, list[tuple[int, TokenLogprob | None]]] = {place: [] for place in range(len(rows))}

    def report(tokens: NewTokens, running: int) -> None:
        for row, token, _, entry in tokens:
            told[rows.index(row)].append((token, entry))

    engine.run(rows, BatchSteps(report))
    for place, asked in enumerate(requests):
        tokens = [token for token, _ in told[place]]
        assert len(tokens) == asked.sampling.max_tokens
        with torch.inference_mode():
            logits = model(torch.tensor([[*asked.prompt, *tokens]])).logits[0]
        for step, (token, entry) in enumerate(told[place]):
            if asked.sampling.top_logprobs is None:
                assert entry is None
                continue
            assert entry is not None
            assert entry.token == token
            raw = logits[len(asked.prompt) + step - 1].double().log_softmax(-1)
            assert entry.logprob == pytest.approx(raw[token].item(), abs=1e-3)
            best = raw.topk(asked.sampling.top_logprobs)
            assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-3)
    assert {token for token, _ in told[3]} == {77}
