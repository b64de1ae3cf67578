"""The Triton kernels that sample every sequence's next token on the device, inside the CUDA graph.

They keep the law of `batching/sampling.py`, whose twins they are: a token depends on the row's own logits, settings,
seed and position alone, by the same Gumbel-max sampling. Nothing is sorted. First many programs scan a block of the
vocabulary each: its largest logit, its probability mass, the token with its highest score. Then one program a sequence
puts these together. A token may be sampled only if the tokens above it leave room for it under top_k, top_p and min_p.
So the token of the highest score is tried, and if it has no room it and all below it are out (what is kept are the
largest), and the next try is among the tokens above it: few rounds, for the likelier a token, the likelier it has the
highest score; and few blocks, those that have a token above it.

Worker thread only, CUDA only (or Triton's interpreter, in tests).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from batching.packed.kv_cache import BLOCK_SIZE

# Columns of a slot's integer parameters and of its float parameters, NUM_COLUMNS each.
TOKEN, POSITION, NUM_OUTPUT_TOKENS, SEED, TOP_K, FLAGS = map(tl.constexpr, range(6))
TEMPERATURE, TOP_P, MIN_P, PRESENCE, FREQUENCY, REPETITION = map(tl.constexpr, range(6))
NUM_COLUMNS = tl.constexpr(8)

# Flags of a slot: what its row asks for. A row that asks for nothing costs one reading of its logits.
RANDOM, PENALISED, BIASED, GUIDED = map(tl.constexpr, (1, 2, 4, 8))

# A token's count, in 16 bits: how often the row has put it out, up to MAX_COUNT, and whether it is in the row's prompt.
IN_PROMPT, MAX_COUNT = map(tl.constexpr, (0x4000, 0x3FFF))

# Columns of what the scan finds in a block of the vocabulary: numbers, and tokens.
MAX_LOGIT, MASS, MAX_SCORE, NUM_STATS = map(tl.constexpr, range(4))
ARGMAX, SAMPLED, NUM_CANDIDATES = map(tl.constexpr, range(3))

# KV slots in a block of the KV cache.
PAGE = tl.constexpr(BLOCK_SIZE)

FLOAT32_MIN = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _mix64(x):
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _processed(logits, counts, bias, bitmask, at, size, flags, presence, frequency, repetition):
    """Logits of some tokens after bias, penalties and token bitmask; -inf beyond the vocabulary."""
    inside = at < size
    x = tl.load(logits + at, mask=inside, other=-float("inf")).to(tl.float32)
    if flags & PENALISED:
        count = tl.load(counts + at, mask=inside, other=0).to(tl.int32)
        num_output = count & MAX_COUNT
        x = tl.where(count != 0, tl.where(x > 0, x / repetition, x * repetition), x)
        x = x - num_output.to(tl.float32) * frequency - tl.where(num_output > 0, presence, 0.0)
    if flags & BIASED:
        x = x + tl.load(bias + at, mask=inside, other=0.0)
    if flags & GUIDED:
        word = tl.load(bitmask + at // 32, mask=inside, other=0)
        x = tl.where((word >> (at % 32)) & 1 == 1, tl.maximum(x, FLOAT32_MIN), -float("inf"))
    return tl.where(inside, x, -float("inf"))


@triton.jit
def _gumbel_score(scaled, at, key):
    """Gumbel-max: log(weight / exponential noise), whose largest is the sample; the noise of `sampling.exponential`."""
    bits = _mix32((at.to(tl.uint32) * 0x9E3779B9) + key) & 0x7FFFFFFF
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.9999999403953552)
    series = u * (1.0 + u * (0.5 + u * (0.3333333333333333 + u * 0.25)))  # -log(1 - u), which is inexact for a small u
    return scaled - tl.log(tl.where(u < 0.01, series, -tl.log(1.0 - u)))


@triton.jit
def _scan_kernel(
    logits, slots, int_params, float_params, counts, bias, bitmask, stats, candidates, size, bitmask_width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    ints = int_params + slot * NUM_COLUMNS
    floats = float_params + slot * NUM_COLUMNS
    flags = tl.load(ints + FLAGS).to(tl.int32)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = _processed(
        logits + row.to(tl.int64) * size, counts + slot * size, bias + slot * size, bitmask + slot * bitmask_width,
        at, size, flags, tl.load(floats + PRESENCE), tl.load(floats + FREQUENCY), tl.load(floats + REPETITION),
    )  # fmt: skip
    largest = tl.max(x, 0)
    mine = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(stats + mine * NUM_STATS + MAX_LOGIT, largest)
    tl.store(candidates + mine * NUM_CANDIDATES + ARGMAX, tl.min(tl.where(x == largest, at, size), 0))
    if flags & RANDOM:
        scaled = (x - tl.maximum(largest, FLOAT32_MIN)) / tl.load(floats + TEMPERATURE)
        num_output_tokens = tl.load(ints + NUM_OUTPUT_TOKENS).to(tl.uint64)
        key = _mix64(_mix64(tl.load(ints + SEED).to(tl.uint64)) + num_output_tokens).to(tl.uint32)
        score = _gumbel_score(scaled, at, key)
        best_score = tl.max(score, 0)
        tl.store(stats + mine * NUM_STATS + MASS, tl.sum(tl.exp(scaled), 0))
        tl.store(stats + mine * NUM_STATS + MAX_SCORE, best_score)
        tl.store(candidates + mine * NUM_CANDIDATES + SAMPLED, tl.min(tl.where(score == best_score, at, size), 0))


@triton.jit
def _mass_of_top_k(
    logits, counts, bias, bitmask, stats, size, flags, presence, frequency, repetition, largest, temperature, top_k,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Find a floor that `top_k` tokens are above, or their ties. It is looked for at -1, -2, -4 and so on, then halfway,
    # until one value alone is left between low and high.
    place = tl.arange(0, BLOCK)
    low, high, least, bracket = -128.0, 0.0, -128.0, -1.0
    seeking = True
    while seeking:
        middle = tl.where(bracket > -128.0, bracket, (low + high) / 2)
        above = tl.zeros([BLOCK], tl.int32)
        next_up = tl.full([BLOCK], float("inf"), tl.float32)
        next_down = tl.full([BLOCK], -float("inf"), tl.float32)
        for number in range(BLOCKS):
            if (tl.load(stats + number * NUM_STATS + MAX_LOGIT) - largest) / temperature > low:
                at = number * BLOCK + place
                x = _processed(logits, counts, bias, bitmask, at, size, flags, presence, frequency, repetition)
                scaled = (x - largest) / temperature
                above += (scaled > middle).to(tl.int32)
                next_up = tl.minimum(next_up, tl.where(scaled > middle, scaled, float("inf")))
                next_down = tl.maximum(next_down, tl.where(scaled > middle, -float("inf"), scaled))
        kept = tl.sum(above, 0)
        if kept >= top_k:
            low = middle
            least = tl.min(next_up, 0)
            bracket = -128.0
        else:
            high = tl.max(next_down, 0)
            bracket = bracket * 2
        seeking = (kept != top_k) & (high > least)
    mass = tl.zeros([BLOCK], tl.float32)
    for number in range(BLOCKS):
        if (tl.load(stats + number * NUM_STATS + MAX_LOGIT) - largest) / temperature > low:
            at = number * BLOCK + place
            x = _processed(logits, counts, bias, bitmask, at, size, flags, presence, frequency, repetition)
            scaled = (x - largest) / temperature
            mass += tl.where(scaled > low, tl.exp(scaled), 0.0)
    return tl.sum(mass, 0)


@triton.jit
def _sample_kernel(
    logits, slots, int_params, float_params, counts, bias, bitmask, stats, candidates, out, size, bitmask_width,
    spare_slot, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    ints = int_params + slot * NUM_COLUMNS
    floats = float_params + slot * NUM_COLUMNS
    logits += row.to(tl.int64) * size
    counts += slot * size
    bias += slot * size
    bitmask += slot * bitmask_width
    stats += row * BLOCKS * NUM_STATS
    candidates += row * BLOCKS * NUM_CANDIDATES
    flags = tl.load(ints + FLAGS).to(tl.int32)
    block = tl.arange(0, SPAN)
    maxima = tl.load(stats + block * NUM_STATS + MAX_LOGIT, mask=block < BLOCKS, other=-float("inf"))
    largest = tl.max(maxima, 0)
    has_largest = maxima == largest
    argmax = tl.load(candidates + block * NUM_CANDIDATES + ARGMAX, mask=block < BLOCKS, other=size)
    token = tl.min(tl.where(has_largest, argmax, size), 0)

    if flags & RANDOM:
        presence = tl.load(floats + PRESENCE)
        frequency, repetition = tl.load(floats + FREQUENCY), tl.load(floats + REPETITION)
        temperature, top_p, min_p = tl.load(floats + TEMPERATURE), tl.load(floats + TOP_P), tl.load(floats + MIN_P)
        top_k = tl.load(ints + TOP_K)
        num_output_tokens = tl.load(ints + NUM_OUTPUT_TOKENS).to(tl.uint64)
        key = _mix64(_mix64(tl.load(ints + SEED).to(tl.uint64)) + num_output_tokens).to(tl.uint32)
        place = tl.arange(0, BLOCK)

        below = (maxima - largest) / temperature
        total = tl.sum(tl.load(stats + block * NUM_STATS + MASS, mask=block < BLOCKS, other=0.0) * tl.exp(below), 0)
        scores = tl.load(stats + block * NUM_STATS + MAX_SCORE, mask=block < BLOCKS, other=-float("inf")) + below
        sampled = tl.load(candidates + block * NUM_CANDIDATES + SAMPLED, mask=block < BLOCKS, other=size)
        token = tl.min(tl.where(scores == tl.max(scores, 0), sampled, size), 0)

        if (top_k > 0) & (top_p < 1.0):  # top_p is a share of what top_k leaves
            total = _mass_of_top_k(
                logits, counts, bias, bitmask, stats, size, flags, presence, frequency, repetition, largest,
                temperature, top_k, BLOCKS, BLOCK,
            )  # fmt: skip

        trying = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
        while trying:
            own = _processed(logits, counts, bias, bitmask, token, size, flags, presence, frequency, repetition)
            floor = (own - largest) / temperature
            mass = tl.zeros([BLOCK], tl.float32)
            above = tl.zeros([BLOCK], tl.int32)
            best = tl.full([BLOCK], -float("inf"), tl.float32)
            index = tl.zeros([BLOCK], tl.int32)
            for number in range(BLOCKS):
                if (tl.load(stats + number * NUM_STATS + MAX_LOGIT) - largest) / temperature > floor:
                    at = number * BLOCK + place
                    x = _processed(logits, counts, bias, bitmask, at, size, flags, presence, frequency, repetition)
                    scaled = (x - largest) / temperature
                    higher = scaled > floor
                    mass += tl.where(higher, tl.exp(scaled), 0.0)
                    above += higher.to(tl.int32)
                    score = tl.where(higher, _gumbel_score(scaled, at, key), -float("inf"))
                    index = tl.where(score > best, at, index)
                    best = tl.maximum(best, score)
            kept = tl.sum(above, 0)
            room = ((top_k == 0) | (kept < top_k)) & ((top_p >= 1.0) | (tl.sum(mass, 0) < top_p * total))
            trying = (kept > 0) & ((room == 0) | (tl.exp(floor) < min_p))
            best_score = tl.max(best, 0)
            token = tl.where(trying, tl.min(tl.where(best == best_score, index, size), 0), token)

    tl.store(out + row, token.to(tl.int64))
    if slot != spare_slot:
        tl.store(ints + TOKEN, token.to(tl.int64))
        tl.store(ints + POSITION, tl.load(ints + POSITION) + 1)
        tl.store(ints + NUM_OUTPUT_TOKENS, tl.load(ints + NUM_OUTPUT_TOKENS) + 1)
        if flags & PENALISED:
            count = tl.load(counts + token)
            tl.store(counts + token, tl.where((count & MAX_COUNT) < MAX_COUNT, count + 1, count))


def sample(
    logits: Tensor,
    slots: Tensor,
    int_params: Tensor,
    float_params: Tensor,
    counts: Tensor,
    bias: Tensor,
    bitmask: Tensor,
    out: Tensor,
    block: int = 8192,
) -> None:
    """Sample a token for each of `logits` [sequences, vocabulary] into `out` [sequences], and advance the slots' state.

    `slots` [sequences, int32] are their sequence slots; the last slot pads the batch and is not advanced. The state of
    all slots is `int_params` and `float_params` [slots, NUM_COLUMNS], `counts` [slots, vocabulary, int16], `bias`
    [slots, vocabulary, float32] and `bitmask` [slots, vocabulary / 32, int32]; the last three are read where the slot's
    flags say so.
    """
    sequences, size = logits.shape
    blocks = triton.cdiv(size, block)
    stats = torch.empty(sequences, blocks, NUM_STATS.value, device=logits.device)
    candidates = torch.empty(sequences, blocks, NUM_CANDIDATES.value, device=logits.device, dtype=torch.int32)
    state = (logits, slots, int_params, float_params, counts, bias, bitmask, stats, candidates)
    bitmask_width = bitmask.shape[1]
    _scan_kernel[(sequences, blocks)](*state, size, bitmask_width, BLOCK=block, num_warps=8)
    _sample_kernel[(sequences,)](
        *state, out, size, bitmask_width, len(int_params) - 1,
        BLOCK=block, BLOCKS=blocks, SPAN=triton.next_power_of_2(blocks), num_warps=16,
    )  # fmt: skip


@triton.jit
def _place_kernel(
    slots, num_decodes, int_params, block_tables, ids, positions, kv_slots, seq_lens, max_blocks,
):  # fmt: skip
    sequence = tl.program_id(0)
    if sequence < tl.load(num_decodes):
        slot = tl.load(slots + sequence).to(tl.int64)
        ints = int_params + slot * NUM_COLUMNS
        position = tl.load(ints + POSITION)
        block = tl.load(block_tables + slot * max_blocks + position // PAGE)
        tl.store(ids + sequence, tl.load(ints + TOKEN))
        tl.store(positions + sequence, position)
        tl.store(kv_slots + sequence, block * PAGE + position % PAGE)
        tl.store(seq_lens + sequence, (position + 1).to(tl.int32))
    else:
        tl.store(seq_lens + sequence, 0)


def place_decodes(
    slots: Tensor,
    num_decodes: Tensor,
    int_params: Tensor,
    block_tables: Tensor,
    ids: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    seq_lens: Tensor,
) -> None:
    """The newest tokens of the first `num_decodes` [1] of `slots`, with positions and KV slots, written to the first
    `ids`, `positions` and `kv_slots`; and how many keys each has to `seq_lens`, 0 for the rest of the slots."""
    _place_kernel[(len(slots),)](
        slots, num_decodes, int_params, block_tables, ids, positions, kv_slots, seq_lens, block_tables.shape[1],
        num_warps=1,
    )  # fmt: skip
