"""The Triton kernels in Triton's interpreter, against their twins in torch; on a GPU, the compiled ones."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from batching.packed import reference
from batching.packed.attention import Piece, RowAttention
from batching.sampling import Sampler
from batching.types import Request
from tests.batching.conftest import request

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

from batching.packed import triton_attention, triton_layer, triton_sampling  # noqa: E402

VOCABULARY = 500


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
    slots = torch.tensor([3, 4, 9, 18, 0], device=DEVICE)
    pools = [torch.zeros(kv_heads, 20, size, device=DEVICE) for _ in range(4)]
    found = triton_layer.rotate_and_store(qkv, cos, sin, norms, slots, pools[0], pools[1])
    wanted = reference.rotate_and_store(qkv, cos, sin, norms, slots, pools[2], pools[3])
    for mine, theirs in zip([found, *pools[:2]], [wanted, *pools[2:]], strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize(("group", "size"), [(3, 16), (1, 24)])
def test_prompt_attention_of_pieces_anywhere_in_the_pool(group: int, size: int) -> None:
    kv_heads = 2
    k_pool, v_pool = noise(kv_heads, 500, size), noise(kv_heads, 500, size)
    v_pool[:, 480:] = float("nan")  # another row's, whose model went wrong
    pieces = [Piece(5, 0, 64), Piece(5, 64, 41), Piece(400, 70, 10), Piece(200, 0, 1)]
    bounds, starts, used = [0, 64, 105, 115, 116, 116, 116], [5, 5, 400, 200, 0, 0], [64, 105, 80, 1, 0, 0]
    where = [torch.tensor(numbers, dtype=torch.int32, device=DEVICE) for numbers in (bounds, starts, used)]
    q = noise(116, kv_heads * group, size)
    found = triton_attention.PromptAttention(*where)(q, k_pool, v_pool, size**-0.5)
    wanted = RowAttention(pieces)(q, k_pool, v_pool, size**-0.5)
    torch.testing.assert_close(found, wanted, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("least", [10, 64, 1000])
def test_decode_attention_of_rows_of_any_length_anywhere_in_the_pool(least: int) -> None:
    kv_heads, group, size = 2, 3, 16
    k_pool, v_pool = noise(kv_heads, 700, size), noise(kv_heads, 700, size)
    starts = torch.tensor([5, 300, 690, 40], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([250, 321, 1, 65], dtype=torch.int32, device=DEVICE)
    q = noise(4, kv_heads * group, size)
    attend = triton_attention.DecodeAttention.of(starts, lengths, kv_heads, group, size, least)
    for _ in range(2):  # it leaves its scratch memory as it found it
        found = attend(q, k_pool, v_pool, size**-0.5)
        for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            keys, values = k_pool[:, start : start + length], v_pool[:, start : start + length]
            wanted = scaled_dot_product_attention(q[row][None, :, None], keys[None], values[None], enable_gqa=True)
            torch.testing.assert_close(found[row], wanted[0, :, 0], rtol=5e-3, atol=5e-3)


class Lanes:
    """The device's state of some requests, one lane each, as `slots.Slots` writes it."""

    def __init__(self, requests: list[Request]) -> None:
        lanes = len(requests)
        self.ints = torch.zeros(lanes + 1, triton_sampling.COLUMNS, dtype=torch.int64, device=DEVICE)
        self.floats = torch.ones(lanes + 1, triton_sampling.COLUMNS, device=DEVICE)
        self.counts = torch.zeros(lanes + 1, VOCABULARY, dtype=torch.int16, device=DEVICE)
        self.bias = torch.zeros(lanes + 1, VOCABULARY, device=DEVICE)
        self.allowed = torch.zeros(lanes + 1, -(-VOCABULARY // 32), dtype=torch.int32, device=DEVICE)
        for lane, asked in enumerate(requests):
            self._write(lane, asked)

    def _write(self, lane: int, asked: Request) -> None:
        s = asked.sampling
        flags = (
            triton_sampling.DRAWN * (not s.greedy)
            | triton_sampling.PENALISED * s.penalised
            | triton_sampling.BIASED * bool(s.logit_bias)
        )
        (
            self.ints[lane, triton_sampling.SEED],
            self.ints[lane, triton_sampling.TOP_K],
            self.ints[lane, triton_sampling.FLAGS],
        ) = s.seed, s.top_k, flags
        penalties = [s.presence_penalty, s.frequency_penalty, s.repetition_penalty]
        self.floats[lane, :6] = torch.tensor([s.temperature or 1.0, s.top_p, s.min_p, *penalties])
        self.counts[lane, list(asked.prompt)] = triton_sampling.IN_PROMPT
        for token, value in s.logit_bias:
            self.bias[lane, token] = value

    def draw(self, logits: Tensor, lanes: list[int]) -> list[int]:
        out = torch.zeros(len(lanes), dtype=torch.int64, device=DEVICE)
        at = torch.tensor(lanes, dtype=torch.int32, device=DEVICE)
        triton_sampling.draw(logits, at, self.ints, self.floats, self.counts, self.bias, self.allowed, out, block=256)
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
def test_the_draw_is_the_samplers(seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(3):
        asked = [request(tuple(dice.choices(range(VOCABULARY), k=10)), **some_sampling(dice)) for _ in range(4)]
        lanes, sampler = Lanes(asked), Sampler(asked, VOCABULARY, torch.device(DEVICE))
        for _ in range(2):
            logits = noise(4, VOCABULARY) * 3
            order = dice.sample(range(4), 4)
            found = lanes.draw(torch.cat([logits[order], logits[:1]]), [*order, 4])
            wanted = sampler(logits.clone()).tolist()
            assert found[:4] == [wanted[lane] for lane in order]


def test_a_lane_moves_on_with_each_token_and_the_one_without_a_row_does_not() -> None:
    lanes = Lanes([request(presence_penalty=1.0)])
    logits = torch.zeros(2, VOCABULARY, device=DEVICE)
    logits[:, 7] = 1.0
    assert lanes.draw(logits, [0, 1]) == [7, 7]
    assert lanes.ints[0, [triton_sampling.TOKEN, triton_sampling.POSITION, triton_sampling.SENT]].tolist() == [7, 1, 1]
    assert lanes.ints[1].tolist() == [0] * triton_sampling.COLUMNS
    assert lanes.counts[0, 7].item() == 1
    assert lanes.draw(logits, [0, 1])[0] != 7, "penalised, it ties with all others"


def test_what_is_ruled_out_is_not_drawn() -> None:
    lanes = Lanes([request(temperature=1.0, seed=seed) for seed in range(8)])
    lanes.ints[:, triton_sampling.FLAGS] |= triton_sampling.MASKED
    lanes.allowed[:, 400 // 32] = 1 << (400 % 32) | 1 << (401 % 32)
    assert set(lanes.draw(noise(8, VOCABULARY), list(range(8)))) <= {400, 401}


def test_what_has_the_same_logit_stays_or_goes_together() -> None:
    settings: list[dict[str, Any]] = [{"top_k": 3}, {"top_k": 3, "top_p": 0.99}, {"top_p": 0.01}]
    lanes = Lanes([request(temperature=1.0, seed=seed, **cut) for seed in range(16) for cut in settings])
    logits = torch.zeros(48, VOCABULARY, device=DEVICE)
    logits[:, 100:108] = 5.0
    drawn = lanes.draw(logits, list(range(48)))
    assert set(drawn) == set(range(100, 108))
