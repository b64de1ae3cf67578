"""Torch twins of `triton_layer` and `triton_fp8` in this package: the reference for each kernel, and the code without a
GPU."""

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

FP8 = torch.float8_e4m3fn
BLOCK = 128
"""Numbers of a token that share a scale; and outputs of a weight that do, by as many inputs."""

LARGEST = torch.finfo(FP8).max
LEAST_SCALE = 1e-12
"""Of numbers that are all 0."""


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm (Zhang and Sennrich 2019) of x [..., size], computed in float32."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [tokens, width] times the rows of weight [size, width], plus bias [size]."""
    return linear(x, weight, bias)


def add_product(total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Add the product to `total` [tokens, size]."""
    total.addmm_(x, weight.t())
    if bias is not None:
        total.add_(bias)


def gated_product(x: Tensor, pair: Tensor, bias: Tensor | None) -> Tensor:
    """silu(gate) x up, of the products of x with the two halves of pair [2 x size, width]."""
    return silu_product(linear(x, pair, bias))


def silu_product(pair: Tensor) -> Tensor:
    """silu(gate) x up of [tokens, 2 x size], which holds gate and up side by side."""
    gate, up = pair.chunk(2, -1)
    return silu(gate) * up


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor, float] | None,
    kv_slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """Rotary position embedding, and keys and values stored: shapes as in `triton_layer.rotate_and_store`."""
    kv_heads, _, size = k_cache.shape
    heads = qkv.view(len(qkv), -1, size)
    q, k, v = torch.split(heads, [heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
    if norms:
        q, k = norm(q, norms[0], norms[2]), norm(k, norms[1], norms[2])
    k_cache[:, kv_slots] = _rotate(k, cos, sin).transpose(0, 1)
    v_cache[:, kv_slots] = v.transpose(0, 1)
    return _rotate(q, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]


def rounded_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [tokens, inputs] in FP8, and the scales [tokens, inputs / 128] to multiply it by."""
    blocks = x.float().view(len(x), -1, BLOCK)
    scales = blocks.abs().amax(-1).clamp(min=LEAST_SCALE) / LARGEST
    return (blocks / scales[..., None]).to(FP8).view(x.shape), scales


def rounded_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm as `fp8_product` takes it: here it is rounded there."""
    return norm(x, weight, eps)


def rounded_silu_product(pair: Tensor) -> Tensor:
    """`silu_product` as `fp8_product` takes it: here it is rounded there."""
    return silu_product(pair)


def fp8_product(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, total: Tensor | None = None) -> Tensor:
    """x [tokens, inputs], rounded to FP8, times the rows of the weight, plus bias; added to `total` if there is one.

    The weight [outputs, inputs] has scales [outputs / 128, inputs / 128], rounded up. Computed in float32.
    """
    rounded, x_scales = rounded_inputs(x)
    wide = (rounded.float().view(len(x), -1, BLOCK) * x_scales[..., None]).view(x.shape)
    by_number = scales.repeat_interleave(BLOCK, 0)[: len(weight)].repeat_interleave(BLOCK, 1)
    result = linear(wide, weight.float() * by_number, None if bias is None else bias.float())
    return result.to(x.dtype) if total is None else total.add_(result)
