"""The Triton kernels in Triton's interpreter, against their twins in torch; on a GPU, the compiled ones."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from batching import fp8
from batching.packed import reference
from batching.packed.attention import Chunk, TorchAttention
from batching.packed.kv_cache import BLOCK_SIZE
from batching.packed.speculation import History, num_matching
from batching.sampling import Sampler
from batching.types import Request
from tests.batching.conftest import request

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

from triton.runtime import interpreter  # noqa: E402

from batching.packed import triton_attention, triton_fp8, triton_layer, triton_sampling  # noqa: E402
from tests.batching.packed.interpreter import PreparedOnce  # noqa: E402

VOCABULARY = 500

TOKEN, POSITION, NUM_OUTPUT_TOKENS, SEED, TOP_K, FLAGS, MAX_TOKENS, LENGTH, NUM_DRAFTED = (
    column.value
    for column in (
        triton_sampling.TOKEN,
        triton_sampling.POSITION,
        triton_sampling.NUM_OUTPUT_TOKENS,
        triton_sampling.SEED,
        triton_sampling.TOP_K,
        triton_sampling.FLAGS,
        triton_sampling.MAX_TOKENS,
        triton_sampling.LENGTH,
        triton_sampling.NUM_DRAFTED,
    )
)
RANDOM, PENALISED, BIASED, GUIDED, SPECULATIVE = (
    flag.value
    for flag in (
        triton_sampling.RANDOM,
        triton_sampling.PENALISED,
        triton_sampling.BIASED,
        triton_sampling.GUIDED,
        triton_sampling.SPECULATIVE,
    )
)
RATE = triton_sampling.RATE.value
NUM_DRAFTS, MAX_HISTORY = 3, 60


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(interpreter, "_patch_lang"):  # Triton's own business: a later one may do without
        monkeypatch.setattr(interpreter, "_patch_lang", PreparedOnce())


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
@pytest.mark.parametrize(("size", "width", "few"), [(24, 1024, 4096), (24, 512, 0), (13, 700, 0), (33, 40, 4096)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_products(tokens: int, size: int, width: int, few: int, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_layer, "FEW_OUTPUTS", few)
    x, pair = noise(tokens, width), noise(2 * size, width) / 8
    bias = noise(2 * size) if biased else None
    assert_close(triton_layer.product(x, pair, bias), reference.product(x, pair, bias))
    assert_close(triton_layer.gated_product(x, pair, bias), reference.gated_product(x, pair, bias))
    totals = [torch.ones(tokens, 2 * size, device=DEVICE) for _ in range(2)]
    for ops, total in zip([triton_layer, reference], totals, strict=True):
        ops.add_product(total, x, pair, bias)
    assert_close(*totals)


on_hopper = DEVICE == "cpu" or torch.cuda.get_device_capability()[0] == triton_layer.HOPPER


@pytest.mark.skipif(not on_hopper, reason="needs Hopper's bulk copies")
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("tokens", "size", "width"), [(2, 72, 136), (16, 64, 512), (33, 136, 264), (64, 200, 1024)])
def test_products_of_few_tokens(
    tokens: int, size: int, width: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_layer, "FEW_OUTPUTS", 128)  # the last two are not split
    monkeypatch.setattr(triton_layer, "capability", lambda device: triton_layer.HOPPER)
    monkeypatch.setattr(triton_layer, "overlap", lambda device: {"OVERLAP": False})
    x, weight = noise(tokens, width).to(torch.float16), (noise(size, width) / 8).to(torch.float16)
    bias = noise(size).to(torch.float16) if biased else None
    assert triton_layer.reads_tiles(x, weight)
    found, wanted = (ops.product(x, weight, bias) for ops in (triton_layer, reference))
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    totals = [torch.ones(tokens, size, device=DEVICE, dtype=torch.float16) for _ in range(2)]
    for ops, total in zip([triton_layer, reference], totals, strict=True):
        ops.add_product(total, x, weight, bias)
    torch.testing.assert_close(*totals, rtol=2e-2, atol=2e-2)


needs_fp8 = pytest.mark.skipif(DEVICE == "cuda" and not fp8.usable(torch.device("cuda")), reason="needs FP8 units")


def fp8_inputs(tokens: int, size: int) -> Tensor:
    """Random numbers; for the interpreter, which rounds some to half of what they are, only numbers of that format."""
    if DEVICE == "cuda":
        return noise(tokens, size)
    x = torch.randint(-15, 16, (tokens, size)).float()
    x[:, ::128] = reference.LARGEST
    return x


@needs_fp8
def test_inputs_are_rounded_to_fp8() -> None:
    x = fp8_inputs(5, 384)
    x[1, 128:256] = 0
    assert_rounded(triton_fp8.rounded_inputs(x), x)


@needs_fp8
def test_what_a_product_takes_is_rounded_where_it_is_computed() -> None:
    x, weight, pair = noise(5, 384), noise(384), noise(5, 768)
    assert_rounded(triton_fp8.rounded_norm(x, weight, 1e-6), reference.norm(x, weight, 1e-6))
    assert_rounded(triton_fp8.rounded_silu_product(pair), reference.silu_product(pair))


def assert_rounded(found: triton_fp8.Rounded, x: Tensor) -> None:
    values, scales = reference.rounded_inputs(x)
    torch.testing.assert_close(found.scales[: len(x)], scales, rtol=1e-5, atol=0)
    # Numbers between two of the format may fall to either, by the last bit of what they are computed from.
    odd = found.values[: len(x)].float() != values.float()
    assert int(odd.sum()) <= (2 if DEVICE == "cuda" else odd.numel() // 20)


@needs_fp8
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "biased"),
    [
        *((1, 72, 256, True), (3, 256, 1280, False)),  # in splits
        *((2, 136, 128, False), (3, 136, 256, True)),  # too many outputs for that
        *((66, 72, 256, True), (66, 72, 128, False)),
        *((130, 200, 256, False), (133, 256, 512, True), (133, 256, 512, False)),
    ],
)
def test_products_in_fp8(tokens: int, outputs: int, inputs: int, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if outputs == 136:
        monkeypatch.setattr(triton_fp8, "FEW_OUTPUTS", 128)
    plain = torch.nn.Linear(inputs, outputs, bias=biased, device=DEVICE).requires_grad_(False)
    layer, x = fp8.FP8Linear.rounded(plain), fp8_inputs(tokens, inputs)
    args = layer.weight, layer.scales, layer.bias
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    close = 2e-2 if DEVICE == "cuda" else 1e-4
    x = x.to(dtype)
    wanted = reference.fp8_product(x, *args)
    torch.testing.assert_close(triton_fp8.fp8_product(x, *args), wanted, rtol=close, atol=close)
    totals = [torch.ones(tokens, outputs, device=DEVICE, dtype=dtype) for _ in range(2)]
    triton_fp8.fp8_product(triton_fp8.rounded_inputs(x), *args, totals[0])
    reference.fp8_product(x, *args, totals[1])
    torch.testing.assert_close(*totals, rtol=close, atol=close)


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


@pytest.mark.parametrize(  # two programs for each head, or one for each block
    ("group", "size", "partial_blocks"), [(3, 16, 1), (1, 24, 8)]
)
def test_prefill_attention_of_chunks_anywhere_in_the_kv_cache(
    group: int, size: int, partial_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv_heads = 2
    k_cache, v_cache = noise(kv_heads, 384, size), noise(kv_heads, 384, size)
    v_cache[:, 2 * BLOCK_SIZE : 3 * BLOCK_SIZE] = float("nan")  # another row's, whose model went wrong
    tables = [[5, 1, 0], [0, 3, 0], [4, 0, 0]]
    chunks = [Chunk(tables[0], 0, 64), Chunk(tables[0], 64, 41), Chunk(tables[1], 70, 10), Chunk(tables[2], 0, 1)]
    unused = [-1] * 4
    columns = [[105, 67, 41, 0], [80, 108, 10, 1], [64, 3, 64, 0], [1, 118, 1, 2], unused, unused]
    num_blocks, blocks = (torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in ([4], columns))
    q = noise(119, kv_heads * group, size)
    monkeypatch.setattr(triton_attention, "PARTIAL_BLOCKS", partial_blocks)
    attend = triton_attention.PrefillAttention(num_blocks, blocks, torch.tensor(tables, device=DEVICE))
    out = torch.ones_like(q)
    attend(q, k_cache, v_cache, size**-0.5, out)
    wanted = TorchAttention(chunks)(q[3:], k_cache, v_cache, size**-0.5)
    torch.testing.assert_close(out[3:], wanted, rtol=5e-3, atol=5e-3)
    assert (out[:3] == 1).all(), "what decodes beside them is not theirs"


@pytest.mark.parametrize(
    ("min_split", "more", "beside"),  # beside: how many have programs of their own; None: all
    [(10, 0, None), (64, 4, None), (1000, 0, None), (10, 4, 3), (64, 0, 32), (1000, 4, 1)],
)
def test_decode_attention_of_sequences_of_any_length_anywhere_in_the_kv_cache(
    min_split: int, more: int, beside: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv_heads, group, size = 2, 3, 16
    k_cache, v_cache = noise(kv_heads, 1024, size), noise(kv_heads, 1024, size)
    blocks = torch.randperm(15)
    columns = [0, 1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 8, 9, 0], [10] * 7, [11, 12, 0, 0, 0, 0, 0]
    tables = torch.stack([blocks[list(column)] for column in columns])
    slots = torch.tensor([2, 0, 1, 3, *[2] * (1 + more)], dtype=torch.int32, device=DEVICE)
    lengths = [1, 250, 321, 65, *[0] * (1 + more)]
    q = noise(5 + more, kv_heads * group, size)
    attend = triton_attention.DecodeAttention.of(slots, tables.to(DEVICE), kv_heads, min_split)
    if beside is not None:
        monkeypatch.setattr(triton_attention, "DECODES_BESIDE", beside)
        attend = attend.of_first(5 + more, torch.tensor([4], device=DEVICE))
    attend.seq_lens.copy_(torch.tensor(lengths))
    for _ in range(2):  # it leaves its scratch memory as it found it
        found = attend(q, k_cache, v_cache, size**-0.5, torch.ones_like(q))
        for row, length in enumerate(lengths[:4]):
            chunk = Chunk(tables[int(slots[row])].tolist(), length - 1, 1)
            wanted = TorchAttention([chunk])(q[row][None], k_cache, v_cache, size**-0.5)
            torch.testing.assert_close(found[row], wanted[0], rtol=5e-3, atol=5e-3)
        assert (found[4] == 1).all(), "a sequence without keys has no result"


def test_decode_attention_of_a_lone_long_sequence() -> None:
    """Which has more splits than others."""
    k_cache, v_cache = noise(1, 40 * BLOCK_SIZE, 16), noise(1, 40 * BLOCK_SIZE, 16)
    table, slot = torch.randperm(40), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    q = noise(1, 2, 16)
    attend = triton_attention.DecodeAttention.of(slot, table[None].to(DEVICE), 1)
    for length in (2433, 400):
        attend.seq_lens.fill_(length)
        wanted = TorchAttention([Chunk(table.tolist(), length - 1, 1)])(q, k_cache, v_cache, 0.25)
        torch.testing.assert_close(attend(q, k_cache, v_cache, 0.25), wanted, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("min_split", [10, 1000])
def test_each_token_of_a_draft_sees_those_before_it(min_split: int) -> None:
    kv_heads, group, size, width = 2, 3, 16, 4
    k_cache, v_cache = noise(kv_heads, 1024, size), noise(kv_heads, 1024, size)
    v_cache[:, 15 * BLOCK_SIZE :] = float("nan")  # another row's, whose model went wrong
    blocks = torch.randperm(15)
    tables = torch.stack([blocks[list(column)] for column in ([0, 1, 2, 3, 0, 0], [4, 5, 6, 7, 8, 9], [10] * 6)])
    lengths, drafted = [1, 66, 131, 323, 4], [0, 3, 2, 3, 1]
    slots = torch.tensor([2, 0, 0, 1, 2], dtype=torch.int32, device=DEVICE)
    q = noise(5 * width, kv_heads * group, size)
    attend = triton_attention.DecodeAttention.of(slots, tables.to(DEVICE), kv_heads, min_split, width=width)
    attend.seq_lens.copy_(torch.tensor(lengths))
    attend.num_drafted.copy_(torch.tensor(drafted))
    for _ in range(2):
        found = attend(q, k_cache, v_cache, size**-0.5)
        for row, (length, count) in enumerate(zip(lengths, drafted, strict=True)):
            mine = slice(row * width, row * width + 1 + count)
            chunk = Chunk(tables[int(slots[row])].tolist(), length - 1 - count, 1 + count)
            wanted = TorchAttention([chunk])(q[mine], k_cache, v_cache, size**-0.5)
            torch.testing.assert_close(found[mine], wanted, rtol=5e-3, atol=5e-3)


def test_the_newest_tokens_are_placed_and_what_does_not_decode_is_left_alone() -> None:
    state = State([request() for _ in range(3)])
    state.int_params[:3, TOKEN] = torch.tensor([30, 31, 32])
    state.int_params[:3, POSITION] = torch.tensor([0, 63, 64 + 7])
    tables = torch.tensor([[5, 9], [6, 9], [9, 2], [9, 9]], device=DEVICE)
    slots = torch.tensor([2, 0, 1], dtype=torch.int32, device=DEVICE)
    ids, positions, kv_slots = torch.full((3, 4), -1, device=DEVICE)
    seq_lens = torch.full((3,), -1, dtype=torch.int32, device=DEVICE)
    decodes, drafted = torch.tensor([2], device=DEVICE), torch.full_like(seq_lens, -1)
    place_decodes(state, slots, decodes, tables, ids, positions, kv_slots, seq_lens, drafted, width=1)
    assert ids.tolist() == [32, 30, -1, -1]
    assert positions.tolist() == [71, 0, -1, -1]
    assert kv_slots.tolist() == [2 * BLOCK_SIZE + 7, 5 * BLOCK_SIZE, -1, -1]
    assert seq_lens.tolist() == [72, 1, 0]


def test_drafts_are_placed_after_the_newest_tokens_and_what_they_lack_nowhere() -> None:
    state = State([request() for _ in range(3)])
    state.int_params[:3, TOKEN] = torch.tensor([30, 31, 32])
    state.int_params[:3, POSITION] = torch.tensor([0, 62, 64 + 7])
    state.int_params[:3, NUM_DRAFTED] = torch.tensor([0, 3, 2])
    state.drafts[:3] = torch.tensor([[40, 41, 42], [50, 51, 52], [60, 61, 62]])
    tables = torch.tensor([[5, 9], [6, 9], [9, 2], [9, 9]], device=DEVICE)
    slots = torch.tensor([2, 0, 1], dtype=torch.int32, device=DEVICE)
    ids, positions, kv_slots = torch.full((3, 12), -1, device=DEVICE)
    seq_lens, drafted = torch.full((2, 3), -1, dtype=torch.int32, device=DEVICE)
    decodes = torch.tensor([3], device=DEVICE)
    place_decodes(state, slots, decodes, tables, ids, positions, kv_slots, seq_lens, drafted, width=4)
    assert ids.tolist() == [32, 60, 61, 0, 30, 0, 0, 0, 31, 50, 51, 52]
    assert positions.tolist() == [71, 72, 73, 71, 0, 0, 0, 0, 62, 63, 64, 65]
    two, six, nine = 2 * BLOCK_SIZE, 6 * BLOCK_SIZE, 9 * BLOCK_SIZE
    spare = [999] * 3
    wanted = [two + 7, two + 8, two + 9, 999, 5 * BLOCK_SIZE, *spare, six + 62, six + 63, nine, nine + 1]
    assert kv_slots.tolist() == wanted
    assert seq_lens.tolist() == [74, 1, 66]
    assert drafted.tolist() == [2, 0, 3]


def place_decodes(state: "State", slots: Tensor, decodes: Tensor, tables: Tensor, *written: Tensor, width: int) -> None:
    triton_sampling.place_decodes(
        slots, decodes, state.int_params, tables, state.drafts, *written, width=width, spare_kv_slot=999
    )


class State:
    """The device's state of some requests, a sequence slot each, written as `SamplingState` does."""

    def __init__(self, requests: list[Request]) -> None:
        slots, columns = len(requests) + 1, triton_sampling.NUM_COLUMNS.value
        self.int_params = torch.zeros(slots, columns, dtype=torch.int64, device=DEVICE)
        self.float_params = torch.ones(slots, columns, device=DEVICE)
        self.counts = torch.zeros(slots, VOCABULARY, dtype=torch.int16, device=DEVICE)
        self.bias = torch.zeros(slots, VOCABULARY, device=DEVICE)
        self.bitmask = torch.zeros(slots, -(-VOCABULARY // 32), dtype=torch.int32, device=DEVICE)
        self.drafts = torch.zeros(slots, NUM_DRAFTS, dtype=torch.int32, device=DEVICE)
        self.history = torch.zeros(slots, MAX_HISTORY, dtype=torch.int32, device=DEVICE)
        self.float_params[:, RATE] = 0.0
        for slot, asked in enumerate(requests):
            self._write(slot, asked)

    def _write(self, slot: int, asked: Request) -> None:
        s = asked.sampling
        flags = RANDOM * (not s.greedy) | PENALISED * s.penalised | BIASED * bool(s.logit_bias)
        numbers = s.seed, s.top_k, flags | SPECULATIVE, s.max_tokens, len(asked.prompt)
        self.int_params[slot, [SEED, TOP_K, FLAGS, MAX_TOKENS, LENGTH]] = torch.tensor(numbers, device=DEVICE)
        self.history[slot, : len(asked.prompt)] = torch.tensor(asked.prompt)
        penalties = [s.presence_penalty, s.frequency_penalty, s.repetition_penalty]
        self.float_params[slot, :6] = torch.tensor([s.temperature or 1.0, s.top_p, s.min_p, *penalties])
        self.counts[slot, list(asked.prompt)] = triton_sampling.IN_PROMPT.value
        for token, value in s.logit_bias:
            self.bias[slot, token] = value

    def sample(self, logits: Tensor, slots: list[int]) -> list[int]:
        return [tokens[0] for tokens in self.step(logits, slots, drafting=False)]

    def step(self, logits: Tensor, slots: list[int], *, drafting: bool = True) -> list[list[int]]:
        """Each sequence's tokens, from the logits of its newest token and of those of its draft."""
        width = len(logits) // len(slots)
        at = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
        params = self.int_params, self.float_params, self.counts
        sampled = triton_sampling.sample(logits, at, *params, self.bias, self.bitmask, self.drafts, block=256)
        out = torch.zeros(len(slots), triton_sampling.OUT_TOKENS.value + width, dtype=torch.int64, device=DEVICE)
        triton_sampling.advance(sampled, at, *params, self.drafts, self.history, out, drafting=drafting, block=16)
        tokens = out[:, triton_sampling.OUT_TOKENS.value :].tolist()
        assert out[:, triton_sampling.OUT_DRAFTED.value].max() < width
        return [[token for token in row if token >= 0] for row in tokens]

    def draft(self, slot: int) -> list[int]:
        return self.drafts[slot, : int(self.int_params[slot, NUM_DRAFTED])].tolist()


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


@pytest.mark.parametrize("seed", range(2))
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


@pytest.mark.parametrize("seed", range(2))
def test_drafts_give_the_tokens_and_state_that_single_steps_give(seed: int) -> None:
    dice = random.Random(seed)
    few = dice.sample(range(VOCABULARY), 3)
    favourites = {"logit_bias": ((few[0], 40.0), (few[1], 38.0), (few[2], 25.0))}
    prompts = [tuple(dice.choices(few, k=dice.randint(1, 12))) for _ in range(4)]
    asked = [
        request(prompt, **(some_sampling(dice) | favourites | {"max_tokens": dice.randint(8, 40)}))
        for prompt in prompts
    ]
    state, samplers = State(asked), [Sampler([each], VOCABULARY, torch.device(DEVICE)) for each in asked]
    histories = [History(each.prompt, 60) for each in asked]
    found: list[list[int]] = [[] for _ in asked]
    accepted = 0
    for number in range(10):
        drafts = [state.draft(slot) for slot in range(4)]
        width = 1 if number < 3 else dice.choice([1, 1 + NUM_DRAFTS, 1 + NUM_DRAFTS])
        # Where a position's logits come from does not matter, if they are the same for whoever samples there.
        logits = torch.stack([logits_at(slot, len(found[slot]) + ahead) for slot in range(4) for ahead in range(width)])
        order = dice.sample(range(4), 4)
        ordered = logits.view(4, width, -1)[order].flatten(0, 1)
        padded = torch.cat([ordered, logits[:width]])
        for slot, tokens in zip(order, state.step(padded, [*order, 4]), strict=False):
            wanted: list[int] = []
            for ahead in range(width):
                wanted.append(int(samplers[slot](logits_at(slot, len(found[slot]) + ahead)[None])))
                if ahead >= len(drafts[slot]) or wanted[-1] != drafts[slot][ahead]:
                    break
            assert tokens == wanted
            history, guess = histories[slot], drafts[slot][: max(1, width - 1)]
            history.judge(num_matching(guess, tokens), max(1, len(guess) if width > 1 else 1))
            history.add(tokens)
            found[slot] += tokens
            accepted += len(tokens) - 1
            left = asked[slot].sampling.max_tokens - len(found[slot]) - 1
            assert state.draft(slot) == history.propose(min(NUM_DRAFTS, max(0, left)))
            assert state.float_params[slot, RATE].item() == pytest.approx(history.rate, abs=1e-6)
            assert state.int_params[slot, [TOKEN, POSITION]].tolist() == [tokens[-1], len(found[slot])]
    assert accepted > 4, "it would prove little if no draft were right"


def logits_at(slot: int, position: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * slot + position)
    return torch.randn(VOCABULARY, generator=generator).to(DEVICE) * 3


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
