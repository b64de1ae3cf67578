"""A decoder layer in nine kernels: the one of Llama, Mistral, Qwen2 and Qwen3, with its products fused.

Takes the place of transformers' own layer, whose weights it takes over. What queries, keys and values need, and what
gate and up need, is one matrix product each; both sums with the residual are part of a product, and so is silu where
there is a single token. Other architectures keep their own layers and come to the pool through
`attention.packed_attention`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from batching.packed.attention import Work

FUSABLE = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"})
"""Layers of this very form, by name: others look alike and differ in a factor."""


class FusedLayer(nn.Module):
    """`ops` is `batching.packed.triton_layer` or `batching.packed.reference`."""

    def __init__(self, layer: Any, ops: Any) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self._ops = ops
        self._index = int(attention.layer_idx)
        self._scale = float(attention.scaling)
        self._eps = float(layer.input_layernorm.variance_epsilon)
        self.before = layer.input_layernorm.weight
        self.between = layer.post_attention_layernorm.weight
        self.qkv, self.qkv_bias = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o, self.o_bias = attention.o_proj.weight, attention.o_proj.bias
        self.pair, self.pair_bias = _joined(mlp.gate_proj, mlp.up_proj)
        self.down, self.down_bias = mlp.down_proj.weight, mlp.down_proj.bias
        self.q_norm = attention.q_norm.weight if hasattr(attention, "q_norm") else None
        self.k_norm = attention.k_norm.weight if hasattr(attention, "k_norm") else None

    def forward(self, hidden: Tensor, *, position_embeddings: tuple[Tensor, Tensor], work: Work, **_: Any) -> Tensor:
        """hidden [1, tokens, size], written over -> the same."""
        residual = hidden[0]
        k_pool, v_pool = work.memory[self._index]
        cos, sin = position_embeddings
        norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm, self._eps)
        x = self._ops.norm(residual, self.before, self._eps)
        qkv = self._ops.product(x, self.qkv, self.qkv_bias)
        q = self._ops.rotate_and_store(qkv, cos[0], sin[0], norms, work.slots, k_pool, v_pool)
        attended = work.attend(q, k_pool, v_pool, self._scale)
        self._ops.add_product(residual, attended.flatten(1), self.o, self.o_bias)
        x = self._ops.norm(residual, self.between, self._eps)
        x = self._ops.gated_product(x, self.pair, self.pair_bias)
        self._ops.add_product(residual, x, self.down, self.down_bias)
        return hidden


def _joined(*parts: nn.Linear) -> tuple[nn.Parameter, nn.Parameter | None]:
    weights: list[Tensor] = [part.weight for part in parts]
    biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
    bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    return nn.Parameter(torch.cat(weights), requires_grad=False), bias


def fuse(model: PreTrainedModel, ops: Any) -> bool:
    """Put fused layers in place of the model's own, if they are of the form; says whether it did."""
    layers: Any = model.base_model.layers
    if not all(type(layer).__name__ in FUSABLE and isinstance(layer.mlp.act_fn, _SILU) for layer in layers):
        return False
    for place in range(len(layers)):
        layers[place] = FusedLayer(layers[place], ops)  # one at a time: the weights are in memory twice for a moment
    return True


def _silu_types() -> tuple[type, ...]:
    from transformers.activations import ACT2FN

    return (nn.SiLU, type(ACT2FN["silu"]))


_SILU = _silu_types()
