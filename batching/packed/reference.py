"""Torch twins of `batching/packed/triton_layer.py`: the reference for each kernel, and the code without a GPU."""

import torch
from torch import Tensor
from torch.nn.functional import linear, silu


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
    gate, up = linear(x, pair, bias).chunk(2, -1)
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
