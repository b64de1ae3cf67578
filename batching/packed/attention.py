"""Attention of packed rows over their extents of the pool, and how it gets into transformers' models.

Worker thread only. A pass has no padding: the tokens of all its rows stand one after the other along one axis, and
`Work` travels with them through the model to say whose they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Queries [tokens, heads, head size], pools of keys and values [KV heads, slots, head size], scale -> like queries."""

NAME = "packed"
"""What models know this attention by. It has no mask, and transformers makes none for a name that is not its own."""


@dataclass(frozen=True, slots=True)
class Work:
    """One pass: where its tokens' keys and values go (`slots` [tokens] of `memory`), and how they attend.

    `memory` is [layers, 2, KV heads, slots, head size], keys first.
    """

    memory: Tensor
    slots: Tensor
    attend: Attend


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, *, work: Work, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention as `AttentionInterface` has it: query, key and value are [1, heads, tokens, head size]."""
    k_pool, v_pool = work.memory[module.layer_idx]
    k_pool.index_copy_(1, work.slots, key[0])
    v_pool.index_copy_(1, work.slots, value[0])
    out = work.attend(query[0].transpose(0, 1).contiguous(), k_pool, v_pool, scaling)
    return out[None], None


AttentionInterface.register(NAME, packed_attention)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some neighbouring tokens of one row in a pass: `count` of them, after `done` that its extent at `start` holds."""

    start: int
    done: int
    count: int

    @property
    def used(self) -> int:
        """Slots of the extent that count for the last of these tokens."""
        return self.done + self.count

    def cut(self, most: int) -> "list[Piece]":
        """The same tokens in pieces of at most so many."""
        ends = [*range(most, self.count, most), self.count]
        return [Piece(self.start, self.done + begin, end - begin) for begin, end in zip([0, *ends], ends, strict=False)]


class RowAttention:
    """`Attend` row by row with torch's own attention: what runs where there is no GPU."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces

    def __call__(self, q: Tensor, k_pool: Tensor, v_pool: Tensor, scale: float) -> Tensor:
        """See `Attend`."""
        parts = torch.split(q, [piece.count for piece in self._pieces])
        pairs = zip(self._pieces, parts, strict=True)
        return torch.cat([self._one(piece, part, k_pool, v_pool, scale) for piece, part in pairs])

    def _one(self, piece: Piece, q: Tensor, k_pool: Tensor, v_pool: Tensor, scale: float) -> Tensor:
        extent = slice(piece.start, piece.start + piece.used)
        mask = None
        if piece.done and piece.count > 1:
            mask = torch.ones(piece.count, piece.used, dtype=torch.bool, device=q.device).tril(piece.done)
        out = scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k_pool[None, :, extent],
            v_pool[None, :, extent],
            attn_mask=mask,
            is_causal=piece.count > 1 and mask is None,
            scale=scale,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)
