"""Laws of the command `microbatch`, as a wheel installs it: alone, and in a folder with packages of the same names."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from server.cli import main
from server.version import VERSION
from tests.live import PATIENCE, ROOT, SMALL, byte_tokenizer, environment, process
from tests.tiny import tiny_model

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "server", "batching", "benchmarks", "tests", "deploy")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because building leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder))
    [found] = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of packages that the wheel was installed into."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--no-compile", "--target", str(folder), str(wheel))
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with packages of its own that are named as ours are."""
    for name in ("server", "batching", "benchmarks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('another {name}')\n")
    return tmp_path


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(installed / "bin" / "microbatch"), *words]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(PYTHONPATH=str(installed)),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """The one line that a command ends with that makes no sense."""
    monkeypatch.setattr(sys, "argv", ["microbatch", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"microbatch: [^\n]+\n", captured.err), captured.err
    return captured.err


def test_the_wheel_has_all_of_the_server_and_nothing_that_others_have_too(wheel: Path) -> None:
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    endings = {".py", ".html", ".css", ".js"}
    files = [file for part in ("server", "batching") for file in (ROOT / part).rglob("*") if file.suffix in endings]
    vendored = [*(ROOT / "server" / "web" / "swagger").iterdir(), *(ROOT / "server").rglob("vendor/*/*")]
    files += vendored  # with their licences
    assert {str(file.relative_to(ROOT)) for file in files} <= names
    assert {name.partition("/")[0] for name in names} == {"server", "batching"}
    assert wheel.name.startswith(f"microbatch-{VERSION}-")


def test_it_is_the_installed_one_in_any_folder(installed: Path, elsewhere: Path) -> None:
    version = run(installed, elsewhere, "--version")
    assert (version.returncode, version.stdout, version.stderr) == (0, f"microbatch {VERSION}\n", "")
    listed = run(installed, elsewhere, "serve", "--help")
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.startswith("usage: microbatch serve [MODEL] [flags]\n")
    assert "--max-batch-size" in listed.stdout


def test_an_installed_one_without_the_load_test_says_how_to_get_it(installed: Path, elsewhere: Path) -> None:
    refused = run(installed, elsewhere, "bench", "--url", "http://127.0.0.1:1", "--model", "m")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "pip install --editable '.[bench]'" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_it_serves_the_model_named_first_and_compiles_grammars_in_any_folder(installed: Path, elsewhere: Path) -> None:
    model = elsewhere / "model"
    tiny_model().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    program = (str(installed / "bin" / "microbatch"), "serve", str(model))
    with process(*SMALL[2:], program=program, folder=elsewhere, PYTHONPATH=str(installed)) as service:
        service.wait_ready()
        schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
        form = {"type": "json_schema", "json_schema": {"name": "one", "schema": schema, "strict": True}}
        answer = service.chat(response_format=form, max_tokens=64)
        assert answer.status_code == 200, answer.text
        assert "process that tries grammars" not in "".join(service.lines)
        service.terminate()
        assert service.wait() == 0


def test_help_names_every_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["microbatch", "--help"])
    main()
    text = capsys.readouterr().out
    assert all(word in text for word in ("serve [MODEL]", "bench", "--version"))


def test_what_makes_no_sense_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "unknown command sevre" in said(capsys, monkeypatch, "sevre")
    assert "serve or bench" in said(capsys, monkeypatch)
    assert "see microbatch serve --help" in said(capsys, monkeypatch, "serve", "--nope")
    assert "see microbatch serve --help" in said(capsys, monkeypatch, "serve", "early", "--port", "1", "late")


def test_a_checkout_has_the_load_test(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["microbatch", "bench", "--help"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: microbatch bench ")


WITHOUT_PARSER = """
import sys
from server.cli import main

sys.modules["httptools"] = None
sys.argv = ["microbatch", "bench", "--help"]
main()
"""


def test_a_checkout_without_what_the_load_test_needs_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_PARSER], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"microbatch: the load test needs httptools; .*'\.\[bench\]'.*\n", done.stderr), done.stderr
