"""The packed engine on the CPU, against stock `generate` row by row: packing, joining, leaving, prefix caching."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import cycle
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MistralConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from batching.checkpoint import locate
from batching.errors import ModelError, OutOfMemory
from batching.model import load
from batching.packed import layer, reference, scheduler
from batching.packed.attention import Chunk
from batching.packed.cpu_runner import CPURunner, ReadyOutput
from batching.packed.engine import PackedEngine, unsupported
from batching.packed.kv_cache import BLOCK_SIZE
from batching.packed.runner import RunningSequence, Sampled
from batching.padded import PaddedEngine
from batching.stream import Row
from batching.types import DEFAULT_ROWS, Request
from batching.worker import BatchSteps, NewTokens
from server.settings import Settings
from tests.batching.conftest import loose_row, request
from tests.batching.test_padded import KINDS, some_prompt, some_request
from tests.tiny import SHAPE, tiny_model

VOCABULARY: int = SHAPE["vocab_size"]


pytestmark = pytest.mark.usefixtures("one_thread")


class Run:
    """Runs requests on an engine, `first` of them at once; `joining` says how many more join at each step."""

    def __init__(
        self,
        engine: PackedEngine | PaddedEngine,
        requests: Sequence[Request],
        first: int | None = None,
        joining: Callable[[], int] = lambda: 1,
        after: Callable[["Run"], None] = lambda run: None,
    ) -> None:
        self.rows = [loose_row(request) for request in requests]
        self.sent: dict[Row, list[int]] = {row: [] for row in self.rows}
        self.logprobs: dict[Row, list[Any]] = {row: [] for row in self.rows}
        self.finished: list[Row] = []
        self.running: list[int] = []
        self._later = self.rows[first:] if first else []
        self._joining = joining
        self._after = after
        waiting = self.rows[:first]
        while waiting:
            engine.run(waiting, BatchSteps(self._report, waiting, self._join))
            waiting = [self._later.pop(0)] if self._later else []

    def _join(self) -> list[Row]:
        return [self._later.pop(0) for _ in range(min(self._joining(), len(self._later)))]

    def _report(self, tokens: NewTokens, running: int) -> None:
        for row, token, _, logprob in tokens:
            self.sent[row].append(token)
            self.logprobs[row] += [logprob] if logprob else []
            self.finished += [row] if row.over else []
        self.running.append(running)
        self._after(self)

    @property
    def answers(self) -> list[list[int]]:
        return list(self.sent.values())


@cache
def stock(kind: str) -> PaddedEngine:
    return PaddedEngine(tiny_model(kind), token_budget=4096)


@cache
def answered_alone(kind: str, request: Request) -> tuple[int, ...]:
    return tuple(Run(stock(kind), [request]).answers[0])


def alone(kind: str, requests: Sequence[Request]) -> list[list[int]]:
    """What stock `generate` answers to each by itself."""
    return [list(answered_alone(kind, request)) for request in requests]


def long_requests(dice: random.Random, count: int) -> list[Request]:
    """Greedy ones whose prompts share, by twos and threes, a prefix longer than a block."""
    prefixes = [tuple(dice.choices(range(VOCABULARY), k=2 * BLOCK_SIZE + 3)) for _ in range(2)]
    return [request((*dice.choice(prefixes), *some_prompt(dice)), max_tokens=dice.randint(1, 12)) for _ in range(count)]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_as_it_is_alone(kind: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused:
        monkeypatch.setattr(layer, "FUSABLE", frozenset())
    engine = PackedEngine(tiny_model(kind), num_slots=4, token_budget=500, prefill_chunk=32)
    engine.runner.works_beside_host = fused  # with tokens read a pass behind, as on a GPU, and without
    dice = random.Random(7)
    for _ in range(2 if fused else 1):
        mixed = [some_request(dice) for _ in range(6)] + long_requests(dice, 5)
        dice.shuffle(mixed)
        run = Run(engine, mixed, first=3, joining=lambda: dice.randint(0, 2))
        assert run.answers == alone(kind, mixed)
    assert any(row.num_cached_tokens for row in run.rows)


@pytest.fixture
def mlp_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each of the layers' MLPs is called with."""
    tokens: list[int] = []
    gated_product = reference.gated_product

    def noting(x: Tensor, pair: Tensor, bias: Tensor | None) -> Tensor:
        tokens.append(len(x))
        return gated_product(x, pair, bias)

    monkeypatch.setattr(reference, "gated_product", noting)
    return tokens


def test_of_a_prompt_the_last_layer_computes_only_the_token_that_is_sampled_from(mlp_tokens: list[int]) -> None:
    engine = PackedEngine(tiny_model(), prefill_chunk=8)
    mlp_tokens.clear()  # of those that measured steps
    Run(engine, [request(tuple(range(20)), max_tokens=1)])
    assert mlp_tokens == [8, 0, 8, 0, 4, 1]  # by layers, for each of three chunks


def test_the_mlp_takes_a_long_pass_in_parts(mlp_tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "MLP_TOKENS", 8)
    engine, prompt = PackedEngine(tiny_model()), request(tuple(range(20)), max_tokens=2)
    mlp_tokens.clear()
    assert Run(engine, [prompt]).answers == alone("qwen3", [prompt])
    assert mlp_tokens[:4] == [8, 8, 4, 1]


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_of_a_long_prompt_no_more_than_two_passes_are_launched_ahead(
    batch_invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that comes meanwhile waits for those, a cancelled one leaves after them."""
    engine = PackedEngine(tiny_model(), num_slots=4, prefill_chunk=16, batch_invariant=batch_invariant)
    engine.runner.works_beside_host = True
    ahead: list[int] = []
    launched = read = 0
    forward, read_output = CPURunner.forward, ReadyOutput.read

    def counting_forward(*arguments: Any) -> None:
        nonlocal launched
        launched += 1
        ahead.append(launched - read)
        forward(*arguments)

    def counting_read(output: ReadyOutput) -> Sampled:
        nonlocal read
        read += 1
        return read_output(output)

    monkeypatch.setattr(CPURunner, "forward", counting_forward)
    monkeypatch.setattr(ReadyOutput, "read", counting_read)
    asked = [request(tuple(range(160)), max_tokens=3)]
    assert Run(engine, asked).answers == alone("qwen3", asked)
    assert launched == read > 10
    assert max(ahead) == 2


@cache
def memory_for_few() -> PackedEngine:
    """Six blocks of 64 tokens for up to eight rows, so that rows give way all the time."""
    engine = PackedEngine(tiny_model(), num_slots=8, token_budget=6 * BLOCK_SIZE, prefill_chunk=32)
    engine.runner.works_beside_host = True  # tokens are read a pass behind, as on a GPU
    return engine


def what_it_is_alone(asked: Request) -> list[int]:
    [answer] = alone("qwen3", [asked])
    return answer


@cache
def growing_requests() -> list[Request]:
    """Whose prompts share up to two blocks, and whose answers need one or two more."""
    dice = random.Random(9)
    stems = [tuple(dice.choices(range(VOCABULARY), k=length)) for length in (0, 60, 2 * BLOCK_SIZE + 3)]
    asked = [some_request(dice) for _ in range(9)]
    return [
        replace(
            each,
            prompt=(*stem, *each.prompt),
            sampling=replace(each.sampling, max_tokens=dice.randint(1, 90), stop_token_ids=frozenset()),
        )
        for stem, each in zip(stems * 3, asked, strict=True)
    ]


class Mix(NamedTuple):
    """Rows by number, how many are there at first and join at each step, and which leave after how many tokens."""

    rows: list[int]
    first: int
    joining: list[int]
    leaving: dict[int, int]


mixes = st.builds(
    Mix,
    st.lists(st.integers(0, 8), min_size=2, max_size=10),
    st.integers(1, 8),
    st.lists(st.integers(0, 3), min_size=1, max_size=5),
    st.dictionaries(st.integers(0, 9), st.integers(1, 60), max_size=3),
)


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(mixes)
@example(Mix([2, 5, 8, 1, 4, 7, 2], 7, [1], {}))
def test_in_any_mix_of_joining_leaving_and_giving_way_every_row_is_as_it_is_alone(mix: Mix) -> None:
    engine, asked = memory_for_few(), [growing_requests()[number] for number in mix.rows]
    joining = cycle(mix.joining)

    def leave(run: Run) -> None:
        for number, after in mix.leaving.items():
            if number < len(run.rows) and len(run.sent[run.rows[number]]) >= after:
                run.rows[number].cancelled = True

    run = Run(engine, asked, first=mix.first, joining=lambda: next(joining), after=leave)
    for number, (row, sent) in enumerate(zip(run.rows, run.answers, strict=True)):
        wanted = what_it_is_alone(row.request)
        assert sent == wanted[: len(sent)]
        assert number in mix.leaving or len(sent) == len(wanted)
        assert row.over
    assert engine.pool.num_free == engine.pool.num_blocks, "nobody holds a block any more"


def test_rows_give_way_when_blocks_run_out_and_the_oldest_does_not() -> None:
    engine = PackedEngine(tiny_model(), num_slots=8, token_budget=6 * BLOCK_SIZE)
    asked = [request((number, 2, 3), max_tokens=150) for number in range(5)]
    run = Run(engine, asked)
    assert run.answers == alone("qwen3", asked)
    assert sum(row.num_preemptions for row in run.rows) > 0
    assert run.rows[0].num_preemptions == 0


@pytest.mark.parametrize("works_beside_host", [False, True])
def test_a_row_whose_answer_must_not_depend_on_others_never_gives_way(works_beside_host: bool) -> None:
    engine = PackedEngine(tiny_model(), num_slots=8, token_budget=6 * BLOCK_SIZE, batch_invariant=True)
    engine.runner.works_beside_host = works_beside_host
    asked = [*growing_requests(), *(request((number, 2, 3), max_tokens=150) for number in range(5))]
    run = Run(engine, asked, first=4)
    assert run.answers == [what_it_is_alone(each) for each in asked]
    assert not any(row.num_preemptions for row in run.rows)


def test_an_answer_that_must_not_depend_on_others_is_the_same_to_the_last_bit() -> None:
    engine = PackedEngine(tiny_model(hidden_size=256), num_slots=8, token_budget=2000, batch_invariant=True)
    dice = random.Random(4)
    asked = [replace(r, sampling=replace(r.sampling, top_logprobs=2)) for r in map(some_request, [dice] * 8)]
    together = Run(engine, asked, first=3)
    assert list(together.logprobs.values()) == [next(iter(Run(engine, [r]).logprobs.values())) for r in asked]


def test_rows_that_leave_do_not_change_those_that_stay() -> None:
    engine = PackedEngine(tiny_model(), num_slots=4, token_budget=500, prefill_chunk=32)
    dice = random.Random(3)
    mixed = [some_request(dice) for _ in range(8)] + long_requests(dice, 4)
    leaving = set(dice.sample(range(len(mixed)), 5))

    def leave(run: Run) -> None:
        for number in leaving:
            if len(run.sent[run.rows[number]]) == number % 4:
                run.rows[number].cancelled = True

    run = Run(engine, mixed, first=5, after=leave)
    for number, (sent, wanted) in enumerate(zip(run.answers, alone("qwen3", mixed), strict=True)):
        assert sent == wanted[: len(sent)]
        assert number in leaving or sent == wanted
    assert all(row.over for row in run.rows)


def test_rows_that_left_do_not_count_as_running() -> None:
    engine = PackedEngine(tiny_model(), num_slots=3, token_budget=500, max_draft_tokens=0)

    def leave(run: Run) -> None:
        run.rows[0].cancelled = len(run.running) >= 2

    run = Run(engine, [request((number,), max_tokens=4) for number in range(3)], after=leave)
    assert run.running == [3, 3, 2, 0]


def test_log_probabilities_go_with_their_tokens() -> None:
    dice = random.Random(5)
    asked = [some_request(dice) for _ in range(6)]
    asked = [replace(r, sampling=replace(r.sampling, top_logprobs=2)) for r in asked]
    run = Run(PackedEngine(tiny_model(), num_slots=3, token_budget=500), asked, first=2)
    stock = PaddedEngine(tiny_model(), token_budget=4096)
    for row in run.rows:
        mine = run.logprobs[row]
        wanted = next(iter(Run(stock, [row.request]).logprobs.values()))
        assert [noted.token for noted in mine] == [noted.token for noted in wanted] == run.sent[row]
        assert [noted.logprob for noted in mine] == pytest.approx([noted.logprob for noted in wanted], abs=1e-4)


def test_a_row_that_has_no_room_waits_until_it_has() -> None:
    engine = PackedEngine(tiny_model(), num_slots=8, token_budget=300)
    asked = [request((1, 2, 3), max_tokens=200) for _ in range(3)]
    run = Run(engine, asked)
    assert [len(answer) for answer in run.answers] == [200, 200, 200]


def test_a_batch_is_one_call_of_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    engine = PackedEngine(model, num_slots=2, token_budget=500)
    calls: list[object] = []
    generate: Any = model.generate

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(named["custom_generate"])
        return generate(*arguments, **named)

    monkeypatch.setattr(model, "generate", counted)
    Run(engine, [request((number, 2)) for number in range(5)], first=1)
    assert len(calls) == 1


def test_many_rows_take_fewer_passes_than_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = PackedEngine(tiny_model(), num_slots=8, token_budget=2000, max_draft_tokens=0)
    passes: list[int] = []
    forward = engine.runner.forward

    def counted(decoding: Sequence[RunningSequence], chunks: Any, num_draft_tokens: int) -> None:
        passes.append(len(decoding) + len(chunks))
        forward(decoding, chunks, num_draft_tokens)

    monkeypatch.setattr(engine.runner, "forward", counted)
    Run(engine, [request((number, 2), max_tokens=10) for number in range(8)])
    assert passes == [8] * 10


def test_a_window_that_yarn_stretches_can_be_filled() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10_000.0}

    def model() -> PreTrainedModel:
        torch.manual_seed(0)
        return Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16, rope_parameters=rope))

    engines = PackedEngine(model(), num_slots=2), PaddedEngine(model(), token_budget=1024)
    assert [engine.info.context_window for engine in engines] == [256, 256]
    asked = request(240, max_tokens=16)
    packed, padded = (Run(engine, [asked]).answers for engine in engines)
    assert packed == padded
    assert len(packed[0]) == 16


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """How many rows decoded in each pass, and how many tokens of prompts it had."""
    noted: list[tuple[int, int]] = []
    forward = CPURunner.forward

    def noting(
        runner: CPURunner,
        decoding: Sequence[RunningSequence],
        chunks: Sequence[tuple[RunningSequence, Chunk]],
        num_draft_tokens: int,
    ) -> None:
        noted.append((len(decoding), sum(chunk.num_tokens for _, chunk in chunks)))
        forward(runner, decoding, chunks, num_draft_tokens)

    monkeypatch.setattr(CPURunner, "forward", noting)
    return noted


@pytest.mark.parametrize("prompt", [5, 32, 33, 100])
def test_a_prompt_is_computed_in_chunks_while_other_rows_go_on(prompt: int, passes: list[tuple[int, int]]) -> None:
    engine = PackedEngine(tiny_model(), num_slots=3, token_budget=500, prefill_chunk=32)
    running = request((1,), max_tokens=60)
    late = request(tuple(range(prompt)), max_tokens=1)
    Run(engine, [running, running, late], first=2, joining=lambda: int(len(passes) == 6))
    mixed = [tokens for decoding, tokens in passes[1:] if tokens]
    assert sum(mixed) == prompt
    assert len(mixed) == -(-prompt // (32 - 2))
    assert all(decoding == 2 for decoding, _ in passes[1:7])
    assert all(decoding + tokens <= 32 for decoding, tokens in passes[1:])


@pytest.mark.parametrize(("burst", "tokens"), [(2, 16), (3, 30)])
def test_passes_are_larger_while_more_than_half_as_many_rows_wait_as_decode(
    burst: int, tokens: int, monkeypatch: pytest.MonkeyPatch, passes: list[tuple[int, int]]
) -> None:
    engine = PackedEngine(tiny_model(), num_slots=8, token_budget=1000, prefill_chunk=8, prefix_caching=False)
    monkeypatch.setattr(engine, "_max_prefill_tokens", 64)
    running = [request((n,), max_tokens=60) for n in range(4)]
    late = [request((n, *range(79)), max_tokens=1) for n in range(burst)]
    Run(engine, [*running, *late], first=4, joining=lambda: burst if len(passes) == 6 else 0)
    decoding, prompts = passes[6]
    assert (decoding, decoding + prompts) == (4, tokens)


def padding_engine(monkeypatch: pytest.MonkeyPatch, **limits: Any) -> PackedEngine:
    monkeypatch.setattr(CPURunner, "mixed_sizes", (8, 16, 32, 48, 64))
    monkeypatch.setattr(scheduler, "PASS_TOKENS", 4)
    return PackedEngine(tiny_model(), **limits)


@pytest.mark.parametrize(
    ("prompt", "chunks"), [(16, [16]), (26, [26]), (37, [32, 5]), (45, [45]), (50, [48, 2]), (130, [64, 64, 2])]
)
def test_a_pass_is_smaller_where_two_are_less_work_than_its_padding(
    prompt: int, chunks: list[int], monkeypatch: pytest.MonkeyPatch, passes: list[tuple[int, int]]
) -> None:
    engine = padding_engine(monkeypatch, prefill_chunk=64)
    asked = [request(tuple(range(prompt)), max_tokens=2)]
    assert Run(engine, asked).answers == alone("qwen3", asked)
    assert [tokens for _, tokens in passes if tokens] == chunks


def test_all_that_a_pass_is_padded_to_is_used(monkeypatch: pytest.MonkeyPatch, passes: list[tuple[int, int]]) -> None:
    engine = padding_engine(monkeypatch, prefill_chunk=32)
    monkeypatch.setattr(engine, "_prefill_chunk", 12)
    running, late = request((1,), max_tokens=60), request(tuple(range(40)), max_tokens=1)
    Run(engine, [running, running, late], first=2, joining=lambda: int(len(passes) == 6))
    assert [tokens for _, tokens in passes[1:] if tokens] == [14, 14, 12]


class Broken(RuntimeError):
    """What a test makes a pass raise."""


@pytest.mark.parametrize(("error", "raised"), [(Broken(), Broken), (RuntimeError("not enough memory"), OutOfMemory)])
def test_after_a_failed_batch_the_next_one_is_served(
    error: RuntimeError, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = PackedEngine(tiny_model(), num_slots=2, token_budget=500)
    asked = long_requests(random.Random(1), 3)
    wanted = alone("qwen3", asked)
    forward, count = engine.runner.forward, [0]

    def failing(decoding: Any, chunks: Any, num_draft_tokens: int) -> None:
        count[0] += 1
        if count[0] == 3:
            raise error
        forward(decoding, chunks, num_draft_tokens)

    monkeypatch.setattr(engine.runner, "forward", failing)
    with pytest.raises(raised):
        Run(engine, [replace(r, sampling=replace(r.sampling, max_tokens=9)) for r in asked])
    assert Run(engine, asked).answers == wanted


@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize("method", ["add_sequence", "forward", "prompt_logits", "sample", "accept_tokens"])
def test_wherever_a_batch_fails_the_runner_keeps_none_of_its_rows(
    method: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = PackedEngine(tiny_model(), num_slots=4, token_budget=500, prefill_chunk=32)
    asked = [replace(r, sampling=replace(r.sampling, prompt_logprobs=0)) for r in long_requests(random.Random(1), 3)]
    kept: set[RunningSequence] = set()
    runner: Any = engine.runner
    add, remove, failing, count = runner.add_sequence, runner.remove_sequence, getattr(runner, method), [0]

    def fails(*arguments: Any) -> Any:
        count[0] += 1
        if count[0] == call:
            raise Broken
        return failing(*arguments)

    def added(sequence: RunningSequence) -> None:
        kept.add(sequence)
        (fails if method == "add_sequence" else add)(sequence)

    def removed(sequence: RunningSequence) -> None:
        kept.discard(sequence)
        remove(sequence)

    monkeypatch.setattr(runner, method, fails)
    monkeypatch.setattr(runner, "add_sequence", added)
    monkeypatch.setattr(runner, "remove_sequence", removed)
    with pytest.raises(Broken):
        Run(engine, asked)
    assert not kept
    assert engine.pool.num_free == engine.pool.num_blocks
    assert Run(engine, asked).answers == alone("qwen3", asked)


def test_what_a_row_computed_itself_before_it_gave_way_is_not_counted_as_cached() -> None:
    engine = PackedEngine(tiny_model(), num_slots=2, token_budget=6 * BLOCK_SIZE, prefill_chunk=16)
    # The second has all that is left when the first needs another block.
    asked = [request(BLOCK_SIZE - 10, max_tokens=20), request((7, *range(5 * BLOCK_SIZE - 11)), max_tokens=10)]
    run = Run(engine, asked)
    assert [row.num_preemptions for row in run.rows] == [0, 1]
    assert [row.num_cached_tokens for row in run.rows] == [0, 0]


def test_a_prefix_is_reused_only_within_its_salt() -> None:
    engine = PackedEngine(tiny_model(), num_slots=1, token_budget=1000)
    prompt = tuple(range(2 * BLOCK_SIZE + 5))
    asked = [replace(request(prompt), salt=salt) for salt in ("a", "b", "a")]
    assert [row.num_cached_tokens for row in Run(engine, asked).rows] == [0, 0, 2 * BLOCK_SIZE]


@pytest.mark.parametrize("off", [{"prefix_caching": False}, {"batch_invariant": True}])
def test_nothing_is_reused_where_that_is_off(off: dict[str, bool]) -> None:
    engine = PackedEngine(tiny_model(), num_slots=1, token_budget=1000, **off)
    asked = [request(tuple(range(2 * BLOCK_SIZE + 5))) for _ in range(2)]
    assert [row.num_cached_tokens for row in Run(engine, asked).rows] == [0, 0]


def windowed() -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, sliding_window=16))
    return model


def stretched() -> PreTrainedModel:
    model = tiny_model()
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    return model


@pytest.mark.parametrize(
    ("model", "reason"), [(windowed, "attends to everything"), (stretched, "how long"), (tiny_model, None)]
)
def test_it_says_why_it_cannot_run_a_model(model: Callable[[], PreTrainedModel], reason: str | None) -> None:
    found = unsupported(model())
    assert (found is None) == (reason is None)
    assert (reason or "") in (found or "")


def test_it_runs_as_many_rows_as_asked_for_or_as_suit_the_device() -> None:
    assert PackedEngine(tiny_model(), num_slots=3, token_budget=500).info.max_rows == 3
    assert PackedEngine(tiny_model(), token_budget=500).info.max_rows == DEFAULT_ROWS


@pytest.mark.parametrize("limits", [{}, {"num_slots": 1, "context_window": 16}])
def test_there_must_be_room_for_a_kv_cache(limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batching.packed.engine.free_bytes", lambda device: 1000)
    with pytest.raises(ModelError, match="too few for a batch"):
        PackedEngine(tiny_model(), **limits)


@pytest.mark.parametrize(
    "limits", [{"num_slots": 1, "context_window": 16}, {"num_slots": 2, "context_window": 64}, {"token_budget": 16}]
)
def test_a_window_or_budget_may_be_as_small_as_it_likes(limits: dict[str, Any]) -> None:
    engine = PackedEngine(tiny_model(), **limits)
    asked = [request((number, 2, 3), max_tokens=engine.info.context_window - 3) for number in range(3)]
    assert Run(engine, asked).answers == alone("qwen3", asked)


@pytest.mark.model
def test_the_demo_models_answers_are_those_of_stock_generate() -> None:
    folder = locate(None, "auto", Settings.model_fields["cache_dir"].default)
    packed, stock = (load(folder, device="cpu", dtype="float32", load_format="auto") for _ in range(2))
    dice = random.Random(11)
    asked = [request(tuple(dice.choices(range(20, 40_000), k=dice.randint(3, 40))), max_tokens=6) for _ in range(4)]
    run = Run(PackedEngine(packed, num_slots=3, token_budget=400, prefill_chunk=16), asked, first=2)
    engine = PaddedEngine(stock, token_budget=4096)
    assert run.answers == [Run(engine, [each]).answers[0] for each in asked]


def test_clients_take_turns_at_prefill() -> None:
    many = [replace(request((n, 5, 6), max_tokens=1), client="many") for n in range(1, 6)]
    other, third = (replace(request((n, 5, 6), max_tokens=1), client=f"{n}") for n in (7, 8))
    engine = PackedEngine(tiny_model(), num_slots=1, prefill_chunk=16, prefix_caching=False)
    ended: list[int] = []
    run = Run(
        engine,
        [*many, other, third, replace(other, prompt=(9, 5, 6))],
        first=5,
        joining=lambda: 3 if len(ended) == 2 else 0,
        after=lambda run: ended.append(0),
    )
    order = [next(iter(row.request.prompt)) for row in sorted(run.rows, key=lambda row: run.finished.index(row))]
    assert order == [1, 2, 3, 7, 8, 4, 9, 5]
