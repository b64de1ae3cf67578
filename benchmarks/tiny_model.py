"""A model's folder without weights: a small shape and the demo model's tokenizer, for `--load-format dummy`."""

from pathlib import Path

from transformers import AutoTokenizer, Qwen3Config

from batching.checkpoint import locate


def make(folder: Path, cache: Path) -> None:
    """Write config.json and the tokenizer's files. `cache` is where the demo model is converted to."""
    AutoTokenizer.from_pretrained(locate(None, "auto", cache)).save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=49_152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(folder)
