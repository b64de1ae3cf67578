"""The Triton kernel that chooses every row's next token on the device, inside the captured graph.

It keeps the law of `batching/sampling.py`, whose twin it is: a row's token depends on the row's own logits, settings,
seed and position alone, by the same race. One program has one row and reads its logits a few times over; nothing is
sorted. A token may win only if the tokens above it leave room for it under top_k and top_p. So the race's winner is
tried, and if it has no room it and all below it are out (what is kept are the largest), and the next race is among the
tokens above it: few rounds, for the likelier a token, the likelier it won.

Worker thread only, CUDA only (or Triton's interpreter, in tests).
"""

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
def _draw_kernel(
    logits, lanes, ints, floats, counts, bias, allowed, out, size, words, trash,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0)
    slot = tl.load(lanes + lane).to(tl.int64)
    whole = ints + slot * COLUMNS
    part = floats + slot * COLUMNS
    row = logits + lane.to(tl.int64) * size
    counts += slot * size
    bias += slot * size
    allowed += slot * words
    flags = tl.load(whole + 6).to(tl.int32)
    presence, frequency, repetition = tl.load(part + 3), tl.load(part + 4), tl.load(part + 5)
    place = tl.arange(0, BLOCK)

    best = tl.full([BLOCK], -float("inf"), tl.float32)
    index = tl.zeros([BLOCK], tl.int32)
    for begin in tl.range(0, size, BLOCK, num_stages=STAGES):
        at = begin + place
        x = _adjusted(row, counts, bias, allowed, at, size, flags, presence, frequency, repetition)
        index = tl.where(x > best, at, index)
        best = tl.maximum(best, x)
    largest = tl.max(best, 0)
    token = tl.min(tl.where(best == largest, index, size), 0)

    if flags & 1:
        temperature, top_p, min_p = tl.load(part), tl.load(part + 1), tl.load(part + 2)
        top_k = tl.load(whole + 5)
        sent = tl.load(whole + 3).to(tl.uint64)
        key = _mix64(_mix64(tl.load(whole + 4).to(tl.uint64)) + sent).to(tl.uint32)
        mass = tl.zeros([BLOCK], tl.float32)
        best = tl.full([BLOCK], -float("inf"), tl.float32)
        index = tl.zeros([BLOCK], tl.int32)
        for begin in tl.range(0, size, BLOCK, num_stages=STAGES):
            at = begin + place
            x = _adjusted(row, counts, bias, allowed, at, size, flags, presence, frequency, repetition)
            scaled = (x - largest) / temperature
            weight = tl.exp(scaled)
            mass += weight
            # Logarithms of times are between -22.2 and 2.82: what is further than that below the likeliest cannot win.
            if tl.max(scaled, 0) > -25.1:
                race = tl.where(weight >= min_p, _race(scaled, at, key), -float("inf"))
                index = tl.where(race > best, at, index)
                best = tl.maximum(best, race)
        total = tl.sum(mass, 0)
        winner = tl.max(best, 0)
        token = tl.min(tl.where(best == winner, index, size), 0)

        if (top_k > 0) & (top_p < 1.0):
            # top_p is a share of what top_k leaves: find a floor that `top_k` tokens are above, or their ties. It is
            # looked for at -1, -2, -4 and so on, and then between the last two.
            low, high = -128.0, 0.0
            bracket = -1.0
            rounds = 0
            while rounds < 40:
                middle = tl.where(bracket > -128.0, bracket, (low + high) / 2)
                above = tl.zeros([BLOCK], tl.int32)
                for begin in tl.range(0, size, BLOCK, num_stages=STAGES):
                    at = begin + place
                    x = _adjusted(row, counts, bias, allowed, at, size, flags, presence, frequency, repetition)
                    above += ((x - largest) / temperature > middle).to(tl.int32)
                number = tl.sum(above, 0)
                low = tl.where(number >= top_k, middle, low)
                high = tl.where(number >= top_k, high, middle)
                bracket = tl.where(number >= top_k, -128.0, bracket * 2)
                rounds = tl.where(number == top_k, 40, rounds + 1)
            mass = tl.zeros([BLOCK], tl.float32)
            for begin in tl.range(0, size, BLOCK, num_stages=STAGES):
                at = begin + place
                x = _adjusted(row, counts, bias, allowed, at, size, flags, presence, frequency, repetition)
                scaled = (x - largest) / temperature
                mass += tl.where(scaled > low, tl.exp(scaled), 0.0)
            total = tl.sum(mass, 0)

        trying = (top_k > 0) | (top_p < 1.0)
        while trying:
            own = _adjusted(row, counts, bias, allowed, token, size, flags, presence, frequency, repetition)
            floor = (own - largest) / temperature
            mass = tl.zeros([BLOCK], tl.float32)
            above = tl.zeros([BLOCK], tl.int32)
            best = tl.full([BLOCK], -float("inf"), tl.float32)
            index = tl.zeros([BLOCK], tl.int32)
            for begin in tl.range(0, size, BLOCK, num_stages=STAGES):
                at = begin + place
                x = _adjusted(row, counts, bias, allowed, at, size, flags, presence, frequency, repetition)
                scaled = (x - largest) / temperature
                if tl.max(scaled, 0) > floor:
                    higher = scaled > floor
                    weight = tl.where(higher, tl.exp(scaled), 0.0)
                    mass += weight
                    above += higher.to(tl.int32)
                    race = tl.where(higher & (weight >= min_p), _race(scaled, at, key), -float("inf"))
                    index = tl.where(race > best, at, index)
                    best = tl.maximum(best, race)
            number = tl.sum(above, 0)
            room = ((top_k == 0) | (number < top_k)) & ((top_p >= 1.0) | (tl.sum(mass, 0) < top_p * total))
            trying = (number > 0) & (room == 0)
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
    logits: Tensor, lanes: Tensor, ints: Tensor, floats: Tensor, counts: Tensor, bias: Tensor, allowed: Tensor, out: Tensor
) -> None:
    """Choose a token for each of `logits` [lanes, vocabulary], write it to `out` [lanes] and into the slots' state.

    `lanes` [lanes, int32] says which slot each row has; the last slot is for lanes without a row. `ints` and `floats`
    [slots, COLUMNS], `counts` [slots, vocabulary, int16], `bias` [slots, vocabulary, float32] and `allowed` [slots,
    vocabulary / 32, int32] are the slots' state; the last three are read where the slot's flags say so.
    """
    size = logits.shape[-1]
    block = min(8192, triton.next_power_of_2(size))
    _draw_kernel[(len(lanes),)](
        logits, lanes, ints, floats, counts, bias, allowed, out, size, allowed.shape[1], len(ints) - 1,
        COLUMNS=COLUMNS, BLOCK=block, STAGES=3, num_warps=16,
    )  # fmt: skip
