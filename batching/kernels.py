"""Triton kernels of the packed decode loop: what lies between a layer's matrix products, and decode attention.

Worker thread only, CUDA only (or Triton's interpreter, in tests). Each has a twin in `batching/reference.py`, written
with torch, that says what it computes.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm_kernel(x, weight, out, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * size
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / size + eps)
    scaled = (value * scale).to(out.dtype.element_ty)
    tl.store(out + row + at, scaled * tl.load(weight + at, mask=inside), mask=inside)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm (Zhang and Sennrich 2019) of each row of x [tokens, size]."""
    out = torch.empty_like(x)
    _norm_kernel[(x.shape[0],)](x, weight, out, x.shape[1], eps, BLOCK=triton.next_power_of_2(x.shape[1]), num_warps=4)
    return out


@triton.jit
def _silu_kernel(pair, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(pair + row * 2 * size + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(pair + row * 2 * size + size + at, mask=inside, other=0.0)
    gated = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty)
    tl.store(out + row * size + at, gated * up, mask=inside)


def silu_product(pair: Tensor) -> Tensor:
    """silu(gate) x up of [tokens, 2 x size], which holds gate and up side by side."""
    tokens, size = pair.shape[0], pair.shape[1] // 2
    out = pair.new_empty(tokens, size)
    block = 1024
    _silu_kernel[(tokens, triton.cdiv(size, block))](pair, out, size, BLOCK=block, num_warps=4)
    return out


@triton.jit
def _rotate_kernel(
    qkv, cos, sin, q_weight, k_weight, slots, q, k_pool, v_pool, head_stride, eps,
    KV_HEADS: tl.constexpr, Q_GROUPS: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    # One program: one token and as many heads as there are KV heads, of the queries, the keys or the values.
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    head = tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside = (head < KV_HEADS) & (at < SIZE)
    row = qkv + (token * (Q_GROUPS + 2) * KV_HEADS + group * KV_HEADS + head) * SIZE
    x = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
    slot = tl.load(slots + token).to(tl.int64)
    pooled = head.to(tl.int64) * head_stride + slot * SIZE + at
    if group == Q_GROUPS + 1:
        tl.store(v_pool + pooled, x.to(v_pool.dtype.element_ty), mask=inside)
    else:
        half = SIZE // 2
        partner = tl.where(at < half, at + half, at - half)
        y = tl.load(row + partner, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            scale = tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + eps)[:, None]
            weight = k_weight if group == Q_GROUPS else q_weight
            x = x * scale * tl.load(weight + at, mask=at < SIZE, other=0.0).to(tl.float32)
            y = y * scale * tl.load(weight + partner, mask=at < SIZE, other=0.0).to(tl.float32)
        angle = token * SIZE + at
        cosine = tl.load(cos + angle, mask=at < SIZE, other=0.0).to(tl.float32)
        sine = tl.load(sin + angle, mask=at < SIZE, other=0.0).to(tl.float32)
        turned = x * cosine + tl.where(at < half, -y, y) * sine
        if group == Q_GROUPS:
            tl.store(k_pool + pooled, turned.to(k_pool.dtype.element_ty), mask=inside)
        else:
            where = (token * Q_GROUPS * KV_HEADS + group * KV_HEADS + head) * SIZE + at
            tl.store(q + where, turned.to(q.dtype.element_ty), mask=inside)


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor, float] | None,
    slots: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of queries and keys [tokens, (heads + 2 x KV heads) x head size].

    `norms` are the weights and epsilon of the RMS norms that Qwen3 applies to each head before. Keys and values go to
    their `slots` [tokens] of the pools [KV heads, slots, head size]; the queries [tokens, heads, head size] are
    answered.
    """
    tokens = qkv.shape[0]
    kv_heads, _, size = k_pool.shape
    groups = qkv.shape[1] // (kv_heads * size) - 2
    q = qkv.new_empty(tokens, groups * kv_heads, size)
    q_weight, k_weight, eps = norms or (qkv, qkv, 0.0)
    _rotate_kernel[(tokens, groups + 2)](
        qkv, cos, sin, q_weight, k_weight, slots, q, k_pool, v_pool, k_pool.stride(0), eps,
        KV_HEADS=kv_heads, Q_GROUPS=groups, SIZE=size, HEADS=triton.next_power_of_2(kv_heads),
        BLOCK=triton.next_power_of_2(size), NORM=norms is not None, num_warps=4 if kv_heads > 4 else 1,
    )  # fmt: skip
    return q


@triton.jit
def _decode_kernel(
    q, k_pool, v_pool, out, partial, stats, arrived, starts, lengths, head_stride, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    # One program: one row, the query heads of one KV head, one split of the keys (Dao et al. 2023, Flash-Decoding).
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + row)
    share = tl.cdiv(tl.cdiv(length, SPLITS), KEYS) * KEYS
    first = split * share
    if first >= length:
        return
    last = tl.minimum(first + share, length)
    head = tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    key = tl.arange(0, KEYS)
    valid = (head < GROUP)[:, None] & (at < SIZE)[None, :]
    heads = (row * KV_HEADS + kv_head) * GROUP + head
    queries = tl.load(q + heads[:, None] * SIZE + at[None, :], mask=valid, other=0.0)
    base = kv_head.to(tl.int64) * head_stride + tl.load(starts + row).to(tl.int64) * SIZE
    most = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(first, last, KEYS):
        present = begin + key < last
        place = base + (begin + key)[:, None] * SIZE + at[None, :]
        wanted = present[:, None] & (at < SIZE)[None, :]
        keys = tl.load(k_pool + place, mask=wanted, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * (scale * 1.4426950408889634)
        scores = tl.where(present[None, :], scores, -float("inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(most - higher)
        values = tl.load(v_pool + place, mask=wanted, other=0.0)
        sums = sums * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        total = total * fade + tl.sum(weights, 1)
        most = higher
    used = tl.cdiv(length, share)
    if used == 1:
        result = (sums / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + heads[:, None] * SIZE + at[None, :], result, mask=valid)
    else:
        # The program that arrives last adds up all splits, in their order: the sum does not depend on who it is.
        pair = row * KV_HEADS + kv_head
        mine = (pair * SPLITS + split) * ROWS + head
        tl.store(partial + mine[:, None] * BLOCK + at[None, :], sums)
        tl.store(stats + mine * 2, most)
        tl.store(stats + mine * 2 + 1, total)
        tl.debug_barrier()
        if tl.atomic_add(arrived + pair, 1, sem="acq_rel") == used - 1:
            tl.debug_barrier()
            most = tl.full([ROWS], -float("inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            sums = tl.zeros([ROWS, BLOCK], tl.float32)
            for other in range(0, used):
                theirs = (pair * SPLITS + other) * ROWS + head
                their_most = tl.load(stats + theirs * 2, cache_modifier=".cg")
                higher = tl.maximum(most, their_most)
                fade = tl.exp2(most - higher)
                weight = tl.exp2(their_most - higher)
                part = tl.load(partial + theirs[:, None] * BLOCK + at[None, :], cache_modifier=".cg")
                sums = sums * fade[:, None] + part * weight[:, None]
                total = total * fade + tl.load(stats + theirs * 2 + 1, cache_modifier=".cg") * weight
                most = higher
            result = (sums / total[:, None]).to(out.dtype.element_ty)
            tl.store(out + heads[:, None] * SIZE + at[None, :], result, mask=valid)
            tl.store(arrived + pair, 0)


KEYS_A_BLOCK = 64
PROGRAMS = 256
"""How many programs decode attention is cut into where rows are few: two for each of a GPU's ~130 processors."""


@dataclass(frozen=True, slots=True)
class DecodeAttention:
    """Attention of one query token a row over the row's extent of the pools. Made once a number of rows.

    `starts` and `lengths` [rows, int32] are read at each call: the row's first slot, and how many slots count.
    """

    starts: Tensor
    lengths: Tensor
    partial: Tensor
    stats: Tensor
    arrived: Tensor
    splits: int

    @classmethod
    def of(
        cls, starts: Tensor, lengths: Tensor, kv_heads: int, group: int, size: int, splits: int | None = None
    ) -> "DecodeAttention":
        """Its scratch memory included. `splits`: how many programs share a row's keys; None: by the number of rows."""
        rows, device = len(starts), starts.device
        splits = splits or min(16, max(2, PROGRAMS // (rows * kv_heads)))
        parts = rows * kv_heads * splits, max(16, triton.next_power_of_2(group))
        return cls(
            starts,
            lengths,
            torch.empty(*parts, triton.next_power_of_2(size), device=device, dtype=torch.float32),
            torch.empty(*parts, 2, device=device, dtype=torch.float32),
            torch.zeros(rows * kv_heads, device=device, dtype=torch.int32),
            splits,
        )

    def __call__(self, q: Tensor, k_pool: Tensor, v_pool: Tensor, scale: float) -> Tensor:
        """Queries [rows, heads, head size], pools [KV heads, slots, head size] -> [rows, heads, head size]."""
        rows, heads, size = q.shape
        kv_heads = k_pool.shape[0]
        out = torch.empty_like(q)
        _decode_kernel[(rows, kv_heads, self.splits)](
            q, k_pool, v_pool, out, self.partial, self.stats, self.arrived, self.starts, self.lengths,
            k_pool.stride(0), scale,
            KV_HEADS=kv_heads, GROUP=heads // kv_heads, SIZE=size, ROWS=self.partial.shape[1],
            BLOCK=self.partial.shape[2], KEYS=KEYS_A_BLOCK, SPLITS=self.splits, num_warps=4, num_stages=3,
        )  # fmt: skip
        return out
