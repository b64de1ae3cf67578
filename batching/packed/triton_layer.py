"""Triton kernels of a decoder layer: what lies between its matrix products, and the products of few tokens.

Worker thread only, CUDA only (or Triton's interpreter, in tests). `batching/packed/reference.py` has a twin of each,
written with torch, that says what it computes.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

HOPPER = 9
"""The compute capability of Hopper GPUs. From it on, a kernel can be launched before the one before it has ended."""


def overlap(device: torch.device) -> dict[str, bool]:
    """How to launch a kernel that calls `await_inputs`, whose stream's last work is a kernel: where the GPU can do it,
    while that still runs (NVIDIA's programmatic dependent launch)."""
    return {"OVERLAP": True, "launch_pdl": True} if capability(device) >= HOPPER else {"OVERLAP": False}


@cache
def capability(device: torch.device) -> int:
    """The major number of a GPU's compute capability; 0 for other devices."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


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


@triton.jit
def _few_kernel(
    x, weight, bias, out, partial, tokens, size, width,
    ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, SPLITS: tl.constexpr, ADD: tl.constexpr,
    BIAS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # One program: some outputs of all tokens, and its split's share of the inputs.
    await_inputs(OVERLAP)
    first = tl.program_id(0) * TILE
    split = tl.program_id(1)
    steps = tl.cdiv(width, DEPTH)
    share = tl.cdiv(steps, SPLITS)
    total = tl.zeros([TILE, ROWS], tl.float32)
    for step in range(split * share, tl.minimum(split * share + share, steps)):
        weights = weight.load([first, step * DEPTH])
        total = tl.dot(weights, x.load([0, step * DEPTH]).T, total)
    output = (first + tl.arange(0, TILE))[:, None]
    token = tl.arange(0, ROWS)[None, :]
    inside = (output < size) & (token < tokens)
    at = token * size + output
    if SPLITS > 1:
        tl.store(partial + split * tokens * size + at, total, mask=inside)
    else:
        if BIAS:
            total += tl.load(bias + output, mask=output < size, other=0.0).to(tl.float32)
        if ADD:
            total += tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_kernel(
    partial, bias, out, numbers, size,
    SPLITS: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    await_inputs(OVERLAP)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + split * numbers + at, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + at % size, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def add_up(partial: Tensor, bias: Tensor | None, out: Tensor, *, add: bool) -> None:
    """Write the sum of `partial` [splits, tokens, size] and the bias to out [tokens, size], or add it if `add`."""
    _sum_kernel[(triton.cdiv(out.numel(), 512),)](
        partial, out if bias is None else bias, out, out.numel(), out.shape[1],
        SPLITS=len(partial), ADD=add, BIAS=bias is not None, BLOCK=512, num_warps=4, **overlap(out.device),
    )  # fmt: skip


FEW_TOKENS = 64
"""Up to here the time of a product is that of reading the weights, which the kernel here does faster than cuBLAS."""

TILE, DEPTH = 64, 128
"""Outputs of a program, and inputs that it reads at a time."""

SPLITS = 3
"""Programs that share the inputs of products of few outputs, which alone would not keep a GPU reading."""


def reads_tiles(x: Tensor, weight: Tensor) -> bool:
    """Whether `few_product` takes these: of up to `FEW_TOKENS`, on Hopper, in rows that its bulk copies can read."""
    return (
        len(x) <= FEW_TOKENS
        and capability(x.device) == HOPPER
        and x.dtype.itemsize == 2
        and weight.shape[1] % 8 == 0
        and x.is_contiguous()
    )


def few_product(x: Tensor, weight: Tensor, bias: Tensor | None, total: Tensor | None = None) -> Tensor:
    """`product`, added to `total` [tokens, size] if there is one."""
    (tokens, width), size = x.shape, len(weight)
    out = x.new_empty(tokens, size) if total is None else total
    rows = max(16, triton.next_power_of_2(tokens))
    splits = SPLITS if size <= FEW_OUTPUTS else 1
    partial = x.new_empty(splits if splits > 1 else 0, tokens, size, dtype=torch.float32)
    flags = {"ADD": total is not None, "BIAS": bias is not None}
    _few_kernel[(triton.cdiv(size, TILE), splits)](
        TensorDescriptor.from_tensor(x, [rows, DEPTH]), TensorDescriptor.from_tensor(weight, [TILE, DEPTH]),
        out if bias is None else bias, out, partial, tokens, size, width,
        ROWS=rows, TILE=TILE, DEPTH=DEPTH, SPLITS=splits, **flags, num_warps=4, num_stages=4, **overlap(x.device),
    )  # fmt: skip
    if splits > 1:
        add_up(partial, bias, out, add=total is not None)
    return out


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [tokens, width] times the rows of weight [size, width], plus bias [size]."""
    if len(x) == 1:
        return _row(x, weight, bias, x.new_empty(1, len(weight)))
    return few_product(x, weight, bias) if reads_tiles(x, weight) else linear(x, weight, bias)


def add_product(total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Add the product to `total` [tokens, size]."""
    if len(x) == 1:
        _row(x, weight, bias, total, add=True)
    elif reads_tiles(x, weight):
        few_product(x, weight, bias, total)
    else:
        total.addmm_(x, weight.t())
        if bias is not None:
            total.add_(bias)


def gated_product(x: Tensor, pair: Tensor, bias: Tensor | None) -> Tensor:
    """silu(gate) x up, of the products of x with the two halves of pair [2 x size, width]."""
    if len(x) > 1:
        return silu_product(product(x, pair, bias))
    return _row(x, pair, bias, x.new_empty(1, len(pair) // 2), gated=True)
