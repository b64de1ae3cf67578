import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Mistral3Config, PreTrainedConfig, Qwen3Config, Qwen3ForCausalLM, T5Config

from batching import model as subject
from batching.checkpoint import LoadFormat
from batching.errors import ModelError
from batching.model import load, pick_device, pick_dtype, weight_bytes, window_of
from tests.tiny import SHAPE

CPU = torch.device("cpu")
PROMPT = torch.arange(6)[None]


@pytest.fixture
def config() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
    )


@pytest.fixture
def saved(config: Qwen3Config, tmp_path: Path) -> Path:
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def described(config: Qwen3Config, tmp_path: Path) -> Path:
    """A folder with a config and nothing else."""
    config.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_a_folder_is_loaded_ready_for_inference(saved: Path) -> None:
    model = load(str(saved), device="cpu", dtype="auto", load_format="auto")
    weights = load_file(saved / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (model.device, model.dtype) == (CPU, torch.float32)


def test_the_dtype_asked_for_wins_over_the_stored_one(saved: Path) -> None:
    model = load(str(saved), device="cpu", dtype="bfloat16", load_format="safetensors")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_dummy_weights_need_no_weight_file_and_give_finite_logits(described: Path) -> None:
    model = load(str(described), device="cpu", dtype="bfloat16", load_format="dummy")
    with torch.inference_mode():
        logits = model(PROMPT).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_two_starts_with_dummy_weights_agree(described: Path) -> None:
    torch.manual_seed(1)
    first = load(str(described), device="cpu", dtype="auto", load_format="dummy").state_dict()
    torch.manual_seed(2)
    second = load(str(described), device="cpu", dtype="auto", load_format="dummy").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_loading_leaves_the_process_defaults_alone(described: Path) -> None:
    before = torch.get_rng_state()
    load(str(described), device="cpu", dtype="bfloat16", load_format="dummy")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(0).device == CPU


@pytest.mark.parametrize("tied", [True, False])
def test_weight_bytes_are_those_of_the_built_model(config: Qwen3Config, tied: bool) -> None:
    config.tie_word_embeddings = tied
    built = Qwen3ForCausalLM(config)
    assert weight_bytes(config, torch.float32) == sum(part.nbytes for part in built.parameters())
    assert weight_bytes(config, torch.bfloat16) * 2 == weight_bytes(config, torch.float32)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_model_larger_than_free_memory_is_refused_before_loading(
    load_format: LoadFormat, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "free_bytes", lambda device: 10)
    with pytest.raises(ModelError, match=r"needs about \S+ GiB but only 0\.00 GiB are free on cpu"):
        load(str(saved), device="cpu", dtype="auto", load_format=load_format)


def test_a_quantised_model_is_not_measured_by_its_dtype(config: Qwen3Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "free_bytes", lambda device: 10)
    config.quantization_config = {"quant_method": "compressed-tensors"}
    subject._check_room(config, CPU, torch.float32, trust=False)
    config.quantization_config = {"quant_method": "fp8"}  # which is widened, because this device does not compute in it
    with pytest.raises(ModelError, match="are free on cpu"):
        subject._check_room(config, CPU, torch.float32, trust=False)


def test_a_checkpoint_that_lacks_weights_is_refused(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the model's weights, such as model\.norm\.weight"):
        load(str(saved), device="cpu", dtype="auto", load_format="auto")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'{"model_type": "no-such-type"}'])
def test_a_bad_file_is_one_sentence(file: str, content: bytes, saved: Path) -> None:
    (saved / file).write_bytes(content)
    with pytest.raises(ModelError, match="cannot be loaded") as raised:
        load(str(saved), device="cpu", dtype="auto", load_format="auto")
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is not None


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("vocab_size", 7, r"^config\.json does not fit the weights: \S+\.weight is \[\d+, 32\], not \[7, 32\]$"),
        ("max_position_embeddings", "many", r"'max_position_embeddings': .*expected int, got str"),
    ],
)
def test_a_configuration_that_is_wrong_is_told_with_what_is_wrong_about_it(
    field: str, value: object, reason: str, saved: Path
) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ModelError, match=reason):
        load(str(saved), device="cpu", dtype="auto", load_format="auto")


@pytest.mark.parametrize("config", [Mistral3Config(), T5Config()])
def test_a_model_that_does_not_continue_text_alone_is_told_as_one(config: PreTrainedConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"^models of type {config.model_type} cannot be served"):
        load(str(tmp_path), device="cpu", dtype="auto", load_format="dummy")


def test_a_folder_without_weights_is_one_sentence(described: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(str(described), device="cpu", dtype="auto", load_format="auto")


@pytest.mark.usefixtures("without_gpu")
def test_without_a_gpu_auto_is_the_cpu() -> None:
    assert pick_device("auto") == CPU


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_cuda_device_has_its_index(name: str, index: int) -> None:
    assert pick_device(name) == torch.device("cuda", index)


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "meta", "cpu:1"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=f"no usable device {name}"):
        pick_device(name)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 200}


@pytest.mark.parametrize(
    ("rope", "window"),
    [
        ({}, 512),
        ({"rope_scaling": YARN}, 800),
        ({"rope_scaling": {"type": "yarn", "factor": 2.5, "original_max_position_embeddings": 400}}, 1000),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 1024),
        ({"rope_parameters": YARN | {"rope_theta": 1e6}}, 800),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}}, 512),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e6}}, 512),
    ],
)
def test_the_window_is_the_config_s_or_what_yarn_stretches_it_to(rope: dict[str, Any], window: int) -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16, **rope))
    assert window_of(model, None) == window
    assert window_of(model, window) == window
    assert window_of(model, 16) == 16
    with pytest.raises(ModelError, match=f"the context window of {window + 1} exceeds the model's {window};"):
        window_of(model, window + 1)


@pytest.mark.usefixtures("two_gpus")
def test_a_cuda_index_past_the_last_is_refused() -> None:
    with pytest.raises(ModelError, match="no usable device cuda:2"):
        pick_device("cuda:2")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "CPU"])
def test_what_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="is not a device"):
        pick_device(name)


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        ("auto", "cuda", torch.bfloat16),
        ("auto", "cpu", torch.float32),
        ("auto", "mps", torch.float32),
        ("float16", "cuda", torch.float16),
        ("bfloat16", "cpu", torch.bfloat16),
    ],
)
def test_the_dtype_follows_the_name_and_the_device(name: str, device: str, dtype: torch.dtype) -> None:
    assert pick_dtype(name, torch.device(device)) is dtype


@pytest.mark.parametrize("name", ["", "int8", "float64", "Float32"])
def test_what_is_no_dtype_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="is not a supported dtype"):
        pick_dtype(name, CPU)
