"""Laws of a start that fails: a process of its own says why in one line, and ends with a status that is not 0."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from batching.checkpoint import LFS_POINTER
from batching.errors import ModelError
from server.model.text import Text
from tests.batching.test_checkpoint import write_gguf
from tests.live import PATIENCE, ROOT, SMALL, byte_tokenizer, environment, process
from tests.tiny import tiny_model

HOMELESS = """
import os, pwd, runpy, sys

def unknown(*user):
    raise KeyError("uid not found")

pwd.getpwuid = pwd.getpwnam = unknown
for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
    os.environ.pop(name, None)
runpy.run_module("server", run_name="__main__", alter_sys=True)
"""
"""`python -m server` of a user whom nobody knows, as containers have them."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A model's folder to break."""
    (tmp_path / "model").mkdir()
    for file in whole.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "model"


@pytest.fixture
def without_torch(tmp_path: Path) -> str:
    """A path for Python on which torch is something that takes no part in what is tested."""
    (tmp_path / "packages" / "torch").mkdir(parents=True)
    (tmp_path / "packages" / "torch" / "__init__.py").write_text("raise RuntimeError('torch was imported')\n")
    return str(tmp_path / "packages")


def told(*flags: str, **variables: str) -> str:
    """The one line that a start ends with that fails."""
    command = [sys.executable, "-m", "server", "--port", "0", *flags]
    ended = subprocess.run(
        command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=PATIENCE
    )
    assert ended.returncode == 1, ended.stderr
    [line] = ended.stderr.splitlines()
    assert "ERROR" in line
    return line


def remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def empty(folder: Path) -> None:
    (folder / "config.json").unlink()


def point(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(LFS_POINTER + b"v1\noid sha256:0\nsize 1\n")


def cut(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove, "there is no file or folder"),
        (empty, "there is no config.json in"),
        (point, "model.safetensors is a Git LFS pointer, not the file itself"),
        (cut, "model.safetensors is damaged or incomplete"),
    ],
)
def test_a_folder_that_is_no_model_is_told_before_torch_is_imported(
    damage: Callable[[Path], None], reason: str, folder: Path, without_torch: str
) -> None:
    damage(folder)
    line = told("--model", str(folder), PYTHONPATH=without_torch)
    assert reason in line
    assert str(folder) in line


def test_libraries_that_cannot_be_imported_are_told(folder: Path, without_torch: str) -> None:
    line = told("--model", str(folder), PYTHONPATH=without_torch)
    assert "the libraries that run the model cannot be imported: torch was imported" in line


def test_a_user_without_a_home_can_serve_a_folder(whole: Path) -> None:
    with process("--model", str(whole), *SMALL[2:], program=("-c", HOMELESS)) as service:
        service.wait_ready()
        service.terminate()
        assert service.wait() == 0


def test_a_chat_template_with_an_error_in_it_is_told_with_its_line(folder: Path) -> None:
    template = folder / "chat_template.jinja"
    template.write_text("{% for message in messages %}\n{{ message.content }}\n{% end %}\n")
    with pytest.raises(ModelError, match=r"the chat template in .* has a syntax error in line 3: ") as raised:
        Text.load(str(folder))
    assert "\n" not in str(raised.value)


def test_a_chat_template_that_refuses_a_question_is_none_with_an_error(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('a system message comes first') }}")
    assert not Text.load(str(folder)).format.renders_tools


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_told_in_one_line(name: str, content: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError) as raised:
        Text.load(str(folder))
    assert "\n" not in str(raised.value)


def test_a_start_that_converts_logs_nothing_but_json_where_that_is_asked_for(tmp_path: Path) -> None:
    write_gguf(tmp_path / "part.gguf", layers=2, without="blk.1.")
    flags = ["--model", str(tmp_path), "--cache-dir", str(tmp_path / "cache"), "--log-format", "json", "--port", "0"]
    command = [sys.executable, "-m", "server", *flags]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    assert "lacks 9 of the model's weights" in lines[-1]["message"]
