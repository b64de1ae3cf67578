"""Log probabilities of prompts on both engines, against one plain forward pass of transformers' own model."""

import contextlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, PreTrainedModel

from batching import scoring
from batching.errors import OutOfMemory
from batching.packed.attention import Chunk
from batching.packed.engine import PackedEngine
from batching.packed.kv_cache import BLOCK_SIZE
from batching.packed.runner import RunningSequence
from batching.padded import PaddedEngine
from batching.scoring import PIECE, WIDE, Head, logits_bytes, prompt_logprobs
from batching.stream import Row
from batching.types import Finish, PromptLogprob, Request
from batching.worker import BatchSteps, NewTokens
from tests.batching.conftest import loose_row, request
from tests.batching.test_padded import KINDS, some_prompt, some_request
from tests.tiny import SHAPE, tiny_model

CLOSE = 1e-4
VOCABULARY: int = SHAPE["vocab_size"]

Engine = PackedEngine | PaddedEngine
Told = list[PromptLogprob | None]


pytestmark = pytest.mark.usefixtures("one_thread")


def padded(kind: str = "qwen3") -> PaddedEngine:
    return PaddedEngine(tiny_model(kind), token_budget=4096)


def packed(kind: str = "qwen3", **options: Any) -> PackedEngine:
    return PackedEngine(tiny_model(kind), **{"num_slots": 4, "token_budget": 2000, "prefill_chunk": 32} | options)


ENGINES: dict[str, Callable[..., Engine]] = {"padded": padded, "packed": packed}


class Run:
    """Runs requests and keeps what each row was told of its prompt and its tokens, and why it ended."""

    def __init__(
        self, engine: Engine, requests: Sequence[Request], after: Callable[["Run", Row], None] = lambda run, row: None
    ) -> None:
        self.rows = [loose_row(request) for request in requests]
        self.told: dict[Row, Told] = {row: [] for row in self.rows}
        self.pieces: list[Row] = []
        self.sent: dict[Row, list[int]] = {row: [] for row in self.rows}
        self.finishes: dict[Row, Finish] = {}
        self._after = after
        engine.run(self.rows, BatchSteps(self._report, self.rows, report_prompt=self._report_prompt))

    def _report(self, tokens: NewTokens, running: int) -> None:
        for row, token, finish, _ in tokens:
            assert row.request.sampling.prompt_logprobs is None or len(self.told[row]) == len(row.request.prompt)
            self.sent[row].append(token)
            self._ended(row, finish)

    def _report_prompt(
        self, row: Row, logprobs: Sequence[PromptLogprob | None], finish: Finish | None, running: int
    ) -> None:
        assert row not in self.finishes
        assert not self.sent[row], "a prompt's log probabilities come before the first token"
        self.told[row] += logprobs
        self.pieces.append(row)
        self._ended(row, finish)
        self._after(self, row)

    def _ended(self, row: Row, finish: Finish | None) -> None:
        if finish is not None:
            self.finishes[row] = finish

    @property
    def answers(self) -> list[list[int]]:
        return list(self.sent.values())

    @property
    def prompts(self) -> list[Told]:
        return list(self.told.values())


def raw_logprobs(model: PreTrainedModel, prompt: Sequence[int]) -> Tensor:
    """What transformers itself says of what comes after each token of a prompt: [tokens, vocabulary] in float64."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([prompt])).logits[0]
    return logits.double().log_softmax(-1)


def check(told: Told, model: PreTrainedModel, asked: Request, close: float = CLOSE) -> None:
    """Against the model's own, for each token of the prompt."""
    top = asked.sampling.prompt_logprobs
    assert top is not None
    assert len(told) == len(asked.prompt)
    assert told[0] is None
    exact = raw_logprobs(model, asked.prompt)
    for place, (entry, token) in enumerate(zip(told[1:], asked.prompt[1:], strict=True)):
        assert entry is not None
        assert entry.token == token
        assert entry.logprob == pytest.approx(exact[place, token].item(), abs=close)
        best = exact[place].topk(top)
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=close)
        higher = int((exact[place] > exact[place, token] + close).sum())
        as_high = int((exact[place] > exact[place, token] - close).sum())
        assert higher < entry.rank <= as_high


def of(prompt: Sequence[int], top: int | None = 2, **settings: Any) -> Request:
    return request(tuple(prompt), prompt_logprobs=top, **settings)


def long_prompt(dice: random.Random, length: int) -> tuple[int, ...]:
    return tuple(dice.choices(range(VOCABULARY), k=length))


# They are the model's own


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_each_token_of_a_prompt_has_the_models_own_log_probability(engine: str, kind: str) -> None:
    dice = random.Random(1)
    lengths = [1, 2, 31, 32, 33, 34, 120, PIECE, PIECE + 1, PIECE + 2]
    asked = [of(long_prompt(dice, length), dice.choice([0, 1, 5]), max_tokens=2) for length in lengths]
    run = Run(ENGINES[engine](kind), asked)
    model = tiny_model(kind)
    for row, told in run.told.items():
        check(told, model, row.request)
    assert set(run.finishes.values()) == {Finish.LENGTH}
    assert {len(answer) for answer in run.answers} == {2}


@pytest.mark.parametrize("engine", ENGINES)
def test_asking_changes_no_token_of_anyone_and_nothing_else_changes_what_is_told(engine: str) -> None:
    dice = random.Random(2)
    plain = [some_request(dice) for _ in range(8)]
    asking = [of(r.prompt, n, **settings_of(r)) if (n := dice.choice([None, 0, 3])) is not None else r for r in plain]
    assert any(r.sampling.prompt_logprobs is not None for r in asking)
    run = Run(ENGINES[engine](), asking)
    assert run.answers == Run(ENGINES[engine](), plain).answers
    model = tiny_model()
    for row, told in run.told.items():
        if row.request.sampling.prompt_logprobs is None:
            assert told == []
        else:
            check(told, model, row.request)


def settings_of(asked: Request) -> dict[str, Any]:
    names = set(type(asked.sampling).__dataclass_fields__) - {"prompt_logprobs"}
    return {name: getattr(asked.sampling, name) for name in names}


def test_models_that_bend_their_logits_are_asked_for_them_themselves() -> None:
    shape = SHAPE | {"max_position_embeddings": 128}
    bending = [
        Gemma2Config(**shape, head_dim=16, final_logit_softcapping=2.0),
        CohereConfig(**shape, logit_scale=0.25),
        GraniteConfig(**shape, logits_scaling=8.0),
    ]
    for config in bending:
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
        model.config.eos_token_id = None
        asked = of(long_prompt(random.Random(3), 40), 3, max_tokens=1)
        run = Run(PaddedEngine(model, token_budget=1024), [asked])
        check(run.prompts[0], model, asked)


# A row that wants no token


@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_without_tokens_is_over_with_its_prompt(engine: str) -> None:
    dice = random.Random(4)
    none = [of(long_prompt(dice, length), max_tokens=0) for length in (1, 2, 3, 33, 300)]
    some = [request(some_prompt(dice), max_tokens=5) for _ in range(2)]
    made = ENGINES[engine]()
    for batch in (none, [none[0]], none + some):
        run = Run(made, batch)
        assert set(run.finishes.values()) == {Finish.LENGTH}
        assert all(row.over for row in run.rows)
        assert [len(answer) for answer in run.answers] == [r.sampling.max_tokens for r in batch]
        for row in run.rows[: len(none)]:
            check(run.told[row], tiny_model(), row.request)


# Memory, other rows and faults


@pytest.mark.parametrize("engine", ENGINES)
def test_the_logits_of_no_more_than_a_piece_are_there_at_a_time(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    wide: list[int] = []
    read, split = scoring.prompt_logprobs, scoring._read

    def noted(logits: Tensor, tokens: Sequence[int], top: int) -> list[PromptLogprob]:
        sizes.append(len(logits))
        return read(logits, tokens, top)

    def noted_part(logits: Tensor, tokens: Tensor, top: int) -> Any:
        wide.append(len(logits))
        return split(logits, tokens, top)

    monkeypatch.setattr(scoring, "prompt_logprobs", noted)
    monkeypatch.setattr("batching.packed.scheduler.prompt_logprobs", noted)
    monkeypatch.setattr(scoring, "_read", noted_part)
    made = packed(prefill_chunk=2048) if engine == "packed" else padded()
    Run(made, [of(long_prompt(random.Random(5), PIECE + 100), max_tokens=0)])
    assert sizes == [PIECE, 99]
    assert max(wide) == WIDE
    assert sum(wide) == PIECE + 99


def test_what_a_piece_takes_is_kept_free() -> None:
    model = tiny_model()
    assert logits_bytes(model) == VOCABULARY * (PIECE * 4 + WIDE * 9)
    asked: list[tuple[int, ...]] = []
    head = Head(model, long_prompt(random.Random(6), 20))
    handle = model.lm_head.register_forward_pre_hook(lambda _, inputs: asked.append(tuple(inputs[0].shape)))
    assert head.logits(5, 7).shape == (7, VOCABULARY)
    handle.remove()
    assert asked == [(1, 7, SHAPE["hidden_size"])]


def test_a_decode_step_comes_between_any_two_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = packed()
    order: list[str] = []
    forward = engine.runner.forward

    def noted(
        decoding: Sequence[RunningSequence], chunks: Sequence[tuple[RunningSequence, Chunk]], num_draft_tokens: int
    ) -> None:
        if decoding:
            order.append("d")
        forward(decoding, chunks, num_draft_tokens)

    monkeypatch.setattr(engine.runner, "forward", noted)
    asked = [request((1, 2), max_tokens=40), *(of(long_prompt(random.Random(7), 150), max_tokens=0) for _ in range(2))]
    Run(engine, asked, lambda run, row: order.append("p"))
    between = "".join(order).replace("pp", "p", 2)  # the first token of each, of which there is nothing to compute
    assert "pp" not in between
    assert between.count("p") == 2 * 5


@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_that_leaves_is_scored_no_further(engine: str) -> None:
    def leave(run: Run, row: Row) -> None:
        run.rows[0].cancelled = len(run.told[run.rows[0]]) > 100

    dice = random.Random(8)
    asked = [of(long_prompt(dice, 500), max_tokens=3), of(long_prompt(dice, 60), max_tokens=3)]
    run = Run(ENGINES[engine](), asked, leave)
    assert run.rows[0].over
    assert len(run.prompts[0]) < 500
    assert run.answers[0] == []
    check(run.prompts[1], tiny_model(), asked[1])
    assert len(run.answers[1]) == 3


def test_a_scored_prompt_is_computed_afresh_and_then_cached_as_any_other() -> None:
    prompt = long_prompt(random.Random(9), 2 * BLOCK_SIZE + 5)
    engine = packed(num_slots=1)
    run = Run(engine, [request(prompt), of(prompt), request(prompt), of(prompt, max_tokens=0), request(prompt)])
    assert [row.num_cached_tokens for row in run.rows] == [0, 0, 2 * BLOCK_SIZE, 0, 2 * BLOCK_SIZE]
    assert run.answers[0] == run.answers[1] == run.answers[2] == run.answers[4]
    fresh = packed(num_slots=1)
    assert [row.num_cached_tokens for row in Run(fresh, [of(prompt, max_tokens=0), request(prompt)]).rows] == [
        0,
        2 * BLOCK_SIZE,
    ]


def test_a_row_that_gives_way_while_it_is_scored_tells_each_token_once() -> None:
    dice = random.Random(10)
    growing = [request(long_prompt(dice, BLOCK_SIZE - 10), max_tokens=100) for _ in range(2)]
    scored = [of(long_prompt(dice, 2 * BLOCK_SIZE), max_tokens=tokens) for tokens in (0, 3)]
    engine = packed(token_budget=5 * BLOCK_SIZE, prefill_chunk=8)
    run = Run(engine, growing + scored)
    assert run.rows[2].num_preemptions
    for row in run.rows[2:]:
        check(run.told[row], tiny_model(), row.request)
    assert run.answers == Run(packed(), growing + scored).answers


class Shortage(RuntimeError):
    def __init__(self) -> None:
        super().__init__("not enough memory")


@pytest.mark.parametrize("engine", ENGINES)
@given(fails_at=st.integers(1, 9), seed=st.integers(0, 100))
@settings(max_examples=8)
def test_a_batch_tried_again_tells_each_token_once(engine: str, fails_at: int, seed: int) -> None:
    dice = random.Random(seed)
    asked = [of(long_prompt(dice, dice.randint(1, 300)), 1, max_tokens=dice.choice([0, 1])) for _ in range(2)]
    made = ENGINES[engine]()
    rows = [loose_row(each) for each in asked]
    told: dict[Row, Told] = {row: [] for row in rows}
    calls = 0

    def report(row: Row, logprobs: Sequence[PromptLogprob | None], finish: Finish | None, running: int) -> None:
        nonlocal calls
        calls += 1
        told[row] += logprobs
        if calls == fails_at:
            raise Shortage

    left = rows
    while left:
        with contextlib.suppress(OutOfMemory):
            made.run(left, BatchSteps(lambda tokens, running: None, left, report_prompt=report))
        left = [row for row in left if not row.over and not row.num_output_tokens]
    for row in rows:
        check(told[row], tiny_model(), row.request)


# The entries themselves


@given(st.integers(1, 80), st.integers(0, 20), st.integers(0, 1000))
def test_an_entry_says_the_token_its_rank_and_the_likeliest(positions: int, top: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(positions, 40, generator=generator) * 3
    tokens = torch.randint(40, (positions,), generator=generator).tolist()
    exact = logits.double().log_softmax(-1)
    for place, entry in enumerate(prompt_logprobs(logits, tokens, top)):
        order = exact[place].argsort(descending=True).tolist()
        assert entry.token == tokens[place]
        assert order[entry.rank - 1] == entry.token
        assert [token for token, _ in entry.top] == order[:top]
        assert entry.logprob == pytest.approx(exact[place, entry.token].item(), abs=1e-5)
        assert all(value == entry.logprob for token, value in entry.top if token == entry.token), "to the last bit"


def test_there_are_no_more_likeliest_tokens_than_tokens() -> None:
    [entry] = prompt_logprobs(torch.zeros(1, 3), [2], 20)
    assert len(entry.top) == 3
    assert entry.rank == 1
