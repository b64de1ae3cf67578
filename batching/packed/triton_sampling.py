"""The Triton kernels that choose every row's next token on the device, inside the captured graph.

They keep the law of `batching/sampling.py`, whose twins they are: a row's token depends on the row's own logits,
settings, seed and position alone, by the same race. Nothing is sorted. First many programs scan a block of the
vocabulary each: its largest logit, its mass, its winner of the race. Then one program a row puts these together. A
token may win only if the tokens above it leave room for it under top_k, top_p and min_p. So the race's winner is tried,
and if it has no room it and all below it are out (what is kept are the largest), and the next race is among the tokens
above it: few rounds, for the likelier a token, the likelier it won; and few blocks, those that have a token above it.

Worker thread only, CUDA only (or Triton's interpreter, in tests).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of a slot's whole numbers and of its fractions.
TOKEN, POSITION, START, SENT, SEED, TOP_K, FLAGS = range(7)
TEMPERATURE, TOP_P, MIN_P, PRESENCE, FREQUENCY, REPETITION = range(6)
COLUMNS = 8

DRAWN, PENALISED, BIASED, MASKED = 1, 2, 4, 8
"""Flags of a slot: what its row asks for. A row that asks for nothing costs one reading of its logits."""

IN_PROMPT, MOST = 0x4000, 0x3FFF
"""A count of the row's output tokens, up to `MOST`, and whether the token stands in its prompt, in 16 bits."""


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
def _adjusted(logits, counts, bias, allowed, at, size, flags, presence, frequency, repetition):
    """The logits at some places, changed as the row asks; -inf beyond the vocabulary."""
    inside = at < size
    x = tl.load(logits + at, mask=inside, other=-float("inf")).to(tl.float32)
    if flags & 2:
        count = tl.load(counts + at, mask=inside, other=0).to(tl.int32)
        said = count & 0x3FFF
        x = tl.where(count != 0, tl.where(x > 0, x / repetition, x * repetition), x)
        x = x - said.to(tl.float32) * frequency - tl.where(said > 0, presence, 0.0)
    if flags & 4:
        x = x + tl.load(bias + at, mask=inside, other=0.0)
    if flags & 8:
        word = tl.load(allowed + at // 32, mask=inside, other=0)
        x = tl.where((word >> (at % 32)) & 1 == 1, tl.maximum(x, -3.4028234663852886e38), -float("inf"))
    return tl.where(inside, x, -float("inf"))


@triton.jit
def _race(scaled, at, key):
    """Logarithm of weight / exponential time: the token with the largest wins. See `sampling.exponential`."""
    bits = _mix32((at.to(tl.uint32) * 0x9E3779B9) + key) & 0x7FFFFFFF
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.9999999403953552)
    series = u * (1.0 + u * (0.5 + u * (0.3333333333333333 + u * 0.25)))  # -log(1 - u), which is inexact for a small u
    return scaled - tl.log(tl.where(u < 0.01, series, -tl.log(1.0 - u)))


@triton.jit
def _scan_kernel(
    logits, lanes, ints, floats, counts, bias, allowed, found, places, size, words,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0)
    slot = tl.load(lanes + lane).to(tl.int64)
    whole = ints + slot * COLUMNS
    part = floats + slot * COLUMNS
    flags = tl.load(whole + 6).to(tl.int32)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = _adjusted(
        logits + lane.to(tl.int64) * size, counts + slot * size, bias + slot * size, allowed + slot * words,
        at, size, flags, tl.load(part + 3), tl.load(part + 4), tl.load(part + 5),
    )  # fmt: skip
    largest = tl.max(x, 0)
    mine = lane * tl.num_programs(1) + tl.program_id(1)
    tl.store(found + mine * 3, largest)
    tl.store(places + mine * 2, tl.min(tl.where(x == largest, at, size), 0))
    if flags & 1:
        scaled = (x - tl.maximum(largest, -3.4028234663852886e38)) / tl.load(part)
        sent = tl.load(whole + 3).to(tl.uint64)
        key = _mix64(_mix64(tl.load(whole + 4).to(tl.uint64)) + sent).to(tl.uint32)
        race = _race(scaled, at, key)
        winner = tl.max(race, 0)
        tl.store(found + mine * 3 + 1, tl.sum(tl.exp(scaled), 0))
        tl.store(found + mine * 3 + 2, winner)
        tl.store(places + mine * 2 + 1, tl.min(tl.where(race == winner, at, size), 0))


@triton.jit
def _mass_of_top_k(
    row, counts, bias, allowed, found, size, flags, presence, frequency, repetition, largest, temperature, top_k,
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
            if (tl.load(found + number * 3) - largest) / temperature > low:
                at = number * BLOCK + place
                x = _adjusted(row, counts, bias, allowed, at, size, flags, presence, frequency, repetition)
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
        if (tl.load(found + number * 3) - largest) / temperature > low:
            at = number * BLOCK + place
            x = _adjusted(row, counts, bias, allowed, at, size, flags, presence, frequency, repetition)
            scaled = (x - largest) / temperature
            mass += tl.where(scaled > low, tl.exp(scaled), 0.0)
    return tl.sum(mass, 0)


@triton.jit
def _pick_kernel(
    logits, lanes, ints, floats, counts, bias, allowed, found, places, out, size, words, trash,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0)
    slot = tl.load(lanes + lane).to(tl.int64)
    whole = ints + slot * COLUMNS
    part = floats + slot * COLUMNS
    row = logits + lane.to(tl.int64) * size
    counts += slot * size
    bias += slot * size
    allowed += slot * words
    found += lane * BLOCKS * 3
    places += lane * BLOCKS * 2
    flags = tl.load(whole + 6).to(tl.int32)
    block = tl.arange(0, SPAN)
    maxima = tl.load(found + block * 3, mask=block < BLOCKS, other=-float("inf"))
    largest = tl.max(maxima, 0)
    token = tl.min(tl.where(maxima == largest, tl.load(places + block * 2, mask=block < BLOCKS, other=size), size), 0)

    if flags & 1:
        presence, frequency, repetition = tl.load(part + 3), tl.load(part + 4), tl.load(part + 5)
        temperature, top_p, min_p = tl.load(part), tl.load(part + 1), tl.load(part + 2)
        top_k = tl.load(whole + 5)
        sent = tl.load(whole + 3).to(tl.uint64)
        key = _mix64(_mix64(tl.load(whole + 4).to(tl.uint64)) + sent).to(tl.uint32)
        place = tl.arange(0, BLOCK)

        below = (maxima - largest) / temperature
        total = tl.sum(tl.load(found + block * 3 + 1, mask=block < BLOCKS, other=0.0) * tl.exp(below), 0)
        races = tl.load(found + block * 3 + 2, mask=block < BLOCKS, other=-float("inf")) + below
        winners = tl.load(places + block * 2 + 1, mask=block < BLOCKS, other=size)
        token = tl.min(tl.where(races == tl.max(races, 0), winners, size), 0)

        if (top_k > 0) & (top_p < 1.0):  # top_p is a share of what top_k leaves
            total = _mass_of_top_k(
                row, counts, bias, allowed, found, size, flags, presence, frequency, repetition, largest, temperature,
                top_k, BLOCKS, BLOCK,
            )  # fmt: skip

        trying = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
        while trying:
            own = _adjusted(row, counts, bias, allowed, token, size, flags, presence, frequency, repetition)
            floor = (own - largest) / temperature
            mass = tl.zeros([BLOCK], tl.float32)
            above = tl.zeros([BLOCK], tl.int32)
            best = tl.full([BLOCK], -float("inf"), tl.float32)
            index = tl.zeros([BLOCK], tl.int32)
            for number in range(BLOCKS):
                if (tl.load(found + number * 3) - largest) / temperature > floor:
                    at = number * BLOCK + place
                    x = _adjusted(row, counts, bias, allowed, at, size, flags, presence, frequency, repetition)
                    scaled = (x - largest) / temperature
                    higher = scaled > floor
                    mass += tl.where(higher, tl.exp(scaled), 0.0)
                    above += higher.to(tl.int32)
                    race = tl.where(higher, _race(scaled, at, key), -float("inf"))
                    index = tl.where(race > best, at, index)
                    best = tl.maximum(best, race)
            kept = tl.sum(above, 0)
            room = ((top_k == 0) | (kept < top_k)) & ((top_p >= 1.0) | (tl.sum(mass, 0) < top_p * total))
            trying = (kept > 0) & ((room == 0) | (tl.exp(floor) < min_p))
            winner = tl.max(best, 0)
            token = tl.where(trying, tl.min(tl.where(best == winner, index, size), 0), token)

    tl.store(out + lane, token.to(tl.int64))
    if slot != trash:
        tl.store(whole, token.to(tl.int64))
        tl.store(whole + 1, tl.load(whole + 1) + 1)
        tl.store(whole + 3, tl.load(whole + 3) + 1)
        if flags & 2:
            count = tl.load(counts + token)
            tl.store(counts + token, tl.where((count & 0x3FFF) < 0x3FFF, count + 1, count))


def draw(
    logits: Tensor,
    lanes: Tensor,
    ints: Tensor,
    floats: Tensor,
    counts: Tensor,
    bias: Tensor,
    allowed: Tensor,
    out: Tensor,
    block: int = 8192,
) -> None:
    """Choose a token for each of `logits` [lanes, vocabulary], write it to `out` [lanes] and into the slots' state.

    `lanes` [lanes, int32] says which slot each row has; the last slot is for lanes without a row. `ints` and `floats`
    [slots, COLUMNS], `counts` [slots, vocabulary, int16], `bias` [slots, vocabulary, float32] and `allowed` [slots,
    vocabulary / 32, int32] are the slots' state; the last three are read where the slot's flags say so.
    """
    rows, size = logits.shape
    blocks = triton.cdiv(size, block)
    found = torch.empty(rows, blocks, 3, device=logits.device)
    places = torch.empty(rows, blocks, 2, device=logits.device, dtype=torch.int32)
    state = (logits, lanes, ints, floats, counts, bias, allowed, found, places)
    words = allowed.shape[1]
    _scan_kernel[(rows, blocks)](*state, size, words, COLUMNS=COLUMNS, BLOCK=block, num_warps=8)
    _pick_kernel[(rows,)](
        *state, out, size, words, len(ints) - 1,
        COLUMNS=COLUMNS, BLOCK=block, BLOCKS=blocks, SPAN=triton.next_power_of_2(blocks), num_warps=16,
    )  # fmt: skip
