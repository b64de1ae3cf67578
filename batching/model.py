"""Loads a causal language model onto one device, ready for inference, and describes it to the layers above.

`load` is called once, by the thread that will run the model. Nothing here keeps a reference to it.
"""

from typing import Any, Literal

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from batching import fp8
from batching.checkpoint import LoadFormat
from batching.errors import ModelError, explained
from batching.gguf import check_complete
from batching.memory import free_bytes, total_bytes
from batching.types import ModelInfo

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DUMMY_SEED = 0
GIB = 2**30

Quantization = Literal["none", "fp8"]

_auto: Any = AutoModelForCausalLM  # the library leaves its factory methods untyped


def load(
    checkpoint: str,
    *,
    device: str,
    dtype: str,
    load_format: LoadFormat,
    quantization: Quantization = "none",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load `checkpoint` (as `locate` returns it) straight to `device`, in eval mode and without gradients.

    `dummy` reads the config only and fills the model with seeded random weights, the same on every start with
    the same device and dtype. `fp8` rounds the weights after they are loaded. Attention is the library's default.

    Raises ModelError if the device or dtype is not available, memory is short, or the checkpoint is bad.
    """
    place = usable_device(device, quantization)
    kind = pick_dtype(dtype, place)
    with explained(f"{checkpoint} cannot be loaded"):
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
        _check_type(config)
        _check_room(config, place, kind, trust_remote_code)
        if load_format == "dummy":
            model = _random(config, place, kind, trust_remote_code)
        else:
            model = _read(checkpoint, config, place, kind, trust_remote_code)
            fp8.adopt(model)
        if quantization == "fp8" or (load_format == "dummy" and fp8.is_stored_in_fp8(config) and fp8.usable(place)):
            fp8.round_weights(model)
    model.train(False)
    model.requires_grad_(False)
    return model


def usable_device(device: str, quantization: Quantization) -> torch.device:
    """As `pick_device`. Raises ModelError also if the device does not compute in what weights are rounded to."""
    place = pick_device(device)
    if quantization == "fp8" and not fp8.usable(place):
        raise ModelError(f"{place} does not compute in FP8: that takes an NVIDIA GPU from Ada or Hopper on; use none")
    return place


def pick_device(device: str) -> torch.device:
    """The named device: `auto` (the first available of cuda, mps, cpu), `cpu`, `mps`, `cuda` or `cuda:N`.

    A CUDA device always has its index, so that it equals the `device` of a tensor on it. Raises ModelError if
    there is no such device here.
    """
    if device == "auto":
        device = next(kind for kind in ("cuda", "mps", "cpu") if _device_count(kind))
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"{device!r} is not a device: use auto, cpu, mps, cuda or cuda:N") from error
    index = place.index or 0
    if index >= _device_count(place.type):
        raise ModelError(f"there is no usable device {device} on this machine")
    return torch.device("cpu") if place.type == "cpu" else torch.device(place.type, index)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The named dtype: `auto` (bfloat16 on CUDA, else float32), `bfloat16`, `float16` or `float32`.

    Raises ModelError for any other name.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise ModelError(f"{dtype!r} is not a supported dtype: use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def weight_bytes(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> int:
    """Bytes that the parameters of the model `config` describes take in `dtype`, tied ones counted once."""
    model = _build(config, torch.device("meta"), dtype, trust_remote_code)
    return sum(parameter.nbytes for parameter in model.parameters())


def describe(
    model: PreTrainedModel, window: int, budget: int, stops: frozenset[int], *, joins: bool = False
) -> ModelInfo:
    """The description for the layers above. `window` and `budget` are in tokens; a row must fit both."""
    return ModelInfo(
        device=_named(model.device),
        dtype=str(model.dtype).removeprefix("torch.") + (", weights in FP8" if fp8.has_rounded(model) else ""),
        parameters=model.num_parameters(),
        vocab_size=model.config.get_text_config().vocab_size,
        context_window=min(window, budget),
        token_budget=budget,
        stop_token_ids=stops,
        joins=joins,
        device_memory=total_bytes(model.device),
    )


def stop_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """The end-of-sequence ids that the model's files name."""
    for config in (model.generation_config, model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def window_of(model: PreTrainedModel, wanted: int | None) -> int:
    """Maximum tokens of a row: `wanted`, or the model's own limit. Raises `ModelError` if `wanted` exceeds it."""
    config = model.config.get_text_config()
    if not hasattr(config, "num_attention_heads"):
        raise ModelError("the model has no attention; models with a recurrent state are not supported")
    if not hasattr(config, "max_position_embeddings"):
        if wanted is None:
            raise ModelError("config.json does not give a maximum length; set --context-window")
        return wanted
    made_for = _longest(config)
    if wanted is not None and wanted > made_for:
        raise ModelError(
            f"the context window of {wanted} exceeds the model's {made_for}; if its authors recommend it, "
            "rope_scaling of type yarn in its config.json extends that"
        )
    return wanted or made_for


def _longest(config: PreTrainedConfig) -> int:
    """The model's maximum positions. With YaRN (Peng et al. 2023) those of its training times a factor, because a
    config edited by hand, as Qwen documents it, leaves `max_position_embeddings` unchanged."""
    positions = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "yarn":
        return positions
    return int(rope["factor"] * rope.get("original_max_position_embeddings", positions))


def _device_count(kind: str) -> int:
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return int(kind == "cpu")


def _check_type(config: PreTrainedConfig) -> None:
    """Raises ModelError for models such as encoders, and most of those that read images, too."""
    own_code = getattr(config, "auto_map", None) or {}
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in own_code:
        reason = "transformers has none that only continues text"
        raise ModelError(f"models of type {config.model_type} cannot be served: {reason}")


def _check_room(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, trust: bool) -> None:
    is_widened = fp8.is_stored_in_fp8(config) and not fp8.usable(device)
    if getattr(config, "quantization_config", None) is not None and not is_widened:
        return  # such weights take fewer bytes than `dtype` says, by a factor that each method has for itself
    needed, free = weight_bytes(config, dtype, trust), free_bytes(device)
    if needed > free:
        sizes = f"needs about {needed / GIB:.2f} GiB but only {free / GIB:.2f} GiB are free"
        raise ModelError(f"the model {sizes} on {device}")


def _random(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, trust: bool) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(DUMMY_SEED)
        return _build(config, device, dtype, trust)


def _build(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, trust: bool) -> PreTrainedModel:
    with device:
        model: PreTrainedModel = _auto.from_config(config, dtype=dtype, trust_remote_code=trust)
    return model


def _read(
    checkpoint: str, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, trust: bool
) -> PreTrainedModel:
    model: PreTrainedModel
    model, report = _auto.from_pretrained(
        checkpoint,
        config=config,
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # told here, where the library's error refers to its log
        trust_remote_code=trust,
    )
    for name, stored, built in sorted(report["mismatched_keys"]):
        raise ModelError(f"config.json does not fit the weights: {name} is {list(stored)}, not {list(built)}")
    check_complete(sorted(report["missing_keys"]))
    if fp8.is_stored_in_fp8(config):
        _cast_plain_weights(model, dtype)
    return model


def _cast_plain_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Where the library widens weights from FP8 to `dtype`, it leaves the others in that of their file."""
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.dtype in DTYPES.values():
            parameter.data = parameter.data.to(dtype)


def _named(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
