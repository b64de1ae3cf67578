"""Attention of packed sequences over the KV cache, and how it gets into transformers' models.

Worker thread only. A forward pass has no padding: the tokens of all its sequences stand one after the other along one
axis, and `AttentionMetadata` travels with them through the model to say whose they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from batching.packed.kv_cache import BLOCK_SIZE

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Queries [tokens, heads, head size], keys and values [KV heads, KV slots, head size], scale -> like queries."""

NAME = "packed"
"""The name of this attention in transformers, which builds no mask for names that it does not know."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The tokens of a forward pass whose logits are wanted: their `places` [wanted], and how they attend by themselves.

    Of all others the last layer has to compute the keys and values alone.
    """

    places: Tensor
    attend: Attend


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """One forward pass: the `kv_slots` [tokens] of `kv_cache` that its keys and values go to, how tokens attend, and
    whose logits are wanted (None: all).

    `kv_cache` is [layers, 2, KV heads, KV slots, head size], keys first.
    """

    kv_cache: Tensor
    kv_slots: Tensor
    attend: Attend
    wanted: Wanted | None = None


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    *,
    attention_metadata: AttentionMetadata,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as `AttentionInterface` has it: query, key and value are [1, heads, tokens, head size]."""
    k_cache, v_cache = attention_metadata.kv_cache[module.layer_idx]
    k_cache.index_copy_(1, attention_metadata.kv_slots, key[0])
    v_cache.index_copy_(1, attention_metadata.kv_slots, value[0])
    out = attention_metadata.attend(query[0].transpose(0, 1).contiguous(), k_cache, v_cache, scaling)
    return out[None], None


AttentionInterface.register(NAME, packed_attention)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Neighbouring tokens of one sequence in a forward pass: a prefill chunk, or the one token of a decode step.

    There are `num_tokens` of them, after the `num_computed_tokens` whose keys and values the sequence has in its
    `blocks`.
    """

    blocks: Sequence[int]
    num_computed_tokens: int
    num_tokens: int

    @property
    def seq_len(self) -> int:
        """Tokens that the last one of the chunk attends to, itself included."""
        return self.num_computed_tokens + self.num_tokens

    def split(self, max_tokens: int) -> "list[Chunk]":
        """The same tokens in chunks of at most `max_tokens`."""
        ends = [*range(max_tokens, self.num_tokens, max_tokens), self.num_tokens]
        return [
            Chunk(self.blocks, self.num_computed_tokens + begin, end - begin)
            for begin, end in zip([0, *ends], ends, strict=False)
        ]

    def kv_slots(self) -> Tensor:
        """KV slots of all tokens that its last one attends to [seq_len]."""
        starts = torch.tensor(self.blocks[: -(-self.seq_len // BLOCK_SIZE)]) * BLOCK_SIZE
        return (starts[:, None] + torch.arange(BLOCK_SIZE)).flatten()[: self.seq_len]


class TorchAttention:
    """`Attend` chunk by chunk with torch's own attention, for machines without a GPU."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = chunks

    def __call__(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float) -> Tensor:
        if not self._chunks:
            return q
        parts = torch.split(q, [chunk.num_tokens for chunk in self._chunks])
        pairs = zip(self._chunks, parts, strict=True)
        return torch.cat([self._one(chunk, part, k_cache, v_cache, scale) for chunk, part in pairs])

    def _one(self, chunk: Chunk, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float) -> Tensor:
        past = chunk.num_computed_tokens
        kv_slots = chunk.kv_slots().to(q.device)
        mask = None
        if past and chunk.num_tokens > 1:
            mask = torch.ones(chunk.num_tokens, chunk.seq_len, dtype=torch.bool, device=q.device).tril(past)
        out = scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k_cache[None, :, kv_slots],
            v_cache[None, :, kv_slots],
            attn_mask=mask,
            is_causal=chunk.num_tokens > 1 and mask is None,
            scale=scale,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)
