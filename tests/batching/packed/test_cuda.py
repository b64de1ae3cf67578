"""The packed engine on a CUDA device: every row is what it is alone, whatever joins, leaves and is drawn beside it."""

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from batching.packed import gluon_attention, layer, triton_attention, triton_layer
from batching.packed.attention import Chunk, TorchAttention
from batching.packed.engine import PackedEngine, unsupported
from batching.packed.kv_cache import BLOCK_SIZE
from batching.packed.speculation import MAX_DRAFT_TOKENS
from batching.padded import PaddedEngine
from batching.types import Request
from tests.batching.conftest import request
from tests.batching.packed.test_engine import VOCABULARY, Run, long_requests
from tests.batching.packed.test_speculation import assert_logprobs_are_of_their_tokens, quoting_request
from tests.batching.test_padded import KINDS, some_request
from tests.batching.test_scoring import Run as Scored
from tests.batching.test_scoring import check, long_prompt, of
from tests.tiny import tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def nothing_stays_on_the_device() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def some_requests(dice: random.Random) -> list[Request]:
    """With every kind of sampling, log probabilities, biases and least lengths; prompts of up to several passes."""
    asked = [some_request(dice) for _ in range(24)] + long_requests(dice, 4)
    asked += [request(tuple(dice.choices(range(VOCABULARY), k=dice.randint(60, 300))), max_tokens=20) for _ in range(4)]
    dice.shuffle(asked)
    return [with_extras(dice, each) for each in asked]


def with_extras(dice: random.Random, asked: Request) -> Request:
    sampling = asked.sampling
    least = min(dice.choice([0, 0, 5]), sampling.max_tokens)
    bias = dice.choice([(), ((5, 3.0), (9, -100.0))])
    noted = dice.choice([None, None, 3])
    return replace(asked, sampling=replace(sampling, min_tokens=least, logit_bias=bias, top_logprobs=noted))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_every_row_is_as_on_stock_generate(kind: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused:
        monkeypatch.setattr(layer, "FUSABLE", frozenset())
    dice = random.Random(1)
    mixed = [some_request(dice) for _ in range(12)] + long_requests(dice, 4)
    stock = PaddedEngine(tiny_model(kind).to("cuda"), token_budget=4096)  # type: ignore[arg-type]
    wanted = [Run(stock, [each]).answers[0] for each in mixed]
    engine = PackedEngine(tiny_model(kind).to("cuda"), num_slots=8, token_budget=1500, prefill_chunk=64)  # type: ignore[arg-type]
    assert Run(engine, mixed, first=6, joining=lambda: dice.randint(0, 2)).answers == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_every_answer_is_the_one_without_drafts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from batching.packed.cuda_runner import CUDARunner

    monkeypatch.setattr(CUDARunner, "num_draft_tokens", lambda runner, decoding: MAX_DRAFT_TOKENS)
    dice = random.Random(3)
    asked = [quoting_request(dice) for _ in range(60)]
    stock = PaddedEngine(tiny_model(kind).to("cuda"), token_budget=4096)  # type: ignore[arg-type]
    wanted = [Run(stock, [each]).answers[0] for each in asked]
    engine = PackedEngine(tiny_model(kind).to("cuda"), num_slots=8, token_budget=12 * BLOCK_SIZE, prefill_chunk=64)  # type: ignore[arg-type]
    run = Run(engine, asked, first=6, joining=lambda: dice.randint(0, 2))
    assert run.answers == wanted
    assert_logprobs_are_of_their_tokens(run)
    assert sum(row.num_accepted_tokens for row in run.rows) > 60


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_have_the_models_own_log_probabilities(kind: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused:
        monkeypatch.setattr(layer, "FUSABLE", frozenset())
    dice = random.Random(2)
    asked = [of(long_prompt(dice, length), 3, max_tokens=dice.choice([0, 5])) for length in (1, 2, 63, 64, 65, 300)]
    asked += [some_request(dice) for _ in range(6)]
    model = tiny_model(kind).to("cuda")  # type: ignore[arg-type]
    engine = PackedEngine(model, num_slots=8, token_budget=1500, prefill_chunk=64)
    run = Scored(engine, asked)
    for row, told in run.told.items():
        if row.request.sampling.prompt_logprobs is not None:
            check(told, tiny_model(kind), row.request, close=2e-2)  # of TF32
    plain = [replace(each, sampling=replace(each.sampling, prompt_logprobs=None)) for each in asked]
    wanted = Run(engine, [each for each in plain if each.sampling.max_tokens])
    assert [answer for answer in run.answers if answer] == wanted.answers


@pytest.mark.parametrize(("dtype", "invariant"), [(torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_as_it_is_alone(kind: str, dtype: torch.dtype, invariant: bool) -> None:
    # In bfloat16 sums in another order are another number soon: what --batch-invariant is for.
    model = tiny_model(kind)
    model.to(device="cuda", dtype=dtype)  # type: ignore[call-arg]
    assert unsupported(model) is None
    engine = PackedEngine(model, num_slots=12, token_budget=1500, prefill_chunk=64, batch_invariant=invariant)
    dice = random.Random(0)
    for _ in range(6):
        asked = some_requests(dice)
        mixed = Run(engine, asked, first=10, joining=lambda: dice.randint(0, 3))
        alone = [Run(engine, [each]) for each in asked]
        assert mixed.answers == [run.answers[0] for run in alone]
        for row, run in zip(mixed.rows, alone, strict=True):
            assert [noted.token for noted in mixed.logprobs[row]] == (mixed.sent[row] if mixed.logprobs[row] else [])
            if invariant:  # to the last bit
                assert mixed.logprobs[row] == run.logprobs[run.rows[0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kv_heads", "group", "size"), [(8, 4, 128), (2, 2, 128), (1, 6, 64)])
def test_hoppers_own_prefill_attention_is_attention(kv_heads: int, group: int, size: int, dtype: torch.dtype) -> None:
    """Of chunks of any number of rows, of any length, anywhere in a KV cache whose unused part is not a number."""
    if torch.cuda.get_device_capability()[0] != triton_layer.HOPPER:
        pytest.skip("needs a Hopper GPU")
    dice = random.Random(size)
    for _ in range(20):
        pasts = dice.choices((0, 1, 63, 64, 127, 128, 129, dice.randint(0, 900)), k=dice.randint(1, 5))
        lengths = [(past, dice.randint(1, 300)) for past in pasts]
        blocks = list(range(100))
        dice.shuffle(blocks)
        tables = [[blocks.pop() for _ in range(-(-(past + new) // BLOCK_SIZE))] for past, new in lengths]
        caches = torch.full((2, kv_heads, 100 * BLOCK_SIZE, size), float("nan"), device="cuda", dtype=dtype)
        chunks = [Chunk(table, past, new) for table, (past, new) in zip(tables, lengths, strict=True)]
        for chunk in chunks:
            known = torch.randn(2, kv_heads, chunk.seq_len, size, device="cuda")
            caches[:, :, chunk.kv_slots().cuda()] = known.to(dtype)
        q = torch.randn(sum(new for _, new in lengths) + 3, kv_heads * group, size, device="cuda").to(dtype)
        assert gluon_attention.suits(caches[None], kv_heads * group)
        attend = hopper_attention(chunks)
        out = torch.ones_like(q)
        attend(q, caches[0], caches[1], size**-0.5, out)
        wanted = TorchAttention(chunks)(q[3:].float(), caches[0].float(), caches[1].float(), size**-0.5)
        torch.testing.assert_close(out[3:].float(), wanted, rtol=2e-2, atol=2e-2)
        assert (out[:3] == 1).all(), "what decodes beside them is not theirs"


def hopper_attention(chunks: list[Chunk]) -> gluon_attention.HopperPrefillAttention:
    """Of these one after the other, behind three tokens of others."""
    tables = torch.zeros(len(chunks), 100, dtype=torch.int64)
    columns, first = [], 3
    for slot, chunk in enumerate(chunks):
        tables[slot, : len(chunk.blocks)] = torch.tensor(chunk.blocks)
        for block in chunk.split(triton_attention.QUERY_BLOCK):
            columns.append((block.seq_len, first, block.num_tokens, slot))
            first += block.num_tokens
    num_blocks = torch.tensor([len(columns)], dtype=torch.int32)
    blocks = torch.tensor(sorted(columns, reverse=True), dtype=torch.int32)
    next_tile = torch.zeros(1, dtype=torch.int32, device="cuda")
    return gluon_attention.HopperPrefillAttention(num_blocks.cuda(), blocks.cuda(), tables.cuda(), next_tile)
