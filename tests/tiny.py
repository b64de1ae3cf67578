"""Tiny random models: real transformers architectures, a few thousand parameters, made in milliseconds."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # wide, so that the largest logits are far apart and rounding cannot swap them
}

CONFIGS = {
    "qwen3": lambda **others: Qwen3Config(**SHAPE | others, head_dim=16),
    "qwen2": lambda **others: Qwen2Config(**SHAPE | others),
    "llama": lambda **others: LlamaConfig(**SHAPE | others),
    "mistral": lambda **others: MistralConfig(**SHAPE | others, sliding_window=None),
}


def tiny_model(kind: str = "qwen3", seed: int = 0, **others: int) -> PreTrainedModel:
    """A model of random weights in float32 on the CPU, in eval mode. `others` replace sizes of `SHAPE`."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[kind](**others)).eval()
    return model
