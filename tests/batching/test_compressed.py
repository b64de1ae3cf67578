"""Folders of compressed-tensors: their own modules compute them, fused only where nothing is lost by that."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import PreTrainedModel

from batching import model
from batching.errors import ModelError
from batching.packed.engine import PackedEngine
from batching.packed.layer import FusedLayer
from batching.padded import PaddedEngine
from batching.rehearsal import disagreement, own_answers
from tests.batching.test_fp8 import wide_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED = {"W4A16": True, "W8A16": True, "W8A8": False, "FP8_DYNAMIC": False}
"""Schemes by name: whether weights alone are quantised, so that wide ones are all there is to a layer."""


def folder_of(path: Path, scheme: str) -> str:
    made: Any = wide_model().cpu()
    groups = {"all": preset_name_to_scheme(scheme, ["Linear"])}
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], quantization_status=QuantizationStatus.FROZEN)
    apply_quantization_config(made, config)
    for each in made.modules():
        if hasattr(each, "weight_scale"):
            calibrate(each)
    compressor = ModelCompressor.from_pretrained_model(made)
    compressor.compress_model(made)
    made.save_pretrained(path)
    compressor.update_config(path)
    return str(path)


def calibrate(layer: Any) -> None:
    """Scales from the least and the largest weight of each group, or of each output."""
    args = layer.quantization_scheme.weights
    groups = layer.weight.unflatten(1, (-1, args.group_size or layer.weight.shape[1]))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    layer.weight_scale.data.copy_(scale)
    if hasattr(layer, "weight_zero_point"):
        layer.weight_zero_point.data.copy_(zero)
    layer.quantization_status = QuantizationStatus.FROZEN


def loaded(folder: str) -> PreTrainedModel:
    return model.load(folder, device=DEVICE, dtype="float32", load_format="auto")


@pytest.mark.parametrize("scheme", FUSED)
def test_both_engines_give_the_models_own_answers(scheme: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, scheme)
    packed = loaded(folder)
    own = own_answers(packed)
    if DEVICE == "cpu" or FUSED[scheme]:  # what rounds inputs copies from the host, which no CUDA graph can hold
        assert disagreement(PackedEngine(packed, num_slots=4, token_budget=1024), packed, own) is None
        assert isinstance(packed.get_submodule("model.layers.0"), FusedLayer) == FUSED[scheme]
    padded = loaded(folder)
    assert own_answers(padded) == own
    assert disagreement(PaddedEngine(padded, token_budget=1024), padded, own) is None


def test_what_a_method_needs_is_named_if_it_is_missing(tmp_path: Path) -> None:
    wide_model().cpu().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="pip install optimum"):
        loaded(str(tmp_path))
