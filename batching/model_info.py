"""What a loaded model is, as the layers above need to know it."""

import torch
from transformers import PreTrainedModel

from batching.errors import ModelError
from batching.memory import total_bytes
from batching.types import ModelInfo


def describe(
    model: PreTrainedModel, window: int, budget: int, stops: frozenset[int], *, joins: bool = False
) -> ModelInfo:
    """`window` and `budget` in tokens; a row must fit both."""
    return ModelInfo(
        device=_named(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        parameters=model.num_parameters(),
        vocab_size=model.config.get_text_config().vocab_size,
        context_window=min(window, budget),
        token_budget=budget,
        stop_token_ids=stops,
        joins=joins,
        device_memory=total_bytes(model.device),
    )


def stop_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """The end-of-text ids that the model's files name."""
    for config in (model.generation_config, model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def window_of(model: PreTrainedModel, wanted: int | None) -> int:
    """Tokens a row may have: what was asked for, at most what the model was made for. Raises `ModelError`."""
    made_for = int(model.config.get_text_config().max_position_embeddings)
    if wanted is not None and wanted > made_for:
        raise ModelError(f"a context window of {wanted} was asked for, but the model was made for {made_for}")
    return wanted or made_for


def _named(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
