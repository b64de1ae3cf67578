"""Laws of the choice of an engine: what is served gives the model's own answers, or is not served."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    DiffLlamaConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    OPTConfig,
    PersimmonConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RwkvConfig,
    Starcoder2Config,
)

from batching.engine import NO_LOGPROBS, Engine, Steps
from batching.errors import ModelError
from batching.packed.engine import PackedEngine
from batching.padded import PaddedEngine
from batching.progress import Progress
from batching.rehearsal import NUM_TOKENS, disagreement, own_answers, prompts
from batching.stream import Row
from server.model.loader import ModelLoader
from server.settings import Settings
from tests.tiny import SHAPE, tiny_model

GPT: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300, "n_positions": 256}
KINDS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16),
    "cohere": lambda: CohereConfig(**SHAPE),
    "granite": lambda: GraniteConfig(**SHAPE),
    "olmo2": lambda: Olmo2Config(**SHAPE),
    "phi": lambda: PhiConfig(**SHAPE),
    "starcoder2": lambda: Starcoder2Config(**SHAPE, sliding_window=None),
    "mixtral": lambda: MixtralConfig(**SHAPE),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=16),
    "diffllama": lambda: DiffLlamaConfig(**SHAPE),
    "nemotron": lambda: NemotronConfig(**SHAPE),
    "persimmon": lambda: PersimmonConfig(**SHAPE),
    "gpt2": lambda: GPT2Config(**GPT, initializer_range=0.2),
    "gpt_neox": lambda: GPTNeoXConfig(**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}),
    "opt": lambda: OPTConfig(
        hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64, vocab_size=300
    ),
}
NOT_SERVED: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "bloom": (lambda: BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=300), "--context-window"),
    "mamba": (lambda: MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=300), "no attention"),
    "rwkv": (lambda: RwkvConfig(hidden_size=64, num_hidden_layers=2, vocab_size=300), "no attention"),
}


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model.requires_grad_(False)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    def saved(kind: str) -> Path:
        model_of(KINDS[kind]()).save_pretrained(tmp_path)
        return tmp_path

    return saved


class Tried(ModelLoader):
    """Tries the packed engine wherever it might run, as on a GPU."""

    def __init__(self, folder: Path, engine: str = "auto") -> None:
        values: dict[str, Any] = {"model": str(folder), "engine": engine, "device": "cpu", "token_budget": 2048}
        super().__init__(Settings(**values), Progress())

    def _packs(self, model: PreTrainedModel) -> bool:
        from batching.packed.engine import unsupported

        return unsupported(model) is None


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_engine_a_model_gets_gives_the_model_s_own_answers(kind: str, folder: Callable[[str], Path]) -> None:
    place = folder(kind)
    own = own_answers(model_of(KINDS[kind]()))
    engine = Tried(place).engine()
    assert disagreement(engine, model_of(KINDS[kind]()), own) is None


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "cohere", "granite", "olmo2", "phi", "mixtral"])
def test_the_packed_engine_is_kept_where_it_agrees(kind: str, folder: Callable[[str], Path]) -> None:
    assert isinstance(Tried(folder(kind)).engine(), PackedEngine)


@pytest.mark.parametrize("kind", ["diffllama", "nemotron", "persimmon", "gpt2", "opt"])
def test_where_it_does_not_a_line_says_why_and_stock_generate_serves(
    kind: str, folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "server.model.loader")
    assert isinstance(Tried(folder(kind)).engine(), PaddedEngine)
    assert [record.getMessage() for record in caplog.records if "for the packed engine it" in record.getMessage()]


def test_a_packed_engine_that_was_asked_for_and_disagrees_stops_the_start(folder: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match=r"log probabilities are off by .* use --engine generate"):
        Tried(folder("diffllama"), engine="packed").engine()


@pytest.mark.parametrize("kind", ["diffllama", "gemma2"])
def test_batch_invariance_that_stock_generate_would_not_keep_stops_the_start(
    kind: str, folder: Callable[[str], Path]
) -> None:
    values: dict[str, Any] = {
        "model": str(folder(kind)),
        "device": "cpu",
        "token_budget": 2048,
        "batch_invariant": True,
    }
    with pytest.raises(ModelError, match=r"--batch-invariant needs the packed engine, which cannot run this model"):
        ModelLoader(Settings(**values), Progress()).engine()


@pytest.mark.parametrize("kind", NOT_SERVED)
def test_a_model_that_cannot_be_served_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    config, why = NOT_SERVED[kind]
    model_of(config()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=why):
        Tried(tmp_path).engine()


def test_a_model_whose_answers_padding_changes_is_not_served(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    padded = ModelLoader._padded
    monkeypatch.setattr(ModelLoader, "_padded", lambda loader, model: Wrong(padded(loader, model), 0.5))
    with pytest.raises(ModelError, match="cannot be served: in a padded batch its log probabilities are off by"):
        Tried(folder("opt")).engine()


class Wrong:
    """An engine whose log probabilities are off by some."""

    def __init__(self, engine: Engine, error: float) -> None:
        self.info = engine.info
        self.memory = engine.memory
        self._engine = engine
        self._error = error

    def run(self, rows: Sequence[Row], steps: Steps) -> None:
        error = self._error

        class Changed:
            admit = steps.admit
            emit_prompt = steps.emit_prompt

            def emit(self, rows: Sequence[Row], tokens: Sequence[int], logprobs: Any = NO_LOGPROBS) -> list[bool]:
                off = {place: replace(entry, logprob=entry.logprob + error) for place, entry in logprobs.items()}
                return steps.emit(rows, tokens, off)

        self._engine.run(rows, Changed())


@pytest.mark.parametrize("error", [0.0, 0.5, -0.5])
def test_log_probabilities_that_are_off_are_a_disagreement(error: float) -> None:
    model = tiny_model()
    own = own_answers(model)
    engine: Engine = Wrong(PackedEngine(model), error)
    assert (disagreement(engine, model, own) is None) == (error == 0)


@pytest.mark.parametrize("engine", ["auto", "generate"])
def test_a_model_that_overflows_is_told_as_one(engine: str, tmp_path: Path) -> None:
    model = tiny_model("llama").requires_grad_(False)
    for each in model.model.layers:
        each.mlp.down_proj.weight *= 1e5
    model.save_pretrained(tmp_path)
    values: dict[str, Any] = {"model": str(tmp_path), "engine": engine, "device": "cpu", "token_budget": 2048}
    assert ModelLoader(Settings(**values), Progress()).engine()
    with pytest.raises(ModelError, match="computes no numbers in float16: try another --dtype"):
        ModelLoader(Settings(**values, dtype="float16"), Progress()).engine()


def test_own_answers_are_those_of_stock_generate() -> None:
    model = tiny_model()
    for answer, prompt in zip(own_answers(model), prompts(model), strict=True):
        found = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False)  # type: ignore[operator]
        assert found[0, len(prompt) :].tolist() == list(answer.tokens)
