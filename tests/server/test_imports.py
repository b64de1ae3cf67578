"""Laws of what the start imports, each told by a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from server.model.loader import UNUSED

LOADED = """
from batching.progress import Progress
from server.model.loader import ModelLoader
from server.settings import parse

ModelLoader(parse({flags}), Progress())
import batching.padded, batching.model
from transformers.utils.import_utils import is_scipy_available, is_sklearn_available
print(is_scipy_available(), is_sklearn_available())
"""


def told_by(program: str, packages: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = [str(packages)] if packages else []
    program = f"import sys; sys.path[:0] = {path}\n{program}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder in which all that is unused is installed, and cannot be imported."""
    for name in UNUSED:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('{name} was imported')\n")
    return tmp_path


def test_the_port_is_open_before_anything_large_is_imported() -> None:
    late = ["torch", "transformers", "opentelemetry", "server.web.openapi"]
    answer = told_by(f"import server.__main__\nprint([name for name in {late} if name in sys.modules])")
    assert answer.stdout == "[]\n", answer.stderr


def test_packages_that_the_service_never_uses_are_not_imported(packages: Path) -> None:
    answer = told_by(LOADED.format(flags=[]), packages)
    assert (answer.returncode, answer.stdout) == (0, "False False\n"), answer.stderr


def test_a_models_own_code_finds_every_package(packages: Path) -> None:
    answer = told_by(LOADED.format(flags=["--model", "org/name", "--trust-remote-code"]), packages)
    assert "was imported" in answer.stderr
