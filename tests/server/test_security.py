"""What protects whoever runs this: floors of what it stands on, no code from a model's folder, silent errors."""

import json
import re
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from batching.checkpoint import locate
from batching.errors import ModelError
from batching.model import load
from server.model.text import Text
from tests.fakes import ScriptedEngine
from tests.live import ROOT, Live, live, scripted

FLOORS = {"orjson": "3.11.6", "h11": "0.16", "jinja2": "3.1.6", "starlette": "1.3.1"}
"""Below these are faults that a request can use: recursion, smuggling, escapes from the sandbox, floods of parts."""


@pytest.mark.parametrize("name", FLOORS)
def test_no_version_with_a_known_fault_may_be_installed(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {one.name: one for one in map(Requirement, project["dependencies"])}
    below = Version(FLOORS[name] + ".dev0")
    assert not found[name].specifier.contains(below, prereleases=True)
    assert not any(found[name].specifier.contains(f"{below.major}.{minor}.0") for minor in range(below.minor))
    assert Version(version(name)) >= Version(FLOORS[name])


# Code in a model's folder

CONFIG: dict[str, Any] = {
    "model_type": "stranger",
    "architectures": ["Stranger"],
    "auto_map": {"AutoConfig": "stranger.Config", "AutoModelForCausalLM": "stranger.Model"},
    "vocab_size": 8,
}
TOKENIZER: dict[str, Any] = {
    "tokenizer_class": "StrangeTokenizer",
    "auto_map": {"AutoTokenizer": [None, "stranger.StrangeTokenizer"]},
}


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A model's folder with Python code in it, and the file that this code leaves where it is run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = tmp_path / "model", tmp_path / "mark"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    (folder / "stranger.py").write_text(f"open({str(mark)!r}, 'w').close()\nraise OSError('I was run')\n")
    return str(folder), mark


LOADS: dict[str, Callable[[str, bool], object]] = {
    "a model": lambda folder, trust: load(
        folder, device="cpu", dtype="float32", load_format="dummy", trust_remote_code=trust
    ),
    "a tokenizer": lambda folder, trust: Text.load(folder, trust_remote_code=trust),
}


@pytest.mark.parametrize("what", LOADS)
def test_code_in_a_model_s_folder_is_run_only_if_a_setting_says_so(what: str, stranger: tuple[str, Path]) -> None:
    folder, mark = stranger
    with pytest.raises(ModelError):
        LOADS[what](folder, False)
    assert not mark.exists()
    with pytest.raises(ModelError):
        LOADS[what](folder, True)
    assert mark.exists()


def test_weights_that_could_hold_code_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 8}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="safetensors"):
        locate(str(tmp_path), "auto", tmp_path)


UNPICKLING = re.compile(r"\b(pickle|marshal|shelve|multiprocessing|joblib|torch\.load)\b")


def test_nothing_is_unpickled() -> None:
    sources = [file for folder in ("server", "batching") for file in (ROOT / folder).rglob("*.py")]
    assert sources
    found = [(file.name, line) for file in sources for line in file.read_text().splitlines() if UNPICKLING.search(line)]
    assert found == []


# What SECURITY.md says

SECURITY = (ROOT / "SECURITY.md").read_text()
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
LAWS = frozenset(re.findall(r"def (test_\w+)", "".join(file.read_text() for file in TESTS)))


def columns(heading: str) -> list[list[str]]:
    """The rows of the table whose last column is named `test`, below a heading or a bold word."""
    table = SECURITY[SECURITY.index(heading) :].partition("\n| ")[2].partition("\n\n")[0]
    first, _, *rows = ["| " + table.splitlines()[0], *table.splitlines()[1:]]
    assert first.endswith("| test |")
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


@pytest.mark.parametrize("heading", ["## What each limit bounds", "**The sum.**", "## Vulnerabilities elsewhere"])
def test_each_line_of_a_table_names_a_test_that_proves_it(heading: str) -> None:
    rows = columns(heading)
    assert len(rows) > 4
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row[-1])
        assert named, row
        assert set(named) <= LAWS, row


def test_every_file_and_test_that_is_named_is_there() -> None:
    named = re.findall(r"`((?:server|batching|tests)/[\w/.]+|test_\w+(?:\.py)?)`", SECURITY)
    assert len(named) > 60
    missing = [one for one in named if not (ROOT / one).exists() and one not in LAWS]
    assert missing == []


# What is told

MARK = "quick-brown-secret"
PATH = str(ROOT / "models" / MARK)


def fail(step: int) -> None:
    raise RuntimeError(f"cannot read {PATH}")


ASKS: dict[str, Callable[[Live], str]] = {
    "bad JSON": lambda service: service.post(f'{{"messages": "{MARK}'.encode()).text,
    "a bad field": lambda service: service.chat(temperature=MARK).text,
    "an unknown field": lambda service: service.chat(**{MARK: MARK}).text,
    "an unknown model": lambda service: service.chat(model=MARK).text,
    "an unknown path": lambda service: service.get(f"/{MARK}").text,
    "a key": lambda service: service.chat(headers={"authorization": f"Bearer {MARK}"}).text,
    "too long a prompt": lambda service: service.chat(messages=[{"role": "user", "content": MARK * 100}]).text,
    "a role that the template refuses": lambda service: service.chat(messages=[{"role": MARK, "content": MARK}]).text,
    "a message that the template refuses": lambda service: (
        service.chat(messages=[{"role": "user", "content": MARK}, {"role": "user", "content": "refuse me"}]).text
    ),
    "a schema": lambda service: (
        service.chat(
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": MARK}}}
        ).text
    ),
    "an engine that fails": lambda service: service.chat(messages=[{"role": "user", "content": MARK}]).text,
}


@pytest.mark.parametrize("what", ASKS)
def test_no_error_tells_what_was_sent_nor_where_things_are(what: str, caplog: pytest.LogCaptureFixture) -> None:
    keys = ("known",) if what == "a key" else ()
    engine: ScriptedEngine = scripted(before_step=fail, context_window=512)
    with live(engine, api_keys=keys) as service:
        told = ASKS[what](service)
    assert '"error"' in told
    assert MARK not in told
    assert str(ROOT) not in told
    assert "Traceback" not in told
    ours = [record.getMessage() for record in caplog.records if record.name == "microbatch"]
    assert not any(MARK in line for line in ours if "refused" not in line or f"/{MARK}" not in line)
