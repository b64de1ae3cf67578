"""The Triton kernels that sample every sequence's next token on the device, inside the CUDA graph.

They keep the law of `batching/sampling.py`, whose twins they are: a token depends on the row's own logits, settings,
seed and position alone, by the same Gumbel-max sampling. So what follows each token of a draft is sampled beside the
others, as if all of the draft were right; `advance` keeps what follows its right part, and looks up the next draft.

Nothing is sorted. First many programs scan a block of the vocabulary each: its largest logit, its probability mass, the
token with its highest score. Then one program a sequence puts these together. A token may be sampled only if the tokens
above it leave room for it under top_k, top_p and min_p. So the token of the highest score is tried, and if it has no
room it and all below it are out (what is kept are the largest), and the next try is among the tokens above it: few
rounds, for the likelier a token, the likelier it has the highest score; and few blocks, those that have a token above
it.

Worker thread only, CUDA only (or Triton's interpreter, in tests).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from batching.packed.kv_cache import BLOCK_SIZE
from batching.packed.speculation import MAX_MATCH, MIN_MATCH, WEIGHT

# Columns of a slot's integer parameters and of its float parameters, NUM_COLUMNS each.
TOKEN, POSITION, NUM_OUTPUT_TOKENS, SEED, TOP_K, FLAGS, MAX_TOKENS, LENGTH, NUM_DRAFTED = map(tl.constexpr, range(9))
TEMPERATURE, TOP_P, MIN_P, PRESENCE, FREQUENCY, REPETITION, RATE = map(tl.constexpr, range(7))
NUM_COLUMNS = tl.constexpr(9)

# Flags of a slot: what its row asks for. A row that asks for nothing costs one reading of its logits.
RANDOM, PENALISED, BIASED, GUIDED, SPECULATIVE = map(tl.constexpr, (1, 2, 4, 8, 16))

# What is read back of a sequence: how many tokens were drafted, how many the next draft may bring (in PROSPECT_UNITs),
# and the tokens, -1 after the last one.
OUT_DRAFTED, OUT_PROSPECT, OUT_TOKENS = map(tl.constexpr, range(3))
PROSPECT_UNIT = tl.constexpr(1 / 1024)

# A place in a row's text, and above it the number of tokens that match there.
PLACE_BITS, PLACE_MASK = map(tl.constexpr, (20, 0xFFFFF))

LEAST, MOST, NEWEST_WEIGHT = map(tl.constexpr, (MIN_MATCH, MAX_MATCH, WEIGHT))

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
def _processed(
    logits, counts, bias, bitmask, draft, ahead, at, size, flags, presence, frequency, repetition, WIDTH: tl.constexpr
):  # fmt: skip
    """Logits of some tokens after bias, penalties and token bitmask; -inf beyond the vocabulary.

    The first `ahead` tokens of the draft, fewer than WIDTH, count as put out.
    """
    inside = at < size
    x = tl.load(logits + at, mask=inside, other=-float("inf")).to(tl.float32)
    if flags & PENALISED:
        count = tl.load(counts + at, mask=inside, other=0).to(tl.int32)
        num_output = count & MAX_COUNT
        for place in tl.static_range(WIDTH - 1):
            again = (place < ahead) & (at == tl.load(draft + place)) & (num_output < MAX_COUNT)
            num_output += again.to(tl.int32)
        x = tl.where((count | num_output) != 0, tl.where(x > 0, x / repetition, x * repetition), x)
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
    logits, slots, int_params, float_params, counts, bias, bitmask, drafts, stats, candidates, size, bitmask_width,
    max_drafts, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    ahead = row % WIDTH
    slot = tl.load(slots + row // WIDTH).to(tl.int64)
    ints = int_params + slot * NUM_COLUMNS
    floats = float_params + slot * NUM_COLUMNS
    if ahead > tl.load(ints + NUM_DRAFTED):
        return
    flags = tl.load(ints + FLAGS).to(tl.int32)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = _processed(
        logits + row.to(tl.int64) * size, counts + slot * size, bias + slot * size, bitmask + slot * bitmask_width,
        drafts + slot * max_drafts, ahead, at, size, flags, tl.load(floats + PRESENCE), tl.load(floats + FREQUENCY),
        tl.load(floats + REPETITION), WIDTH,
    )  # fmt: skip
    largest = tl.max(x, 0)
    mine = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(stats + mine * NUM_STATS + MAX_LOGIT, largest)
    tl.store(candidates + mine * NUM_CANDIDATES + ARGMAX, tl.min(tl.where(x == largest, at, size), 0))
    if flags & RANDOM:
        scaled = (x - tl.maximum(largest, FLOAT32_MIN)) / tl.load(floats + TEMPERATURE)
        num_output_tokens = (tl.load(ints + NUM_OUTPUT_TOKENS) + ahead).to(tl.uint64)
        key = _mix64(_mix64(tl.load(ints + SEED).to(tl.uint64)) + num_output_tokens).to(tl.uint32)
        score = _gumbel_score(scaled, at, key)
        best_score = tl.max(score, 0)
        tl.store(stats + mine * NUM_STATS + MASS, tl.sum(tl.exp(scaled), 0))
        tl.store(stats + mine * NUM_STATS + MAX_SCORE, best_score)
        tl.store(candidates + mine * NUM_CANDIDATES + SAMPLED, tl.min(tl.where(score == best_score, at, size), 0))


@triton.jit
def _mass_of_top_k(
    logits, counts, bias, bitmask, draft, ahead, stats, size, flags, presence, frequency, repetition, largest,
    temperature, top_k, WIDTH: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
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
                x = _processed(
                    logits, counts, bias, bitmask, draft, ahead, at, size, flags, presence, frequency, repetition, WIDTH
                )  # fmt: skip
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
            x = _processed(
                    logits, counts, bias, bitmask, draft, ahead, at, size, flags, presence, frequency, repetition, WIDTH
                )  # fmt: skip
            scaled = (x - largest) / temperature
            mass += tl.where(scaled > low, tl.exp(scaled), 0.0)
    return tl.sum(mass, 0)


@triton.jit
def _sample_kernel(
    logits, slots, int_params, float_params, counts, bias, bitmask, drafts, stats, candidates, out, size, bitmask_width,
    max_drafts, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    ahead = row % WIDTH
    slot = tl.load(slots + row // WIDTH).to(tl.int64)
    ints = int_params + slot * NUM_COLUMNS
    floats = float_params + slot * NUM_COLUMNS
    if ahead > tl.load(ints + NUM_DRAFTED):
        return
    draft = drafts + slot * max_drafts
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
        num_output_tokens = (tl.load(ints + NUM_OUTPUT_TOKENS) + ahead).to(tl.uint64)
        key = _mix64(_mix64(tl.load(ints + SEED).to(tl.uint64)) + num_output_tokens).to(tl.uint32)
        place = tl.arange(0, BLOCK)

        below = (maxima - largest) / temperature
        total = tl.sum(tl.load(stats + block * NUM_STATS + MASS, mask=block < BLOCKS, other=0.0) * tl.exp(below), 0)
        scores = tl.load(stats + block * NUM_STATS + MAX_SCORE, mask=block < BLOCKS, other=-float("inf")) + below
        sampled = tl.load(candidates + block * NUM_CANDIDATES + SAMPLED, mask=block < BLOCKS, other=size)
        token = tl.min(tl.where(scores == tl.max(scores, 0), sampled, size), 0)

        if (top_k > 0) & (top_p < 1.0):  # top_p is a share of what top_k leaves
            total = _mass_of_top_k(
                logits, counts, bias, bitmask, draft, ahead, stats, size, flags, presence, frequency, repetition,
                largest, temperature, top_k, WIDTH, BLOCKS, BLOCK,
            )  # fmt: skip

        trying = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
        while trying:
            own = _processed(
                logits, counts, bias, bitmask, draft, ahead, token, size, flags, presence, frequency, repetition, WIDTH
            )  # fmt: skip
            floor = (own - largest) / temperature
            mass = tl.zeros([BLOCK], tl.float32)
            above = tl.zeros([BLOCK], tl.int32)
            best = tl.full([BLOCK], -float("inf"), tl.float32)
            index = tl.zeros([BLOCK], tl.int32)
            for number in range(BLOCKS):
                if (tl.load(stats + number * NUM_STATS + MAX_LOGIT) - largest) / temperature > floor:
                    at = number * BLOCK + place
                    x = _processed(
                    logits, counts, bias, bitmask, draft, ahead, at, size, flags, presence, frequency, repetition, WIDTH
                )  # fmt: skip
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


@triton.jit
def _latest_match(history, length, BLOCK: tl.constexpr):
    # Where the longest, and of these the latest, match of the text's last tokens ends, under its length; 0: nowhere.
    best = tl.zeros([BLOCK], tl.int32)
    newest = tl.load(history + length - 1)
    for begin in range(1, length - 1, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < length - 1
        same = inside & (tl.load(history + at, mask=inside, other=-1) == newest)
        matching = same.to(tl.int32)
        for back in tl.static_range(1, MOST):
            older = tl.load(history + length - 1 - back, mask=length > back, other=-2)
            same = same & (at >= back)
            same = same & (tl.load(history + at - back, mask=same, other=-1) == older)
            matching += same.to(tl.int32)
        best = tl.maximum(best, tl.where(matching >= LEAST, (matching << PLACE_BITS) | at, 0))
    return tl.max(best, 0)


@triton.jit
def _judged(rate, num_right, num_wanted, WIDTH: tl.constexpr):
    # The acceptance rate after one more draft, as in `speculation.History.judge`.
    for place in tl.static_range(WIDTH if WIDTH == 1 else WIDTH - 1):
        rate = tl.where(place < num_right, rate + NEWEST_WEIGHT * (1.0 - rate), rate)
    return tl.where(num_right < num_wanted, rate - NEWEST_WEIGHT * rate, rate)


@triton.jit
def _advance_kernel(
    sampled, slots, int_params, float_params, counts, drafts, history, out, size, max_drafts, max_history, spare_slot,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, DRAFTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program: one sequence. Its tokens are those that follow the right part of its draft; then the next draft of
    # at most DRAFTS tokens is looked up.
    sequence = tl.program_id(0)
    slot = tl.load(slots + sequence).to(tl.int64)
    ints = int_params + slot * NUM_COLUMNS
    rates = float_params + slot * NUM_COLUMNS + RATE
    counts += slot * size
    drafts += slot * max_drafts
    history += slot * max_history
    flags = tl.load(ints + FLAGS).to(tl.int32)
    guessed = tl.load(ints + NUM_DRAFTED).to(tl.int32)
    drafted = tl.minimum(guessed, WIDTH - 1)
    place = tl.arange(0, SPAN)
    tokens = tl.load(sampled + sequence * WIDTH + place, mask=place <= drafted, other=-1)
    guess = tl.load(drafts + place, mask=place < guessed, other=-2)
    right = (tokens == guess) & (place < guessed)
    accepted = tl.minimum(tl.min(tl.where(right, SPAN, place), 0), drafted)
    given = place <= accepted
    token = tl.sum(tl.where(place == accepted, tokens, 0), 0)
    mine = out + sequence * (OUT_TOKENS + WIDTH)
    tl.store(mine + OUT_DRAFTED, drafted.to(tl.int64))
    tl.store(mine + OUT_TOKENS + place, tl.where(given, tokens, -1), mask=place < WIDTH)
    prospect = 0.0
    if slot != spare_slot:
        num_output_tokens = tl.load(ints + NUM_OUTPUT_TOKENS) + 1 + accepted
        length = (tl.load(ints + LENGTH) + 1 + accepted).to(tl.int32)
        tl.store(ints + TOKEN, token)
        tl.store(ints + POSITION, tl.load(ints + POSITION) + 1 + accepted)
        tl.store(ints + NUM_OUTPUT_TOKENS, num_output_tokens)
        tl.store(ints + LENGTH, length.to(tl.int64))
        if flags & PENALISED:
            again = tl.sum(((tokens[:, None] == tokens[None, :]) & given[None, :]).to(tl.int32), 1)
            count = tl.load(counts + tokens, mask=given, other=0).to(tl.int32)
            count += tl.minimum(again, MAX_COUNT - (count & MAX_COUNT))
            tl.store(counts + tokens, count.to(tl.int16), mask=given)
        if DRAFTS > 0:
            there = length - 1 - accepted + place
            tl.store(history + there, tokens.to(tl.int32), mask=given & (there < max_history))
            tl.debug_barrier()
            count = 0
            if (flags & SPECULATIVE != 0) & (length <= max_history):
                found = _latest_match(history, length, BLOCK)
                start = (found & PLACE_MASK) + 1
                left = (tl.load(ints + MAX_TOKENS) - num_output_tokens - 1).to(tl.int32)
                count = tl.where(found > 0, tl.maximum(0, tl.minimum(DRAFTS, left)), 0)
                ahead = start + place % tl.maximum(length - start, 1)
                tl.store(drafts + place, tl.load(history + ahead, mask=place < count, other=0), mask=place < count)
            tl.store(ints + NUM_DRAFTED, count.to(tl.int64))
            num_right = tl.minimum(tl.min(tl.where(right, SPAN, place), 0), tl.maximum(drafted, 1))
            rate = _judged(tl.load(rates), num_right, tl.maximum(drafted, 1), WIDTH)
            tl.store(rates, rate)
            chance = rate
            for number in tl.static_range(DRAFTS):
                prospect += tl.where(number < count, chance, 0.0)
                chance = chance * rate
    tl.store(mine + OUT_PROSPECT, (prospect / PROSPECT_UNIT).to(tl.int64))


def sample(
    logits: Tensor,
    slots: Tensor,
    int_params: Tensor,
    float_params: Tensor,
    counts: Tensor,
    bias: Tensor,
    bitmask: Tensor,
    drafts: Tensor,
    block: int = 8192,
) -> Tensor:
    """Sample tokens for each of `slots` [sequences, int32], their sequence slots, from its logits.

    `logits` are [sequences x width, vocabulary], and so many tokens are returned: each sequence's next one, and those
    after each of its drafted tokens. The state of all slots is `int_params` and `float_params` [slots, NUM_COLUMNS],
    `counts` [slots, vocabulary, int16], `bias` [slots, vocabulary, float32], `bitmask` [slots, vocabulary / 32, int32]
    and `drafts` [slots, tokens, int32]; those after the first two are read where the slot's flags say so.
    """
    rows, size = logits.shape
    blocks, width = triton.cdiv(size, block), rows // len(slots)
    stats = torch.empty(rows, blocks, NUM_STATS.value, device=logits.device)
    candidates = torch.empty(rows, blocks, NUM_CANDIDATES.value, device=logits.device, dtype=torch.int32)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    state = (logits, slots, int_params, float_params, counts, bias, bitmask, drafts, stats, candidates)
    shape = size, bitmask.shape[1], drafts.shape[1]
    _scan_kernel[(rows, blocks)](*state, *shape, WIDTH=width, BLOCK=block, num_warps=8)
    _sample_kernel[(rows,)](
        *state, out, *shape, WIDTH=width, BLOCK=block, BLOCKS=blocks, SPAN=triton.next_power_of_2(blocks), num_warps=16
    )
    return out


def advance(
    sampled: Tensor,
    slots: Tensor,
    int_params: Tensor,
    float_params: Tensor,
    counts: Tensor,
    drafts: Tensor,
    history: Tensor,
    out: Tensor,
    *,
    drafting: bool,
    block: int = 1024,
) -> None:
    """Keep the tokens that `sample` returned as far as the drafts were right, and advance the slots' state.

    `out` [sequences, OUT_TOKENS + width] is what is read back. With `drafting`, `drafts` are looked up anew in
    `history` [slots, tokens, int32], the rows' texts. The last slot pads the batch and is not advanced.
    """
    width = out.shape[1] - OUT_TOKENS.value
    max_drafts = drafts.shape[1]
    _advance_kernel[(len(slots),)](
        sampled, slots, int_params, float_params, counts, drafts, history, out, counts.shape[1], max_drafts,
        history.shape[1], len(int_params) - 1, WIDTH=width, SPAN=triton.next_power_of_2(max(width, max_drafts)),
        DRAFTS=max_drafts if drafting else 0, BLOCK=block, num_warps=4,
    )  # fmt: skip


@triton.jit
def _place_kernel(
    slots, num_decodes, int_params, block_tables, drafts, ids, positions, kv_slots, seq_lens, num_drafted, max_blocks,
    max_drafts, spare_kv_slot, WIDTH: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    if sequence < tl.load(num_decodes):
        slot = tl.load(slots + sequence).to(tl.int64)
        ints = int_params + slot * NUM_COLUMNS
        drafted = tl.minimum(tl.load(ints + NUM_DRAFTED), WIDTH - 1).to(tl.int32)
        place = tl.arange(0, SPAN)
        real = place <= drafted
        draft = tl.load(drafts + slot * max_drafts + place - 1, mask=(place > 0) & real, other=0)
        first = tl.load(ints + POSITION)
        position = first + tl.where(real, place, 0)
        block = tl.load(block_tables + slot * max_blocks + position // PAGE)
        mine = sequence * WIDTH + place
        tl.store(ids + mine, tl.where(place == 0, tl.load(ints + TOKEN), draft.to(tl.int64)), mask=place < WIDTH)
        tl.store(positions + mine, position, mask=place < WIDTH)
        tl.store(kv_slots + mine, tl.where(real, block * PAGE + position % PAGE, spare_kv_slot), mask=place < WIDTH)
        tl.store(seq_lens + sequence, (first + 1).to(tl.int32) + drafted)
        tl.store(num_drafted + sequence, drafted)
    else:
        tl.store(seq_lens + sequence, 0)


def place_decodes(
    slots: Tensor,
    num_decodes: Tensor,
    int_params: Tensor,
    block_tables: Tensor,
    drafts: Tensor,
    ids: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    seq_lens: Tensor,
    num_drafted: Tensor,
    *,
    width: int,
    spare_kv_slot: int,
) -> None:
    """The newest tokens of the first `num_decodes` [1] of `slots`, each followed by its draft, with positions and KV
    slots, written to the first `ids`, `positions` and `kv_slots`: `width` for each sequence.

    What a draft lacks goes to `spare_kv_slot`. How many keys each sequence has is written to `seq_lens`, 0 for the rest
    of the slots, and how many tokens of its draft to `num_drafted`.
    """
    _place_kernel[(len(slots),)](
        slots, num_decodes, int_params, block_tables, drafts, ids, positions, kv_slots, seq_lens, num_drafted,
        block_tables.shape[1], drafts.shape[1], spare_kv_slot, WIDTH=width, SPAN=triton.next_power_of_2(width),
        num_warps=1,
    )  # fmt: skip
