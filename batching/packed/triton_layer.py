"""Triton kernels of a decoder layer: what lies between its matrix products, and the products of a single token.

Worker thread only, CUDA only (or Triton's interpreter, in tests). `batching/packed/reference.py` has a twin of each,
written with torch, that says what it computes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

HOPPER = 9
"""The compute capability of Hopper GPUs. From it on, a kernel can be launched before the one before it has ended."""


def overlap(device: torch.device) -> dict[str, bool]:
    """How to launch a kernel that calls `await_inputs`, whose stream's last work is a kernel: where the GPU can do it,
    while that still runs (NVIDIA's programmatic dependent launch)."""
    can = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= HOPPER
    return {"OVERLAP": True, "launch_pdl": True} if can else {"OVERLAP": False}


@triton.jit
def await_inputs(OVERLAP: tl.constexpr):
    # Before a kernel reads or writes anything: wait for what the one before has written, let the next one be launched.
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _norm_kernel(x, weight, out, size, eps, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    await_inputs(OVERLAP)
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
    tokens, size = x.shape
    _norm_kernel[(tokens,)](
        x, weight, out, size, eps, BLOCK=triton.next_power_of_2(size), num_warps=4, **overlap(x.device)
    )
    return out


@triton.jit
def _rotate_kernel(
    qkv, cos, sin, q_weight, k_weight, kv_slots, q, k_cache, v_cache, head_stride, eps,
    KV_HEADS: tl.constexpr, Q_GROUPS: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # One program: one token and as many heads as there are KV heads, of the queries, the keys or the values.
    await_inputs(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    head = tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside = (head < KV_HEADS) & (at < SIZE)
    row = qkv + (token * (Q_GROUPS + 2) * KV_HEADS + group * KV_HEADS + head) * SIZE
    x = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
    kv_slot = tl.load(kv_slots + token).to(tl.int64)
    target = head.to(tl.int64) * head_stride + kv_slot * SIZE + at
    if group == Q_GROUPS + 1:
        tl.store(v_cache + target, x.to(v_cache.dtype.element_ty), mask=inside)
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
        rotated = x * cosine + tl.where(at < half, -y, y) * sine
        if group == Q_GROUPS:
            tl.store(k_cache + target, rotated.to(k_cache.dtype.element_ty), mask=inside)
        else:
            where = (token * Q_GROUPS * KV_HEADS + group * KV_HEADS + head) * SIZE + at
            tl.store(q + where, rotated.to(q.dtype.element_ty), mask=inside)


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor, float] | None,
    kv_slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of queries and keys [tokens, (heads + 2 x KV heads) x head size].

    `norms` are the weights and epsilon of the RMS norms that Qwen3 applies to each head before. Keys and values go to
    their `kv_slots` [tokens] of the caches [KV heads, KV slots, head size]. Returns the queries [tokens, heads, head
    size].
    """
    tokens = qkv.shape[0]
    kv_heads, _, size = k_cache.shape
    groups = qkv.shape[1] // (kv_heads * size) - 2
    q = qkv.new_empty(tokens, groups * kv_heads, size)
    q_weight, k_weight, eps = norms or (qkv, qkv, 0.0)
    _rotate_kernel[(tokens, groups + 2)](
        qkv, cos, sin, q_weight, k_weight, kv_slots, q, k_cache, v_cache, k_cache.stride(0), eps,
        KV_HEADS=kv_heads, Q_GROUPS=groups, SIZE=size, HEADS=triton.next_power_of_2(kv_heads),
        BLOCK=triton.next_power_of_2(size), NORM=norms is not None, num_warps=4 if kv_heads > 4 else 1,
        **overlap(qkv.device),
    )  # fmt: skip
    return q


@triton.jit
def _silu_kernel(pair, out, size, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    await_inputs(OVERLAP)
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
    _silu_kernel[(tokens, triton.cdiv(size, block))](pair, out, size, BLOCK=block, num_warps=4, **overlap(pair.device))
    return out


@triton.jit
def _load(at, mask, ALL: tl.constexpr):
    # Weights are read once a step: evict them first, so that they do not displace lines that are reused.
    if ALL:
        return tl.load(at, eviction_policy="evict_first").to(tl.float32)
    else:
        return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _row_kernel(
    x, weight, bias, out, size, width,
    GATED: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # One program: some of the outputs, each the product of a row of the weight with x.
    await_inputs(OVERLAP)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    at = tl.arange(0, BLOCK)
    there = output < size
    row = weight + output.to(tl.int64)[:, None] * width + at[None, :]
    up_row = row + size.to(tl.int64) * width
    total = tl.zeros([OUTPUTS, BLOCK], tl.float32)
    up_total = tl.zeros([OUTPUTS, BLOCK], tl.float32)
    for begin in range(0, width, BLOCK):
        inside = begin + at < width
        value = _load(x + begin + at, inside, EVEN)[None, :]
        total += _load(row + begin, there[:, None] & inside[None, :], EVEN) * value
        if GATED:
            up_total += _load(up_row + begin, there[:, None] & inside[None, :], EVEN) * value
    result = tl.sum(total, 1)
    if BIAS:
        result += tl.load(bias + output, mask=there, other=0.0).to(tl.float32)
    if ADD:
        result += tl.load(out + output, mask=there, other=0.0).to(tl.float32)
    if GATED:
        gate = result.to(out.dtype.element_ty).to(tl.float32)
        result = tl.sum(up_total, 1)
        if BIAS:
            result += tl.load(bias + size + output, mask=there, other=0.0).to(tl.float32)
        result = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty) * result.to(out.dtype.element_ty)
    tl.store(out + output, result.to(out.dtype.element_ty), mask=there)


OUTPUTS = 2
"""Outputs that one program computes of a single token's product."""

WIDTH = 512
"""Inputs that it reads at a time."""

FEW_OUTPUTS = 4096
"""Up to here each program reads twice as much at a time, by twice as many warps, or they would not keep memory busy."""


def _row(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, gated: bool = False, add: bool = False
) -> Tensor:
    size, width = out.shape[1], x.shape[1]
    times = 2 if size <= FEW_OUTPUTS else 1
    block = times * WIDTH
    _row_kernel[(triton.cdiv(size, OUTPUTS),)](
        x, weight, weight if bias is None else bias, out, size, width,
        GATED=gated, ADD=add, BIAS=bias is not None, EVEN=size % OUTPUTS == 0 and width % block == 0, OUTPUTS=OUTPUTS,
        BLOCK=block, num_warps=2 * times, **overlap(x.device),
    )  # fmt: skip
    return out


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [tokens, width] times the rows of weight [size, width], plus bias [size]."""
    if len(x) > 1:
        return linear(x, weight, bias)
    return _row(x, weight, bias, x.new_empty(1, len(weight)))


def add_product(total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Add the product to `total` [tokens, size]."""
    if len(x) == 1:
        _row(x, weight, bias, total, add=True)
        return
    total.addmm_(x, weight.t())
    if bias is not None:
        total.add_(bias)


def gated_product(x: Tensor, pair: Tensor, bias: Tensor | None) -> Tensor:
    """silu(gate) x up, of the products of x with the two halves of pair [2 x size, width]."""
    if len(x) > 1:
        return silu_product(linear(x, pair, bias))
    return _row(x, pair, bias, x.new_empty(1, len(pair) // 2), gated=True)
