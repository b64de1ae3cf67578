"""The Triton kernels in Triton's interpreter, against their twins in torch; on a GPU, the compiled ones."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from batching.packed import attention, layer, reference
from batching.packed.attention import Chunk, TorchAttention
from batching.packed.kv_cache import KVAllocation
from batching.packed.runner import RunningSequence
from batching.sampling import Sampler
from batching.types import Request
from tests.batching.conftest import loose_row, request
from tests.tiny import tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

from batching.packed import triton_attention, triton_layer, triton_sampling  # noqa: E402
from batching.packed.cuda_graphs import PrefillInputs, prefill_logits  # noqa: E402
from batching.packed.cuda_runner import fill  # noqa: E402

VOCABULARY = 500

TOKEN, POSITION, NUM_OUTPUT_TOKENS, SEED, TOP_K, FLAGS = (
    column.value
    for column in (
        triton_sampling.TOKEN,
        triton_sampling.POSITION,
        triton_sampling.NUM_OUTPUT_TOKENS,
        triton_sampling.SEED,
        triton_sampling.TOP_K,
        triton_sampling.FLAGS,
    )
)
RANDOM, PENALISED, BIASED, GUIDED = (
    flag.value
    for flag in (triton_sampling.RANDOM, triton_sampling.PENALISED, triton_sampling.BIASED, triton_sampling.GUIDED)
)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [64, 96])
def test_norm(size: int) -> None:
    x, weight = noise(5, size), noise(size)
    assert_close(triton_layer.norm(x, weight, 1e-6), reference.norm(x, weight, 1e-6))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("size", "width"), [(24, 512), (13, 700), (33, 40)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_products(tokens: int, size: int, width: int, biased: bool) -> None:
    x, pair = noise(tokens, width), noise(2 * size, width) / 8
    bias = noise(2 * size) if biased else None
    assert_close(triton_layer.product(x, pair, bias), reference.product(x, pair, bias))
    assert_close(triton_layer.gated_product(x, pair, bias), reference.gated_product(x, pair, bias))
    totals = [torch.ones(tokens, 2 * size, device=DEVICE) for _ in range(2)]
    for ops, total in zip([triton_layer, reference], totals, strict=True):
        ops.add_product(total, x, pair, bias)
    assert_close(*totals)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("kv_heads", "group", "size"), [(2, 2, 16), (3, 3, 64), (1, 4, 80)])
def test_rotate_and_store(kv_heads: int, group: int, size: int, normed: bool) -> None:
    qkv, cos, sin = noise(5, kv_heads * (group + 2) * size), noise(5, size), noise(5, size)
    norms = (noise(size), noise(size), 1e-6) if normed else None
    kv_slots = torch.tensor([3, 4, 9, 18, 0], device=DEVICE)
    caches = [torch.zeros(kv_heads, 20, size, device=DEVICE) for _ in range(4)]
    found = triton_layer.rotate_and_store(qkv, cos, sin, norms, kv_slots, caches[0], caches[1])
    wanted = reference.rotate_and_store(qkv, cos, sin, norms, kv_slots, caches[2], caches[3])
    for mine, theirs in zip([found, *caches[:2]], [wanted, *caches[2:]], strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize(("group", "size"), [(3, 16), (1, 24)])
def test_prefill_attention_of_chunks_anywhere_in_the_kv_cache(group: int, size: int) -> None:
    kv_heads = 2
    k_cache, v_cache = noise(kv_heads, 500, size), noise(kv_heads, 500, size)
    v_cache[:, 480:] = float("nan")  # another row's, whose model went wrong
    chunks = [Chunk(5, 0, 64), Chunk(5, 64, 41), Chunk(400, 70, 10), Chunk(200, 0, 1)]
    cu_seqlens_q, kv_starts, seq_lens = (
        torch.tensor(numbers, dtype=torch.int32, device=DEVICE)
        for numbers in ([0, 64, 105, 115, 116, 116, 116], [5, 5, 400, 200, 0, 0], [64, 105, 80, 1, 0, 0])
    )
    q = noise(116, kv_heads * group, size)
    found = triton_attention.PrefillAttention(cu_seqlens_q, kv_starts, seq_lens)(q, k_cache, v_cache, size**-0.5)
    wanted = TorchAttention(chunks)(q, k_cache, v_cache, size**-0.5)
    torch.testing.assert_close(found, wanted, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("min_split", [10, 64, 1000])
def test_decode_attention_of_sequences_of_any_length_anywhere_in_the_kv_cache(min_split: int) -> None:
    kv_heads, group, size = 2, 3, 16
    k_cache, v_cache = noise(kv_heads, 700, size), noise(kv_heads, 700, size)
    kv_starts = torch.tensor([5, 300, 690, 40], dtype=torch.int32, device=DEVICE)
    seq_lens = torch.tensor([250, 321, 1, 65], dtype=torch.int32, device=DEVICE)
    q = noise(4, kv_heads * group, size)
    attend = triton_attention.DecodeAttention.of(kv_starts, seq_lens, kv_heads, group, size, min_split)
    for _ in range(2):  # it leaves its scratch memory as it found it
        found = attend(q, k_cache, v_cache, size**-0.5)
        for row, (start, length) in enumerate(zip(kv_starts.tolist(), seq_lens.tolist(), strict=True)):
            keys, values = k_cache[:, start : start + length], v_cache[:, start : start + length]
            wanted = scaled_dot_product_attention(q[row][None, :, None], keys[None], values[None], enable_gqa=True)
            torch.testing.assert_close(found[row], wanted[0, :, 0], rtol=5e-3, atol=5e-3)


class State:
    """The device's state of some requests, a sequence slot each, written as `SamplingState` does."""

    def __init__(self, requests: list[Request]) -> None:
        slots, columns = len(requests) + 1, triton_sampling.NUM_COLUMNS.value
        self.int_params = torch.zeros(slots, columns, dtype=torch.int64, device=DEVICE)
        self.float_params = torch.ones(slots, columns, device=DEVICE)
        self.counts = torch.zeros(slots, VOCABULARY, dtype=torch.int16, device=DEVICE)
        self.bias = torch.zeros(slots, VOCABULARY, device=DEVICE)
        self.bitmask = torch.zeros(slots, -(-VOCABULARY // 32), dtype=torch.int32, device=DEVICE)
        for slot, asked in enumerate(requests):
            self._write(slot, asked)

    def _write(self, slot: int, asked: Request) -> None:
        s = asked.sampling
        flags = RANDOM * (not s.greedy) | PENALISED * s.penalised | BIASED * bool(s.logit_bias)
        self.int_params[slot, [SEED, TOP_K, FLAGS]] = torch.tensor([s.seed, s.top_k, flags], device=DEVICE)
        penalties = [s.presence_penalty, s.frequency_penalty, s.repetition_penalty]
        self.float_params[slot, :6] = torch.tensor([s.temperature or 1.0, s.top_p, s.min_p, *penalties])
        self.counts[slot, list(asked.prompt)] = triton_sampling.IN_PROMPT.value
        for token, value in s.logit_bias:
            self.bias[slot, token] = value

    def sample(self, logits: Tensor, slots: list[int]) -> list[int]:
        out = torch.zeros(len(slots), dtype=torch.int64, device=DEVICE)
        at = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
        state = self.int_params, self.float_params, self.counts, self.bias, self.bitmask
        triton_sampling.sample(logits, at, *state, out, block=256)
        return out.tolist()


def some_sampling(dice: random.Random) -> dict[str, Any]:
    settings: dict[str, Any] = {"seed": dice.getrandbits(64) - 2**63, "temperature": dice.choice([0.0, 0.1, 1.0, 2.0])}
    cuts: list[dict[str, Any]] = [
        {},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_k": 20},
        {"min_p": 0.05},
        {"top_p": 0.8, "top_k": 20},
    ]
    settings |= dice.choice([*cuts, {"top_p": 0.8, "top_k": 20}, {"top_p": 0.95, "top_k": 200, "min_p": 0.01}])
    settings |= dice.choice([{}, {}, {}, {"top_p": 0.5, "top_k": 300}])  # more than the sampler's candidates
    settings |= dice.choice([{}, {"repetition_penalty": 1.3}, {"presence_penalty": 0.4, "frequency_penalty": 0.7}])
    biases: list[dict[str, Any]] = [{}, {"logit_bias": ((dice.randrange(VOCABULARY), 5.0), (3, -100.0))}]
    return settings | dice.choice(biases)


@pytest.mark.parametrize("seed", range(3))
def test_the_device_samples_what_the_sampler_does(seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(3):
        asked = [request(tuple(dice.choices(range(VOCABULARY), k=10)), **some_sampling(dice)) for _ in range(4)]
        state, sampler = State(asked), Sampler(asked, VOCABULARY, torch.device(DEVICE))
        for _ in range(2):
            logits = noise(4, VOCABULARY) * 3
            order = dice.sample(range(4), 4)
            found = state.sample(torch.cat([logits[order], logits[:1]]), [*order, 4])
            wanted = sampler(logits.clone()).tolist()
            assert found[:4] == [wanted[slot] for slot in order]


def test_a_lane_moves_on_with_each_token_and_the_one_without_a_row_does_not() -> None:
    state = State([request(presence_penalty=1.0)])
    logits = torch.zeros(2, VOCABULARY, device=DEVICE)
    logits[:, 7] = 1.0
    assert state.sample(logits, [0, 1]) == [7, 7]
    assert state.int_params[0, [TOKEN, POSITION, NUM_OUTPUT_TOKENS]].tolist() == [7, 1, 1]
    assert state.int_params[1].tolist() == [0] * triton_sampling.NUM_COLUMNS.value
    assert state.counts[0, 7].item() == 1
    assert state.sample(logits, [0, 1])[0] != 7, "penalised, it ties with all others"


def test_what_the_bitmask_rules_out_is_not_sampled() -> None:
    state = State([request(temperature=1.0, seed=seed) for seed in range(8)])
    state.int_params[:, FLAGS] |= GUIDED
    state.bitmask[:, 400 // 32] = 1 << (400 % 32) | 1 << (401 % 32)
    assert set(state.sample(noise(8, VOCABULARY), list(range(8)))) <= {400, 401}


def test_what_has_the_same_logit_stays_or_goes_together() -> None:
    settings: list[dict[str, Any]] = [{"top_k": 3}, {"top_k": 3, "top_p": 0.99}, {"top_p": 0.01}]
    state = State([request(temperature=1.0, seed=seed, **cut) for seed in range(16) for cut in settings])
    logits = torch.zeros(48, VOCABULARY, device=DEVICE)
    logits[:, 100:108] = 5.0
    sampled = state.sample(logits, list(range(48)))
    assert set(sampled) == set(range(100, 108))


def test_every_token_of_a_prefill_chunk_has_logits_if_they_are_wanted() -> None:
    wanted_model, model = tiny_model().to(DEVICE), tiny_model().to(DEVICE)  # type: ignore[arg-type]
    model.set_attn_implementation(attention.NAME)
    assert layer.fuse(model, triton_layer)
    prompt = tuple(random.Random(0).choices(range(500), k=71))
    kv_cache = torch.zeros(2, 2, 2, 150, 16, device=DEVICE)
    sequence = RunningSequence(loose_row(request(prompt)), 0, KVAllocation(50, 80, ""))
    found = []
    with torch.inference_mode():
        for size in (66, 1, 3):
            chunk = sequence.prefill_chunk(size)
            inputs = PrefillInputs(size, 1, "cpu")
            fill(inputs, [(sequence, chunk)], spare_kv_slot=149, spare_slot=1)
            found.append(prefill_logits(model, kv_cache, moved(inputs, size), torch.arange(size, device=DEVICE)))
            sequence.num_computed_tokens += size
        wanted = wanted_model(torch.tensor([prompt], device=DEVICE)).logits[0, :-1]
    torch.testing.assert_close(torch.cat(found), wanted, rtol=1e-2, atol=1e-2)


def moved(inputs: PrefillInputs, size: int) -> PrefillInputs:
    there = PrefillInputs(size, 1, DEVICE)
    there.all.copy_(inputs.all)
    return there
