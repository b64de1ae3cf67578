"""A decoder layer in nine kernels: the one of Llama, Mistral, Qwen2 and Qwen3, with its matrix products fused.

Replaces transformers' own layer and takes over its weights. The projections of queries, keys and values are one matrix
product, and so are gate and up; both residual sums are part of a product, and so is silu where there is a single token.
Other architectures keep their own layers and reach the KV cache through `attention.packed_attention`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from batching.packed.attention import AttentionMetadata

FUSABLE = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"})
"""Layers of exactly this form, by name: others look alike and differ in a factor."""


class FusedLayer(nn.Module):
    """`ops` is the module `triton_layer` or `reference` of this package."""

    def __init__(self, layer: Any, ops: Any) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self._ops = ops
        self._layer_index = int(attention.layer_idx)
        self._scale = float(attention.scaling)
        self._eps = float(layer.input_layernorm.variance_epsilon)
        self.input_norm = layer.input_layernorm.weight
        self.post_attention_norm = layer.post_attention_layernorm.weight
        self.qkv, self.qkv_bias = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o, self.o_bias = attention.o_proj.weight, attention.o_proj.bias
        self.gate_up, self.gate_up_bias = _joined(mlp.gate_proj, mlp.up_proj)
        self.down, self.down_bias = mlp.down_proj.weight, mlp.down_proj.bias
        self.q_norm = attention.q_norm.weight if hasattr(attention, "q_norm") else None
        self.k_norm = attention.k_norm.weight if hasattr(attention, "k_norm") else None

    def forward(
        self,
        hidden: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_metadata: AttentionMetadata,
        **_: Any,
    ) -> Tensor:
        """hidden [1, tokens, size], overwritten -> the same."""
        residual = hidden[0]
        metadata = attention_metadata
        k_cache, v_cache = metadata.kv_cache[self._layer_index]
        cos, sin = position_embeddings
        norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm, self._eps)
        x = self._ops.norm(residual, self.input_norm, self._eps)
        qkv = self._ops.product(x, self.qkv, self.qkv_bias)
        q = self._ops.rotate_and_store(qkv, cos[0], sin[0], norms, metadata.kv_slots, k_cache, v_cache)
        attended = metadata.attend(q, k_cache, v_cache, self._scale)
        self._ops.add_product(residual, attended.flatten(1), self.o, self.o_bias)
        x = self._ops.norm(residual, self.post_attention_norm, self._eps)
        x = self._ops.gated_product(x, self.gate_up, self.gate_up_bias)
        self._ops.add_product(residual, x, self.down, self.down_bias)
        return hidden


def _joined(*parts: nn.Linear) -> tuple[nn.Parameter, nn.Parameter | None]:
    weights: list[Tensor] = [part.weight for part in parts]
    biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
    bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    return nn.Parameter(torch.cat(weights), requires_grad=False), bias


def _fusable(layer: Any) -> bool:
    """Whether it has the right shape and plain weights; only their own modules can read quantised ones."""
    if type(layer).__name__ not in FUSABLE or not isinstance(layer.mlp.act_fn, _SILU):
        return False
    return all(type(part) is nn.Linear for part in [*_projections(layer.self_attn), *_projections(layer.mlp)])


def _projections(part: nn.Module) -> list[nn.Module]:
    return [child for name, child in part.named_children() if name.endswith("_proj")]


def fuse(model: PreTrainedModel, ops: Any) -> bool:
    """Replace the model's own layers by fused ones, if they have the right form; returns whether it did."""
    layers: Any = getattr(model.base_model, "layers", ())
    if not layers or not all(map(_fusable, layers)):
        return False
    for index in range(len(layers)):
        layers[index] = FusedLayer(layers[index], ops)  # one at a time: the weights are in memory twice for a moment
    return True


def _silu_types() -> tuple[type, ...]:
    from transformers.activations import ACT2FN

    return (nn.SiLU, type(ACT2FN["silu"]))


_SILU = _silu_types()
