"""Linear layers in 8-bit floating point (e4m3), with a scale for every block of 128 x 128 weights.

That is the form of Qwen3's and DeepSeek-V3's FP8 folders (Liu et al. 2024, section 3.3). Inputs are rounded to the same
format, with a scale for every 128 values of a token, so that matrix units for FP8 compute the products. transformers
has such a layer, too, but downloads its kernels from a hub when it first runs.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedConfig, PreTrainedModel

from batching.errors import ModelError
from batching.packed import reference
from batching.packed.reference import BLOCK

ROUTERS = frozenset(["gate", "router"])
"""Layers that choose experts: a rounded weight could choose another one."""


class FP8Linear(nn.Module):
    """`weight` is [outputs, inputs] in FP8, `scales` [outputs / 128, inputs / 128], rounded up, `bias` [outputs].

    Raises ModelError unless the inputs are a multiple of 128.
    """

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        if weight.shape[1] % BLOCK:
            raise ModelError(f"a layer with {weight.shape[1]} inputs cannot be in FP8: it takes a multiple of {BLOCK}")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def rounded(cls, layer: nn.Linear) -> Self:
        """The layer, with its weights rounded."""
        outputs, inputs = layer.weight.shape
        whole = pad(layer.weight.float(), (0, 0, 0, -outputs % BLOCK))
        blocks = whole.view(-1, BLOCK, inputs // BLOCK, BLOCK)
        scales = blocks.abs().amax((1, 3)).clamp(min=reference.LEAST_SCALE) / reference.LARGEST
        weight = (blocks / scales[:, None, :, None]).view_as(whole)[:outputs].to(reference.FP8)
        return cls(weight, scales, layer.bias)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """One layer with the outputs of all, of which each has a multiple of 128."""
        biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
        weights: list[Tensor] = [part.weight for part in parts]
        scales: list[Tensor] = [part.scales for part in parts]
        return cls(torch.cat(weights), torch.cat(scales), torch.cat(biases) if biases else None)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        return self.product(x.flatten(0, -2)).view(*x.shape[:-1], -1)

    def product(self, x: Any) -> Tensor:
        """x [tokens, inputs], or what the kernels make of it -> [tokens, outputs]."""
        out: Tensor = self.ops.fp8_product(x, self.weight, self.scales, self.bias)
        return out

    def add_product(self, total: Tensor, x: Any) -> None:
        """Add the product to `total` [tokens, outputs]."""
        self.ops.fp8_product(x, self.weight, self.scales, self.bias, total)

    @property
    def ops(self) -> ModuleType:
        """The kernels for the device that it is on."""
        if self.weight.device.type != "cuda":
            return reference
        from batching.packed import triton_fp8

        return triton_fp8


def usable(device: torch.device) -> bool:
    """Whether the device multiplies FP8 numbers: NVIDIA's compute capability is 8.9 or more."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def is_stored_in_fp8(config: PreTrainedConfig) -> bool:
    """Whether the folder's weights are in this form."""
    return _quantization(config).get("quant_method") == "fp8"


def has_rounded(model: PreTrainedModel) -> bool:
    """Whether any of its layers is in FP8."""
    return any(isinstance(module, FP8Linear) for module in model.modules())


def round_weights(model: PreTrainedModel) -> None:
    """Round the weights of all linear layers but the output layer and routers, as far as the form takes them."""
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    kept = {id(output), *map(id, _excepted(model))}
    for parent, name, child in _children(model):
        if name in ROUTERS or id(child) in kept:
            continue
        if type(child) is nn.Linear and child.in_features % BLOCK == 0:
            setattr(parent, name, FP8Linear.rounded(child))


def adopt(model: PreTrainedModel) -> None:
    """Put this module's layers in the place of transformers' own, with the weights that it loaded.

    A layer with a single scale gets that for every block. A scale for inputs that was measured beforehand is ignored:
    inputs have their own scales here, which round them less. Raises ModelError if a layer's blocks are others.
    """
    for parent, name, child in _children(model):
        if (
            type(child).__name__ == "FP8Linear"
            and not isinstance(child, FP8Linear)
            and child.weight.dtype == reference.FP8
        ):
            setattr(parent, name, FP8Linear(child.weight, _block_scales(child), child.bias))


def _block_scales(layer: Any) -> Tensor:
    outputs, inputs = layer.weight.shape
    scales: Tensor = layer.weight_scale_inv.float()
    if scales.numel() == 1:
        return scales.view(1, 1).repeat(-(-outputs // BLOCK), inputs // BLOCK)
    if tuple(layer.block_size) != (BLOCK, BLOCK):
        raise ModelError(f"its FP8 weights have a scale for each block of {layer.block_size}, not of 128 x 128")
    return scales


def _excepted(model: PreTrainedModel) -> list[nn.Module]:
    """Modules that the folder's configuration excludes."""
    names = _quantization(model.config).get("modules_to_not_convert") or ()
    return [module for name, module in model.named_modules() if name in names]


def _quantization(config: PreTrainedConfig) -> dict[str, Any]:
    found = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, dict) else dict(found.to_dict())


def _children(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Every module with its parent and its name there."""
    return [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
