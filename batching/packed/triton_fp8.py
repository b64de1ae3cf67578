"""Triton kernels for products in FP8: the inputs' rounding, and matrix products with a scale for every block.

Worker thread only, CUDA only (or Triton's interpreter, in tests). `batching/packed/reference.py` has their twins.
Products of many tokens are cuBLAS's where it has them with such scales: on Hopper.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from batching.packed.triton_layer import HOPPER, add_up, capability

SIZE = tl.constexpr(128)
"""Values that share a scale, `reference.BLOCK`."""

LARGEST = tl.constexpr(448.0)
LEAST_SCALE = tl.constexpr(1e-12)

FEW_TOKENS = 128
"""Up to here the time is that of reading the weights, in which the kernel here is faster than cuBLAS (an H100)."""

FEW_OUTPUTS = 4096
"""Up to here there are too few programs to keep a GPU reading: their inputs are split, and the sums added up."""


class Rounded(NamedTuple):
    """Inputs of a product: `values` [tokens, size] in FP8, to be multiplied by `scales` [tokens, size / 128].

    Both have rows for a multiple of 4 tokens, and the scales stand in memory transposed, because cuBLAS wants it so.
    """

    values: Tensor
    scales: Tensor
    num_tokens: int
    dtype: torch.dtype


def _empty(x: Tensor, size: int) -> Rounded:
    tokens = -(-len(x) // 4) * 4
    values = x.new_empty(tokens, size, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(size // SIZE.value, tokens, dtype=torch.float32)
    return Rounded(values, scales.t(), len(x), x.dtype)


@triton.jit
def _store(rounded, scales, stride, token, width, block, value):
    # Rows of 128 numbers, rounded each by its largest.
    scale = tl.maximum(tl.max(tl.abs(value), 1), LEAST_SCALE) / LARGEST
    inside = block < width // SIZE
    at = token * width + block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(rounded + at, (value / scale[:, None]).to(rounded.dtype.element_ty), mask=inside[:, None])
    tl.store(scales + block * stride + token, scale, mask=inside)


@triton.jit
def _round_kernel(x, rounded, scales, stride, width, BLOCKS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    value = tl.load(x + token * width + at, mask=at < width, other=0.0).to(tl.float32)
    _store(rounded, scales, stride, token, width, block, value)


BLOCKS = 8
"""Blocks that one program rounds."""


def rounded_inputs(x: Tensor) -> Rounded:
    """x [tokens, inputs], rounded."""
    out, width = _empty(x, x.shape[1]), x.shape[1]
    grid = (len(x), triton.cdiv(width, BLOCKS * SIZE.value))
    _round_kernel[grid](x, out.values, out.scales, out.scales.stride(1), width, BLOCKS=BLOCKS, num_warps=4)
    return out


@triton.jit
def _rounded_norm_kernel(x, weight, rounded, scales, stride, width, eps, BLOCKS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    at = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    value = tl.load(x + token * width + at, mask=at < width, other=0.0).to(tl.float32)
    scaled = (value * tl.rsqrt(tl.sum(value * value) / width + eps)).to(x.dtype.element_ty)
    normed = scaled * tl.load(weight + at, mask=at < width, other=0.0)
    _store(rounded, scales, stride, token, width, block, normed.to(tl.float32))


def rounded_norm(x: Tensor, weight: Tensor, eps: float) -> Rounded:
    """`triton_layer.norm` of x [tokens, size], rounded."""
    out, width = _empty(x, x.shape[1]), x.shape[1]
    blocks = triton.next_power_of_2(width // SIZE.value)
    _rounded_norm_kernel[(len(x),)](
        x, weight, out.values, out.scales, out.scales.stride(1), width, eps, BLOCKS=blocks, num_warps=4
    )
    return out


@triton.jit
def _rounded_silu_kernel(pair, rounded, scales, stride, width, BLOCKS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    gate = tl.load(pair + token * 2 * width + at, mask=at < width, other=0.0).to(tl.float32)
    up = tl.load(pair + token * 2 * width + width + at, mask=at < width, other=0.0)
    gated = (gate * tl.sigmoid(gate)).to(pair.dtype.element_ty) * up
    _store(rounded, scales, stride, token, width, block, gated.to(tl.float32))


def rounded_silu_product(pair: Tensor) -> Rounded:
    """`triton_layer.silu_product` of pair [tokens, 2 x size], rounded."""
    width = pair.shape[1] // 2
    out = _empty(pair, width)
    grid = (len(pair), triton.cdiv(width, BLOCKS * SIZE.value))
    _rounded_silu_kernel[grid](pair, out.values, out.scales, out.scales.stride(1), width, BLOCKS=BLOCKS, num_warps=4)
    return out


@triton.jit
def _product_kernel(
    x, x_scales, stride, weight, scales, bias, out, partial, tokens, outputs, width,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, SPLITS: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    # One program: some tokens, some outputs, and its split's share of the inputs.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(2)
    at = tl.arange(0, SIZE)
    blocks = width // SIZE
    share = tl.cdiv(blocks, SPLITS)
    x_at = x + row.to(tl.int64)[:, None] * width + at[None, :]
    weight_at = weight + output.to(tl.int64)[:, None] * width + at[None, :]
    is_row, is_output = row < tokens, output < outputs
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for block in range(split * share, tl.minimum(split * share + share, blocks)):
        values = tl.load(x_at + block * SIZE, mask=is_row[:, None], other=0.0)
        weights = tl.load(weight_at + block * SIZE, mask=is_output[:, None], other=0.0)
        x_scale = tl.load(x_scales + block * stride + row, mask=is_row, other=0.0)
        scale = tl.load(scales + (output // SIZE) * blocks + block, mask=is_output, other=0.0)
        total += tl.dot(values, tl.trans(weights)) * (x_scale[:, None] * scale[None, :])
    here = row.to(tl.int64)[:, None] * outputs + output[None, :]
    inside = is_row[:, None] & is_output[None, :]
    if SPLITS > 1:
        tl.store(partial + split.to(tl.int64) * tokens * outputs + here, total, mask=inside)
    else:
        if BIAS:
            total += tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
        if ADD:
            total += tl.load(out + here, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + here, total.to(out.dtype.element_ty), mask=inside)


def fp8_product(
    x: Tensor | Rounded, weight: Tensor, scales: Tensor, bias: Tensor | None, total: Tensor | None = None
) -> Tensor:
    """x [tokens, inputs], rounded to FP8, times the rows of the weight, plus bias; added to `total` if there is one."""
    rounded = rounded_inputs(x) if isinstance(x, Tensor) else x
    multiply = _cublas_product if _cublas_takes(rounded, weight) else _triton_product
    return multiply(rounded, weight, scales, bias, total)


def _triton_product(x: Rounded, weight: Tensor, scales: Tensor, bias: Tensor | None, total: Tensor | None) -> Tensor:
    tokens, outputs, width = x.num_tokens, len(weight), weight.shape[1]
    out = weight.new_empty(tokens, outputs, dtype=x.dtype) if total is None else total
    rows = min(64, max(16, triton.next_power_of_2(tokens)))
    columns = 32 if tokens <= 64 else 64 if tokens <= FEW_TOKENS else 128
    splits = 4 if outputs <= FEW_OUTPUTS and tokens <= FEW_TOKENS else 1
    partial = weight.new_empty(splits if splits > 1 else 0, tokens, outputs, dtype=torch.float32)
    flags = {"ADD": total is not None, "BIAS": bias is not None}
    _product_kernel[(triton.cdiv(tokens, rows), triton.cdiv(outputs, columns), splits)](
        x.values, x.scales, x.scales.stride(1), weight, scales, scales if bias is None else bias, out, partial,
        tokens, outputs, width,
        ROWS=rows, OUTPUTS=columns, SPLITS=splits, **flags, num_warps=4, num_stages=5 if columns == 32 else 4,
    )  # fmt: skip
    if splits > 1:
        add_up(partial, bias, out, add=total is not None)
    return out


def _cublas_product(x: Rounded, weight: Tensor, scales: Tensor, bias: Tensor | None, total: Tensor | None) -> Tensor:
    kinds = functional.ScalingType
    out = functional.scaled_mm(
        x.values, weight.t(), x.scales, kinds.BlockWise1x128, scales.t(), kinds.BlockWise128x128, output_dtype=x.dtype
    )[: x.num_tokens]
    if bias is not None:
        out.add_(bias)
    return out if total is None else total.add_(out)


def _cublas_takes(x: Rounded, weight: Tensor) -> bool:
    """Whether cuBLAS has this product and is faster: on Hopper, from CUDA 12.9, for sizes that need no padding."""
    outputs, width = weight.shape
    sizes = x.num_tokens > FEW_TOKENS and outputs % SIZE.value == 0 and width % (4 * SIZE.value) == 0
    return sizes and x.dtype == torch.bfloat16 and capability(weight.device) == HOPPER
