"""PaddedEngine on tiny random models, against what transformers' own `generate` does with each prompt alone."""

import asyncio
import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LogitsProcessorList,
    MinPLogitsWarper,
    Phi3Config,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from batching import padded as subject
from batching.batcher import Batcher, BatchingConfig
from batching.errors import ModelError, OutOfMemory
from batching.padded import PaddedEngine, pad
from batching.queue import QueueLimits
from batching.sampling import Filter
from batching.stream import Row
from batching.types import Finish, Request, Sampling
from batching.worker import BatchSteps, NewTokens
from tests.batching.conftest import Runner, all_tokens, loose_row, request, sampling
from tests.tiny import CONFIGS, SHAPE, tiny_model

CPU = torch.device("cpu")
WINDOW: int = SHAPE["max_position_embeddings"]
NO_IDS: Any = torch.zeros(1, 1, dtype=torch.int64)
KINDS = sorted(CONFIGS)


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def shared_engine(kind: str = "qwen3") -> tuple[PaddedEngine, PreTrainedModel]:
    """One engine for all tests that do not change it, and its model."""
    model = tiny_model(kind)
    return PaddedEngine(model, token_budget=4096), model


class Batch:
    """Runs requests together and keeps what each row sent. `after` is called after each step with its number."""

    def __init__(
        self,
        engine: PaddedEngine,
        requests: Sequence[Request],
        after: Callable[["Batch"], None] = lambda batch: None,
    ) -> None:
        self.rows = [loose_row(request) for request in requests]
        self.sent: dict[Row, list[int]] = {row: [] for row in self.rows}
        self.finishes: dict[Row, Finish] = {}
        self.running: list[int] = []
        self._after = after
        engine.run(self.rows, BatchSteps(self._report, self.rows))

    def _report(self, tokens: NewTokens, running: int) -> None:
        for row, token, finish, _ in tokens:
            assert row not in self.finishes, "a token of a row that is over"
            self.sent[row].append(token)
            if finish is not None:
                self.finishes[row] = finish
        self.running.append(running)
        self._after(self)

    @property
    def answers(self) -> list[list[int]]:
        return list(self.sent.values())


def answers(engine: PaddedEngine, *requests: Request) -> list[list[int]]:
    return Batch(engine, requests).answers


def generated(model: PreTrainedModel, prompt: Sequence[int], tokens: int, **settings: Any) -> list[int]:
    """What transformers itself makes of a prompt alone."""
    ids = torch.tensor([prompt])
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **settings
    )
    return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def some_prompt(dice: random.Random) -> tuple[int, ...]:
    return tuple(dice.randrange(SHAPE["vocab_size"]) for _ in range(dice.randint(1, 24)))


def some_request(dice: random.Random) -> Request:
    """Any prompt with any settings."""
    settings: dict[str, Any] = {"max_tokens": dice.randint(1, 12), "seed": dice.getrandbits(64) - 2**63}
    if dice.random() < 0.7:
        settings |= {"temperature": dice.choice([0.01, 0.7, 1.0, 2.0])}
        settings |= dice.choice([{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}, {"top_p": 0.5, "top_k": 300}])
    settings |= dice.choice([{}, {}, {"repetition_penalty": 1.3}, {"presence_penalty": 1.0, "frequency_penalty": 0.5}])
    if dice.random() < 0.3:
        settings["stop_token_ids"] = frozenset(dice.sample(range(SHAPE["vocab_size"]), 300))
    return request(some_prompt(dice), **settings)


# Every row is as it is alone


@pytest.mark.parametrize("kind", KINDS)
def test_a_greedy_row_in_any_batch_is_what_transformers_generates_alone(kind: str) -> None:
    engine, model = shared_engine(kind)
    dice = random.Random(1)
    for _ in range(6):
        greedy = [request(some_prompt(dice), max_tokens=dice.randint(1, 12)) for _ in range(dice.randint(1, 3))]
        batch = [*greedy, *(some_request(dice) for _ in range(dice.randint(0, 4)))]
        dice.shuffle(batch)
        together = answers(engine, *batch)
        for row in greedy:
            alone = generated(model, row.prompt, row.sampling.max_tokens)
            assert together[batch.index(row)] == alone


@pytest.mark.parametrize("kind", KINDS)
def test_any_row_is_the_same_alone_and_in_any_batch(kind: str) -> None:
    engine, _ = shared_engine(kind)
    dice = random.Random(2)
    requests = [some_request(dice) for _ in range(16)]
    alone = {request: answers(engine, request)[0] for request in requests}
    for _ in range(12):
        batch = dice.sample(requests, dice.randint(2, 7))
        assert answers(engine, *batch) == [alone[request] for request in batch]


def test_a_longer_row_does_not_change_how_the_positions_of_another_are_embedded() -> None:
    torch.manual_seed(0)
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    config = Phi3Config(**SHAPE, pad_token_id=0, original_max_position_embeddings=64, rope_parameters=rope)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    engine = PaddedEngine(model, token_budget=4096)
    lengths = [(5, 8), (90, 8), (3, 62), (58, 12), (70, 8), (50, 14)]  # some cross 64 tokens, and two padded ones would
    batch = [request(prompt, max_tokens=tokens) for prompt, tokens in lengths]
    assert answers(engine, *batch) == [answers(engine, row)[0] for row in batch]


def test_a_seed_decides_a_sampled_answer() -> None:
    engine, _ = shared_engine()
    seeded = [request((5, 6), max_tokens=12, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    first, again, other = answers(engine, *seeded)
    assert first == again != other


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("penalty", [0.8, 1.3])
def test_a_repetition_penalty_does_what_it_does_in_transformers(kind: str, penalty: float) -> None:
    engine, model = shared_engine(kind)
    dice = random.Random(3)
    prompts = [some_prompt(dice) for _ in range(3)]
    batch = [request(prompt, max_tokens=16, repetition_penalty=penalty) for prompt in prompts]
    together = answers(engine, *batch, some_request(dice))
    assert together[:3] == [generated(model, prompt, 16, repetition_penalty=penalty) for prompt in prompts]


@pytest.mark.parametrize("seed", range(20))
def test_limits_leave_the_tokens_that_transformers_leaves(seed: int) -> None:
    dice = random.Random(seed)
    temperature, top_k, top_p, min_p = (
        dice.uniform(0.3, 2.0),
        dice.randint(1, 150),
        dice.uniform(0.1, 0.99),
        dice.uniform(0.001, 0.3),
    )
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(seed)) * dice.choice([0.1, 2.0])
    cuts: list[tuple[Any, Sampling]] = [
        (TopKLogitsWarper(top_k), sampling(temperature=temperature, top_k=top_k)),
        (TopPLogitsWarper(top_p), sampling(temperature=temperature, top_p=top_p)),
        (MinPLogitsWarper(min_p), sampling(temperature=temperature, min_p=min_p)),
    ]
    everything = sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    chains = [([warper], row) for warper, row in cuts] + [([warper for warper, _ in cuts], everything)]
    for chain, row in chains:
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature), *chain])
        theirs = warpers(NO_IDS, logits.clone()).isfinite()
        ours = Filter([row], CPU)(logits) > 0
        assert torch.equal(ours, theirs)


def test_what_the_models_files_say_about_sampling_does_not_count() -> None:
    model = tiny_model()
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        top_p=0.1,
        repetition_penalty=3.0,
        no_repeat_ngram_size=1,
        num_beams=2,
        min_new_tokens=20,
        max_length=3,
        suppress_tokens=[1, 2, 3],
        eos_token_id=7,
    )
    dice = random.Random(4)
    batch = [some_request(dice) for _ in range(8)]
    assert answers(PaddedEngine(model, token_budget=4096), *batch) == answers(shared_engine()[0], *batch)


# When a row is over


def test_max_tokens_holds_for_each_row() -> None:
    engine, _ = shared_engine()
    batch = Batch(engine, [request(max_tokens=tokens) for tokens in (1, 5, 2, 9)])
    assert [len(answer) for answer in batch.answers] == [1, 5, 2, 9]
    assert set(batch.finishes.values()) == {Finish.LENGTH}
    assert batch.running == [3, 2, 2, 2, 1, 1, 1, 1, 0]


def test_a_stop_token_ends_only_its_own_row() -> None:
    engine, model = shared_engine()
    (answer,) = answers(engine, request(max_tokens=12))
    assert answer[3] not in answer[:3]
    stopping = request(max_tokens=12, stop_token_ids=frozenset({answer[3]}))
    batch = Batch(engine, [stopping, request(max_tokens=12)])
    assert batch.answers == [answer[:4], answer]
    assert list(batch.finishes.values()) == [Finish.STOP, Finish.LENGTH]
    assert answer == generated(model, stopping.prompt, 12)


def test_a_batch_ends_when_only_cancelled_rows_are_left() -> None:
    engine, _ = shared_engine()

    def leave(batch: Batch) -> None:
        batch.rows[1].cancelled = len(batch.running) >= 3

    batch = Batch(engine, [request(max_tokens=2), request(max_tokens=100)], leave)
    assert [len(answer) for answer in batch.answers] == [2, 3]
    assert batch.running == [2, 1, 1, 0]


def test_a_batch_is_one_call_of_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, model = shared_engine()
    calls: list[tuple[int, ...]] = []
    generate: Any = model.generate

    def counted(ids: torch.Tensor, **settings: Any) -> Any:
        calls.append(tuple(ids.shape))
        return generate(ids, **settings)

    monkeypatch.setattr(model, "generate", counted)
    dice = random.Random(5)
    batch = [some_request(dice) for _ in range(6)]
    answers(engine, *batch)
    assert calls == [(6, max(len(request.prompt) for request in batch))]


def test_a_row_may_fill_the_context_window() -> None:
    engine, model = shared_engine()
    prompt = tuple(range(WINDOW - 3))
    assert answers(engine, request(prompt, max_tokens=3)) == [generated(model, prompt, 3)]


# Memory


def raise_as_cuda_does(*args: Any, **settings: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def ask_for_too_much(*args: Any, **settings: Any) -> None:
    torch.empty(2**58)


@pytest.mark.parametrize("fault", [raise_as_cuda_does, ask_for_too_much])
def test_a_shortage_of_memory_is_told_and_lets_go_of_the_batch(
    fault: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model = shared_engine()
    monkeypatch.setattr(model, "forward", fault)
    with pytest.raises(OutOfMemory) as raised:
        answers(engine, request())
    # What the library raised would keep its frames, and they the tensors.
    assert raised.value.__context__ is None
    assert raised.value.__cause__ is None


def test_other_errors_of_the_device_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, model = shared_engine()

    def fault(*args: Any, **settings: Any) -> None:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(model, "forward", fault)
    with pytest.raises(RuntimeError, match="device-side"):
        answers(engine, request())


def test_the_budget_is_measured_when_none_is_given() -> None:
    info = PaddedEngine(tiny_model(), context_window=64).info
    assert info.token_budget >= 256
    assert info.context_window == 64


def test_a_device_without_room_for_a_batch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "free_bytes", lambda device: 2**16)
    with pytest.raises(ModelError, match="MiB are free"):
        PaddedEngine(tiny_model(), context_window=64)


def test_memory_is_what_the_process_holds() -> None:
    assert shared_engine()[0].memory() > 2**20


# What is told of the model


def test_the_model_is_described() -> None:
    engine, model = shared_engine()
    info = engine.info
    assert (info.device, info.dtype, info.vocab_size) == ("cpu", "float32", SHAPE["vocab_size"])
    assert info.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (info.context_window, info.token_budget) == (WINDOW, 4096)


@pytest.mark.parametrize(("wanted", "budget", "window"), [(None, 4096, WINDOW), (100, 4096, 100), (None, 300, 300)])
def test_the_context_window_is_the_least_of_the_limits(wanted: int | None, budget: int, window: int) -> None:
    assert PaddedEngine(tiny_model(), context_window=wanted, token_budget=budget).info.context_window == window


def test_a_window_larger_than_the_models_is_refused() -> None:
    with pytest.raises(ModelError, match=f"the context window of {WINDOW + 1} exceeds the model's {WINDOW}"):
        PaddedEngine(tiny_model(), context_window=WINDOW + 1, token_budget=4096)


@pytest.mark.parametrize(
    ("of_generation", "of_model", "stops"),
    [(None, None, set()), (7, 8, {7}), ([7, 9], 8, {7, 9}), (None, 8, {8}), (0, None, {0})],
)
def test_stop_tokens_come_from_the_models_files(
    of_generation: int | list[int] | None, of_model: int | None, stops: set[int]
) -> None:
    model = tiny_model()
    model.config.eos_token_id = of_model
    model.generation_config.eos_token_id = of_generation
    assert PaddedEngine(model, token_budget=4096).info.stop_token_ids == stops


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = pad([(5, 6, 7), (8,)], CPU)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert ids.dtype == mask.dtype == torch.int64


def test_a_long_prompt_and_a_long_answer_stay_within_the_positions_that_a_model_has(run_async: Runner) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=64, bos_token_id=0, eos_token_id=0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    engine = PaddedEngine(model, token_budget=4096)

    async def main() -> None:
        batcher = Batcher(lambda: engine, BatchingConfig(max_batch_rows=2, window=0.0, queue=QueueLimits(8)))
        await batcher.start()
        streams = [batcher.submit(request(50, max_tokens=8)), batcher.submit(request(5, max_tokens=50))]
        found = await asyncio.gather(*map(all_tokens, streams))
        assert [len(tokens) for tokens in found] == [8, 50]
        await batcher.drain(0.0)

    run_async(main)
