"""A decoder layer in nine kernels: the one of Llama, Mistral, Qwen2 and Qwen3, with its matrix products fused.

Replaces transformers' own layer and takes over its weights. The projections of queries, keys and values are one matrix
product, and so are gate and up; both residual sums are part of a product, and so is silu where there is a single token.
The norm and the product that follow the last layer are replaced too.
Other architectures keep their own layers and reach the KV cache through `attention.packed_attention`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from batching.fp8 import FP8Linear
from batching.packed import reference
from batching.packed.attention import AttentionMetadata

FUSABLE = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"})
"""Layers of exactly this form, by name: others look alike and differ in a factor."""

SILU = (nn.SiLU, type(ACT2FN["silu"]))

MLP_TOKENS = 4096
"""Tokens that a layer's MLP computes at a time: enough to keep the matrix units busy, and gate and up of all tokens of
a long prompt would take most of a forward pass's memory."""


class FusedLayer(nn.Module):
    """`ops` is the module `triton_layer` or `reference` of this package."""

    def __init__(self, layer: Any, ops: Any, *, is_last: bool = False) -> None:
        super().__init__()
        self._is_last = is_last
        attention, mlp = layer.self_attn, layer.mlp
        self._ops = ops
        self._layer_index = int(attention.layer_idx)
        self._scale = float(attention.scaling)
        self._eps = float(layer.input_layernorm.variance_epsilon)
        self.input_norm = layer.input_layernorm.weight
        self.post_attention_norm = layer.post_attention_layernorm.weight
        self.qkv = _joined(ops, attention.q_proj, attention.k_proj, attention.v_proj)
        self.o = _joined(ops, attention.o_proj)
        self.gate_up = _joined(ops, mlp.gate_proj, mlp.up_proj)
        self.down = _joined(ops, mlp.down_proj)
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
        """hidden [1, tokens, size], overwritten -> the same; of the last layer only the wanted tokens."""
        residual = self._attended(hidden[0], position_embeddings, attention_metadata)
        for some in torch.split(residual, MLP_TOKENS):
            x = self.gate_up.norm(some, self.post_attention_norm, self._eps)
            self.down.add_product(some, self.gate_up.gated_product(x))
        return residual[None]

    def _attended(
        self, residual: Tensor, position_embeddings: tuple[Tensor, Tensor], metadata: AttentionMetadata
    ) -> Tensor:
        """residual [tokens, size] with attention added; of the last layer only the wanted tokens."""
        attend = metadata.attend
        k_cache, v_cache = metadata.kv_cache[self._layer_index]
        cos, sin = position_embeddings
        norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm, self._eps)
        qkv = self.qkv.product(self.qkv.norm(residual, self.input_norm, self._eps))
        q = self._ops.rotate_and_store(qkv, cos[0], sin[0], norms, metadata.kv_slots, k_cache, v_cache)
        if self._is_last and metadata.wanted:
            places, attend = metadata.wanted.places, metadata.wanted.attend
            residual, q = residual[places], q[places]
        attended = attend(q, k_cache, v_cache, self._scale)
        self.o.add_product(residual, attended.flatten(1))
        return residual


class Projection(nn.Module):
    """Linear layers joined into one, with the weights that they had."""

    def __init__(self, ops: Any, parts: Sequence[nn.Linear]) -> None:
        super().__init__()
        self._ops = ops
        biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
        self.weight = nn.Parameter(_cat([part.weight for part in parts]), requires_grad=False)
        self.bias = nn.Parameter(_cat(biases), requires_grad=False) if biases else None

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Any:
        """RMS norm of x [tokens, inputs], in the form that the products take."""
        return self._ops.norm(x, weight, eps)

    def product(self, x: Any) -> Tensor:
        """x [tokens, inputs] -> [tokens, outputs]."""
        out: Tensor = self._ops.product(x, self.weight, self.bias)
        return out

    def add_product(self, total: Tensor, x: Any) -> None:
        """Add the product to `total` [tokens, outputs]."""
        self._ops.add_product(total, x, self.weight, self.bias)

    def gated_product(self, x: Any) -> Any:
        """silu(gate) x up, of the two halves of the product, in the form that another product takes."""
        return self._ops.gated_product(x, self.weight, self.bias)


class FP8Projection(nn.Module):
    """The same of layers in FP8: what products take was rounded by the kernel that computed it, on a GPU."""

    def __init__(self, parts: Sequence[FP8Linear]) -> None:
        super().__init__()
        self.layer = FP8Linear.joined(parts)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Any:
        return self.layer.ops.rounded_norm(x, weight, eps)

    def product(self, x: Any) -> Tensor:
        return self.layer.product(x)

    def add_product(self, total: Tensor, x: Any) -> None:
        self.layer.add_product(total, x)

    def gated_product(self, x: Any) -> Any:
        return self.layer.ops.rounded_silu_product(self.layer.product(x))


class FinalNorm(nn.Module):
    """The norm after the last layer, in one kernel."""

    def __init__(self, norm: Any, ops: Any) -> None:
        super().__init__()
        self._ops = ops
        self._eps = float(norm.variance_epsilon)
        self.weight = norm.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [1, tokens, size] -> the same."""
        out: Tensor = self._ops.norm(hidden[0], self.weight, self._eps)
        return out[None]


class Head(nn.Module):
    """The product that makes logits, by what is fastest for a single token."""

    def __init__(self, head: nn.Linear, ops: Any) -> None:
        super().__init__()
        self._ops = ops
        self.weight, self.bias = head.weight, head.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [1, tokens, size] -> logits [1, tokens, vocabulary]."""
        out: Tensor = self._ops.product(hidden[0], self.weight, self.bias)
        return out[None]


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _joined(ops: Any, *parts: Any) -> Projection | FP8Projection:
    return FP8Projection(parts) if isinstance(parts[0], FP8Linear) else Projection(ops, parts)


def _fusable(layer: Any) -> bool:
    """Whether it has the right shape, and weights that can be joined; other quantised ones only their modules read."""
    if type(layer).__name__ not in FUSABLE or not isinstance(layer.mlp.act_fn, SILU):
        return False
    parts: list[Any] = [*_projections(layer.self_attn), *_projections(layer.mlp)]
    return all(map(_is_plain, parts)) or all(map(_is_joinable_fp8, parts))


def _is_plain(part: Any) -> bool:
    """Whether its weight and bias are all there is to it: some quantisers leave the class and replace the method."""
    weight = getattr(part, "weight", None)  # packed ones have another name until they are widened
    whole = type(part) is nn.Linear and type(weight) is nn.Parameter and weight.is_floating_point()
    return whole and ("forward" not in vars(part) or _is_weight_only(part))


def _is_weight_only(part: Any) -> bool:
    """Whether compressed-tensors, which has widened the weight by now, rounds neither inputs nor outputs."""
    scheme = getattr(part, "quantization_scheme", None)
    return scheme is not None and scheme.input_activations is None and scheme.output_activations is None


def _is_joinable_fp8(part: Any) -> bool:
    return isinstance(part, FP8Linear) and len(part.weight) % reference.BLOCK == 0


def _projections(part: nn.Module) -> list[nn.Module]:
    return [child for name, child in part.named_children() if name.endswith("_proj")]


def fuse(model: PreTrainedModel, ops: Any) -> bool:
    """Replace the model's own layers by fused ones, if they have the right form, and what follows them; returns whether
    it did."""
    base: Any = model.base_model
    layers = getattr(base, "layers", ())
    if not layers or not all(map(_fusable, layers)):
        return False
    if type(base.norm) is type(layers[0].input_layernorm):
        base.norm = FinalNorm(base.norm, ops)
    last = len(layers) - 1
    for index in range(len(layers)):  # one at a time: the weights are in memory twice for a moment
        layers[index] = FusedLayer(layers[index], ops, is_last=index == last)
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if _is_plain(head):
        model.set_output_embeddings(Head(head, ops))  # type: ignore[no-untyped-call]
    return True


def logits_of(model: PreTrainedModel, ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Tensor:
    """Logits [wanted tokens, vocabulary] of a forward pass over the `ids` [tokens] at these `positions`."""
    layers: Any = getattr(model.base_model, "layers", ())
    only_wanted = bool(layers) and isinstance(layers[-1], FusedLayer)
    keep = 0 if metadata.wanted is None or only_wanted else metadata.wanted.places
    found: Tensor = model(
        input_ids=ids[None],
        position_ids=positions[None],
        use_cache=False,
        logits_to_keep=keep,  # 0: of all that the last layer returns
        attention_metadata=metadata,
    ).logits
    return found[0]
