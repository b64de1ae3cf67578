"""torch's flash attention over rows of variable length that lie anywhere in a pool. CUDA only.

torch 2.13 has it as a public function; before that only the operator below it takes `seqused_k`, without which rows
would have to lie one right after the other.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

Flash = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor], tuple[int, int], float], Tensor]
"""Queries [tokens, heads, head size], keys and values [slots, KV heads, head size], (bounds [rows + 1] of the rows'
queries, starts [rows + 1] of their keys, used [rows] keys), all int32, (most queries, most keys) of a row, scale."""

_NEEDED = {"seqused_k", "window_size", "enable_gqa", "scale"}
PUBLIC = inspect.signature(varlen_attn).parameters.keys() >= _NEEDED
"""Whether this torch's public function can do it."""


def _public(
    q: Tensor, k: Tensor, v: Tensor, where: tuple[Tensor, Tensor, Tensor], longest: tuple[int, int], scale: float
) -> Tensor:
    bounds, starts, used = where
    out = varlen_attn(
        q, k, v, bounds, starts, *longest, scale=scale, window_size=(-1, 0), enable_gqa=True, seqused_k=used
    )
    assert isinstance(out, Tensor)
    return out


def _operator(
    q: Tensor, k: Tensor, v: Tensor, where: tuple[Tensor, Tensor, Tensor], longest: tuple[int, int], scale: float
) -> Tensor:
    bounds, starts, used = where
    found = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, starts, *longest, 0.0, True, False, scale=scale, seqused_k=used
    )
    out: Tensor = found[0]
    return out


flash: Flash = _public if PUBLIC else _operator
"""Causal: a row's last query sees all its `used` keys, the one before it one less."""
