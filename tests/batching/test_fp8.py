"""Weights in FP8: rounded at load or stored so, they run fused and unfused, and every row is what the model says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.finegrained_fp8 import FP8Linear as StoredLinear

from batching import fp8, model
from batching.errors import ModelError
from batching.fp8 import FP8Linear
from batching.packed import layer, reference
from batching.packed.engine import PackedEngine
from batching.padded import PaddedEngine
from batching.rehearsal import disagreement, own_answers
from tests.tiny import CONFIGS, tiny_model

WIDE = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 8}
DEVICE = "cuda" if torch.cuda.is_available() and fp8.usable(torch.device("cuda", 0)) else "cpu"


def wide_model(kind: str = "qwen3") -> PreTrainedModel:
    """Its projections have multiples of 128 outputs."""
    made = tiny_model(kind, **WIDE)
    made.requires_grad_(False)
    return made.to(DEVICE)  # type: ignore[arg-type,no-any-return]


def linear_layers(of: nn.Module) -> list[nn.Linear]:
    return [module for module in of.modules() if isinstance(module, nn.Linear)]


def first_layer(of: PreTrainedModel) -> Any:
    return of.get_submodule("model.layers.0")


def widened(layer: Any) -> torch.Tensor:
    """The weights as numbers."""
    if not isinstance(layer, FP8Linear):
        return layer.weight.float()  # type: ignore[no-any-return]
    by_row = layer.scales.repeat_interleave(128, 0)[: len(layer.weight)].repeat_interleave(128, 1)
    return layer.weight.float() * by_row


def test_rounding_keeps_each_weight_to_a_sixteenth() -> None:
    plain = nn.Linear(256, 200)
    rounded = FP8Linear.rounded(plain)
    least = rounded.scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1) * 2**-6
    # Numbers below the least normal one of the format have fewer digits.
    assert bool(((widened(rounded) - plain.weight).abs() <= plain.weight.abs().clamp(min=least) / 16).all())


def test_products_are_those_of_the_rounded_weights() -> None:
    plain = nn.Linear(384, 256).requires_grad_(False)
    x = torch.randn(2, 5, 384)
    found, wanted = FP8Linear.rounded(plain)(x), plain(x)
    assert found.shape == wanted.shape
    assert float((found - wanted).norm() / wanted.norm()) < 0.06


def test_a_row_is_multiplied_alike_whatever_else_is() -> None:
    rounded = FP8Linear.rounded(nn.Linear(256, 128)).to(DEVICE)
    x = torch.randn(7, 256, device=DEVICE)
    torch.testing.assert_close(rounded(x)[3:4], rounded(x[3:4]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_packed_engine_gives_the_models_own_answers(
    kind: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        monkeypatch.setattr(layer, "FUSABLE", frozenset())
    made = wide_model(kind)
    fp8.round_weights(made)
    own = own_answers(made)
    engine = PackedEngine(made, num_slots=4, token_budget=1024)
    assert isinstance(first_layer(made), layer.FusedLayer) == fused
    assert engine.info.dtype == "float32, weights in FP8"
    assert disagreement(engine, made, own) is None


def test_padded_batches_give_the_models_own_answers() -> None:
    made = wide_model()
    fp8.round_weights(made)
    own = own_answers(made)
    assert disagreement(PaddedEngine(made, token_budget=1024), made, own) is None


def test_all_is_rounded_but_the_output_layer_routers_and_what_the_folder_excludes() -> None:
    made = wide_model()
    made.config.quantization_config = {
        "quant_method": "fp8",
        "modules_to_not_convert": ["model.layers.1.mlp.down_proj"],
    }
    first_layer(made).gate = nn.Linear(256, 8)
    fp8.round_weights(made)
    excluded = [
        first_layer(made).gate,
        made.get_submodule("model.layers.1.mlp.down_proj"),
        made.get_submodule("lm_head"),
    ]
    assert linear_layers(made) == excluded


def stored(rounded: FP8Linear, **others: Any) -> StoredLinear:
    outputs, inputs = rounded.weight.shape
    made = StoredLinear(inputs, outputs, **{"block_size": (128, 128)} | others)
    made.weight.data = rounded.weight.data
    return made


def test_layers_of_transformers_are_taken_over() -> None:
    made = wide_model().cpu()
    wanted = [FP8Linear.rounded(each) for each in linear_layers(made)[:2]]
    first, second = (stored(each) for each in wanted)
    first.weight_scale_inv.data = wanted[0].scales
    second.weight_scale_inv.data = wanted[1].scales.to(torch.float8_e8m0fnu)
    attention = first_layer(made).self_attn
    attention.q_proj, attention.k_proj = first, second
    fp8.adopt(made)
    assert torch.equal(attention.q_proj.scales, wanted[0].scales)
    assert torch.equal(attention.k_proj.scales, second.weight_scale_inv.float())


def test_a_single_scale_is_that_of_every_block() -> None:
    holder: Any = nn.Sequential(
        stored(FP8Linear.rounded(nn.Linear(256, 200)), block_size=None, activation_scheme="static")
    )
    holder[0].weight_scale_inv.data = torch.tensor(0.5)
    fp8.adopt(holder)
    assert torch.equal(holder[0].scales, torch.full((2, 2), 0.5))


def test_blocks_of_other_sizes_are_refused() -> None:
    holder: Any = nn.Sequential(stored(FP8Linear.rounded(nn.Linear(256, 256)), block_size=(64, 128)))
    with pytest.raises(ModelError, match="not of 128 x 128"):
        fp8.adopt(holder)


def test_an_odd_number_of_inputs_is_refused() -> None:
    with pytest.raises(ModelError, match="takes a multiple of 128"):
        FP8Linear(torch.zeros(128, 100).to(reference.FP8), torch.ones(1, 1), None)


def folder_in_fp8(path: Path, others: torch.dtype = torch.float32) -> PreTrainedModel:
    """A folder as Qwen publishes them, the `others` of whose weights have this dtype; returns the model that it
    holds."""
    made = wide_model().cpu()
    fp8.round_weights(made)
    made.config.quantization_config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    made.config.save_pretrained(path)
    tensors = {
        name.replace(".scales", ".weight_scale_inv"): tensor.contiguous().to(
            tensor.dtype if tensor.dtype == reference.FP8 else others
        )
        for name, tensor in made.state_dict().items()
    }
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return made


def test_a_folder_in_fp8_is_read(tmp_path: Path) -> None:
    wanted = folder_in_fp8(tmp_path)
    found = model.load(str(tmp_path), device=DEVICE, dtype="float32", load_format="auto")
    names = [name for name, each in wanted.named_modules() if isinstance(each, FP8Linear)]
    assert len(names) == 14
    for name in names:
        there, here = wanted.get_submodule(name), found.get_submodule(name)
        assert isinstance(here, FP8Linear) == (DEVICE == "cuda")
        # Where no FP8 units are, transformers widens the weights, by way of bfloat16.
        torch.testing.assert_close(widened(here).cpu(), widened(there), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_a_folder_in_fp8_holds_in_another_dtype_is_computed_in_the_one_asked_for(
    dtype: str, tmp_path: Path
) -> None:
    folder_in_fp8(tmp_path, torch.bfloat16)  # as Qwen's own
    found = model.load(str(tmp_path), device=DEVICE, dtype=dtype, load_format="auto")
    assert {each.dtype for each in found.parameters() if each.dim() == 1} == {model.DTYPES[dtype]}
    own = own_answers(found)
    assert disagreement(PackedEngine(found, num_slots=4, token_budget=1024), found, own) is None


def test_dummy_weights_are_in_the_folders_format_where_the_device_computes_in_it(tmp_path: Path) -> None:
    folder_in_fp8(tmp_path)
    found = model.load(str(tmp_path), device=DEVICE, dtype="float32", load_format="dummy")
    assert any(isinstance(each, FP8Linear) for each in found.modules()) == (DEVICE == "cuda")


def test_a_device_without_fp8_is_refused(tmp_path: Path) -> None:
    wide_model().config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cpu does not compute in FP8"):
        model.load(str(tmp_path), device="cpu", dtype="auto", load_format="dummy", quantization="fp8")
