"""Flash attention of packed rows over their extents of the pool, as Triton kernels: of pieces of prompts, and of steps.

Worker thread only, CUDA only (or Triton's interpreter, in tests); `attention.RowAttention` is their twin in torch.
Softmax is summed up block by block of keys as in Dao 2023 (FlashAttention-2); few rows have their keys split over many
programs, as in Dao et al. 2023 (Flash-Decoding).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

QUERIES = 64
"""Most queries that one program has, and so most tokens that a row of `PromptAttention` has."""

KEYS = 64
"""How many keys a program reads at a time where it has many queries."""

KEYS_OF_ONE = 32
"""And where it has those of one token."""

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(at, mask, ALL: tl.constexpr):
    if ALL:
        return tl.load(at)
    else:
        return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _add(scores, values, most, weight, sums):
    # One more block of keys: the largest scores so far, what the others weigh beside them, and their values' sums.
    higher = tl.maximum(most, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    fade = tl.exp2(most - higher)
    sums = tl.dot(weights.to(values.dtype), values, sums * fade[:, None], input_precision="ieee")
    return higher, weight * fade + tl.sum(weights, 1), sums


@triton.jit
def _prompt_kernel(
    q, k_pool, v_pool, out, bounds, starts, used, head_stride, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    # One program: one row's queries of one head. The last rows begin first: they have most keys to read.
    head = tl.program_id(0)
    row = tl.num_programs(1) - 1 - tl.program_id(1)
    first = tl.load(bounds + row)
    count = tl.load(bounds + row + 1) - first
    if count <= 0:
        return
    total = tl.load(used + row)
    before = total - count
    query = tl.arange(0, QUERIES)
    at = tl.arange(0, BLOCK)
    key = tl.arange(0, KEYS)
    inside = at < SIZE
    mine = ((first + query).to(tl.int64) * HEADS + head)[:, None] * SIZE + at[None, :]
    real = (query < count)[:, None] & inside[None, :]
    queries = tl.load(q + mine, mask=real, other=0.0)
    base = (head // GROUP).to(tl.int64) * head_stride + tl.load(starts + row).to(tl.int64) * SIZE
    k_block = k_pool + base + key[None, :] * SIZE + at[:, None]
    v_block = v_pool + base + key[:, None] * SIZE + at[None, :]
    factor = scale * LOG2_E
    most = tl.full([QUERIES], -float("inf"), tl.float32)
    weight = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, BLOCK], tl.float32)
    seen_by_all = (before + 1) // KEYS * KEYS
    for begin in range(0, seen_by_all, KEYS):
        keys = _load(k_block + begin * SIZE, inside[:, None], SIZE == BLOCK)
        scores = tl.dot(queries, keys, input_precision="ieee") * factor
        values = _load(v_block + begin * SIZE, inside[None, :], SIZE == BLOCK)
        most, weight, sums = _add(scores, values, most, weight, sums)
    for begin in range(seen_by_all, total, KEYS):
        there = begin + key < total
        keys = tl.load(k_block + begin * SIZE, mask=there[None, :] & inside[:, None], other=0.0)
        scores = tl.dot(queries, keys, input_precision="ieee") * factor
        scores = tl.where((begin + key)[None, :] <= (before + query)[:, None], scores, -float("inf"))
        values = tl.load(v_block + begin * SIZE, mask=there[:, None] & inside[None, :], other=0.0)
        most, weight, sums = _add(scores, values, most, weight, sums)
    tl.store(out + mine, (sums / weight[:, None]).to(out.dtype.element_ty), mask=real)


@dataclass(frozen=True, slots=True)
class PromptAttention:
    """`Attend` for pieces of prompts, all in one call; causal: a row's last query sees all its `used` keys.

    `bounds` [rows + 1], `starts` and `used` [rows], int32 on the device: where each row's queries begin in the pass, at
    most `QUERIES` of them; where its extent begins in the pool, and how many slots of that count. Read at each call.
    """

    bounds: Tensor
    starts: Tensor
    used: Tensor

    def __call__(self, q: Tensor, k_pool: Tensor, v_pool: Tensor, scale: float) -> Tensor:
        """See `Attend`."""
        _, heads, size = q.shape
        out = torch.empty_like(q)
        _prompt_kernel[(heads, len(self.starts))](
            q, k_pool, v_pool, out, self.bounds, self.starts, self.used, k_pool.stride(0), scale,
            HEADS=heads, GROUP=heads // k_pool.shape[0], SIZE=size, BLOCK=max(16, triton.next_power_of_2(size)),
            QUERIES=QUERIES, KEYS=KEYS, num_warps=4, num_stages=_stages(q),
        )  # fmt: skip
        return out


def _stages(q: Tensor) -> int:
    """How many blocks of keys and values are on their way at a time: as many as let a processor hold two programs."""
    if not q.is_cuda:
        return 1
    shared: int = torch.cuda.get_device_properties(q.device).shared_memory_per_multiprocessor
    block: int = 2 * KEYS * triton.next_power_of_2(q.shape[-1]) * q.element_size()
    return max(1, min(3, shared // 2 // block))


@triton.jit
def _joined(
    partial, stats, pair, used, at, few,
    SPLITS: tl.constexpr, FEW: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    # The splits of one row and KV head put together, in their order, whoever does it: [FEW, BLOCK].
    top = tl.full([FEW], -float("inf"), tl.float32)
    whole = tl.zeros([FEW], tl.float32)
    result = tl.zeros([FEW, BLOCK], tl.float32)
    for begin in range(0, used, AT_ONCE):
        other = begin + tl.arange(0, AT_ONCE)
        theirs = (pair * SPLITS + other[:, None]) * FEW + few[None, :]
        known = (other < used)[:, None]
        tops = tl.load(stats + theirs * 2, mask=known, other=-float("inf"), cache_modifier=".cg")
        wholes = tl.load(stats + theirs * 2 + 1, mask=known, other=0.0, cache_modifier=".cg")
        place = theirs[:, :, None] * BLOCK + at[None, None, :]
        parts = tl.load(partial + place, mask=known[:, :, None], other=0.0, cache_modifier=".cg")
        above = tl.maximum(top, tl.max(tops, 0))
        shares = tl.exp2(tops - above[None, :])
        fades = tl.exp2(top - above)
        whole = whole * fades + tl.sum(wholes * shares, 0)
        result = result * fades[:, None] + tl.sum(parts * shares[:, :, None], 0)
        top = above
    return result / whole[:, None]


@triton.jit
def _decode_kernel(
    q, k_pool, v_pool, out, partial, stats, arrived, starts, lengths, head_stride, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, FEW: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, LEAST: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    # One program: one row, the query heads of one KV head, one split of the keys, which are as many as LEAST allows and
    # SPLITS. There are FEW such heads, but a product needs ROWS.
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + row)
    splits = tl.minimum(tl.cdiv(length, LEAST), SPLITS)
    share = tl.cdiv(tl.cdiv(length, splits), KEYS) * KEYS
    first = split * share
    if first >= length:
        return
    last = tl.minimum(first + share, length)
    head = tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    key = tl.arange(0, KEYS)
    inside = at < SIZE
    real = (head < GROUP)[:, None] & inside[None, :]
    pair = row * KV_HEADS + kv_head
    mine = (pair * GROUP + head)[:, None] * SIZE + at[None, :]
    queries = tl.load(q + mine, mask=real, other=0.0)
    base = kv_head.to(tl.int64) * head_stride + tl.load(starts + row).to(tl.int64) * SIZE
    most = tl.full([ROWS], -float("inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(first, last, KEYS):
        there = begin + key < last
        place = base + (begin + key)[:, None] * SIZE + at[None, :]
        wanted = there[:, None] & inside[None, :]
        keys = tl.load(k_pool + place, mask=wanted, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * (scale * LOG2_E)
        scores = tl.where(there[None, :], scores, -float("inf"))
        values = tl.load(v_pool + place, mask=wanted, other=0.0)
        most, weight, sums = _add(scores, values, most, weight, sums)
    used = tl.cdiv(length, share)
    if used == 1:
        tl.store(out + mine, (sums / weight[:, None]).to(out.dtype.element_ty), mask=real)
    else:
        kept = (pair * SPLITS + split) * FEW + head
        tl.store(partial + kept[:, None] * BLOCK + at[None, :], sums, mask=(head < FEW)[:, None])
        tl.store(stats + kept * 2, most, mask=head < FEW)
        tl.store(stats + kept * 2 + 1, weight, mask=head < FEW)
        tl.debug_barrier()
        # The program that arrives last puts all splits together.
        if tl.atomic_add(arrived + pair, 1, sem="acq_rel") == used - 1:
            tl.debug_barrier()
            few = tl.arange(0, FEW)
            result = _joined(partial, stats, pair, used, at, few, SPLITS, FEW, BLOCK, AT_ONCE).to(out.dtype.element_ty)
            target = out + (pair * GROUP + few)[:, None] * SIZE + at[None, :]
            tl.store(target, result, mask=(few < GROUP)[:, None] & inside[None, :])
            tl.store(arrived + pair, 0)


@dataclass(frozen=True, slots=True)
class DecodeAttention:
    """`Attend` for a step: one query a row over the row's extent of the pool. Made once a number of rows.

    `starts` and `lengths` [rows, int32] are read at each call: the row's first slot, and how many slots count.
    """

    starts: Tensor
    lengths: Tensor
    partial: Tensor
    stats: Tensor
    arrived: Tensor
    splits: int
    least: int

    @classmethod
    def of(
        cls, starts: Tensor, lengths: Tensor, kv_heads: int, group: int, size: int, least: int | None = None
    ) -> "DecodeAttention":
        """Its scratch memory included. `least`: of how many keys a split is made; None: by the number of rows, so that
        few rows keep a GPU busy and a long row does not hold up many short ones."""
        rows, device = len(starts), starts.device
        least = least or min(1024, max(64, 4 * rows * kv_heads))
        splits = 16 if rows <= 16 else 8
        parts = rows * kv_heads * splits, triton.next_power_of_2(group)
        return cls(
            starts,
            lengths,
            torch.empty(*parts, triton.next_power_of_2(size), device=device, dtype=torch.float32),
            torch.empty(*parts, 2, device=device, dtype=torch.float32),
            torch.zeros(rows * kv_heads, device=device, dtype=torch.int32),
            splits,
            least,
        )

    def __call__(self, q: Tensor, k_pool: Tensor, v_pool: Tensor, scale: float) -> Tensor:
        """See `Attend`."""
        rows, heads, size = q.shape
        kv_heads, (few, block) = k_pool.shape[0], self.partial.shape[1:]
        held = max(1, 8192 // (few * block))  # sums of splits that fit into a program's registers
        out = torch.empty_like(q)
        _decode_kernel[(rows, kv_heads, self.splits)](
            q, k_pool, v_pool, out, self.partial, self.stats, self.arrived, self.starts, self.lengths,
            k_pool.stride(0), scale,
            KV_HEADS=kv_heads, GROUP=heads // kv_heads, SIZE=size, ROWS=max(16, few), FEW=few, BLOCK=block,
            KEYS=KEYS_OF_ONE, LEAST=self.least, SPLITS=self.splits, AT_ONCE=min(self.splits, held), num_warps=2,
            num_stages=_stages(q),
        )  # fmt: skip
        return out
