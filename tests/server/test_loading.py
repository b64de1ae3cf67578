"""Laws of the progress that is told while a model loads."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.utils.logging import set_tqdm_hook, tqdm

from batching.errors import ModelError
from batching.progress import Progress
from server.model import loader as loading
from server.model.loader import Loading, ModelLoader, counted, follow_bars
from server.settings import parse
from tests.live import byte_tokenizer
from tests.tiny import tiny_model


@pytest.fixture
def bars() -> Iterator[None]:
    yield
    set_tqdm_hook(None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_parts_are_counted_as_they_are_taken() -> None:
    told: list[Loading] = []
    items = counted("ab", told.append, "Reading", 2)
    assert (next(items), told) == ("a", [Loading("Reading", 0, 2)])
    assert ([*items], told[1:]) == (["b"], [Loading("Reading", 1, 2)])


@pytest.mark.usefixtures("bars")
def test_the_loading_of_weights_is_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Loading] = []
    loader = ModelLoader(parse(["--model", str(folder), "--device", "cpu", "--token-budget", "512"]), Progress())
    monkeypatch.setattr(loader, "_tell", told.append)
    loader.text()
    assert loader.loading.step == "Reading the model's files"
    loader.engine()
    assert loader.loading.step == "Preparing the engine"
    weights = [loading for loading in told if loading.step == "Loading weights"]
    assert [loading.done for loading in weights] == list(range(weights[0].total))
    assert len(weights) > 10


@pytest.mark.usefixtures("bars")
def test_imports_are_told_once_before_anything_is_loaded(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    told: list[str] = []
    loader = ModelLoader(parse(["--model", str(folder)]), Progress(), lambda: told.append(loader.loading.step))
    for part in (loader.text, loader.engine, loader.text):
        with pytest.raises(ModelError):
            part()
    assert told == ["Reading the model's files"]


@pytest.mark.usefixtures("bars")
@pytest.mark.parametrize("library", ["transformers", "huggingface_hub"])
def test_what_libraries_log_is_logged_once_and_in_our_format(
    library: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger(library)
    logger.addHandler(logging.StreamHandler())  # as it does when it is first imported
    ModelLoader(parse(["--model", str(folder), "--device", "cpu"]), Progress()).text()
    logger.warning("Retrying in 1s")
    assert (logger.handlers, caplog.messages) == ([], ["Retrying in 1s"])


def test_nothing_is_imported_for_a_folder_that_is_no_model(tmp_path: Path) -> None:
    told: list[str] = []
    loader = ModelLoader(parse(["--model", str(tmp_path)]), Progress(), lambda: told.append("imported"))
    for part in (loader.text, loader.engine):
        with pytest.raises(ModelError, match=r"no config\.json"):
            part()
    assert told == []


@pytest.mark.parametrize(
    ("flags", "reason"), [(["--device", "cuda:99"], "no usable device cuda:99"), (["--quantization", "fp8"], "FP8")]
)
def test_a_gguf_file_is_not_converted_for_a_device_that_cannot_run_it(
    flags: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batching.fp8.usable", lambda device: False)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    loader = ModelLoader(parse([str(tmp_path), "--cache-dir", str(tmp_path / "cache"), *flags]), Progress())
    for part in (loader.text, loader.engine):
        with pytest.raises(ModelError, match=reason):
            part()
    assert not (tmp_path / "cache").exists()


def test_a_gguf_file_that_cannot_be_converted_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the tokenizer and the engine are loaded on a thread each, which both need it."""
    tried: list[str] = []

    def damaged(model: str, cache: Path) -> str:
        tried.append(model)
        raise ModelError("damaged")

    monkeypatch.setattr(loading, "prepare", damaged)
    loader = ModelLoader(parse(["--model", str(tmp_path), "--device", "cpu"]), Progress())
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for part in (loader.text, loader.engine):
        with pytest.raises(ModelError, match="damaged"):
            part()
    assert len(tried) == 1


@pytest.mark.usefixtures("bars")
def test_what_cannot_be_counted_is_left_alone() -> None:
    told: list[Loading] = []
    follow_bars(told.append)
    assert [*tqdm(iter("ab"), desc="endless")] == ["a", "b"]
    with tqdm(total=3) as bar:
        bar.update(1)
    assert told == []
