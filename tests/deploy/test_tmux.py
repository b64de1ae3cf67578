"""`deploy/tmux.sh` as a person uses it: a real tmux, the real service, the demo model."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.live import PATIENCE, ROOT, SMALL, Address, environment, eventually, free_port, live

SCRIPT = ROOT / "deploy" / "tmux.sh"
pytestmark = [pytest.mark.deploy, pytest.mark.model]


def test_the_script_is_well_formed() -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    assert subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True).stdout == ""


@dataclass
class Script:
    """The script with a session, a port and a log of its own."""

    folder: Path
    port: int

    def __call__(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        own = {"TMUX_TMPDIR": str(self.folder), "SESSION": "test", "PORT": str(self.port), "PYTHON": sys.executable}
        return subprocess.run(
            [SCRIPT, *arguments],
            cwd=self.folder,
            env=environment(**own | {"LOG": "log"} | variables),
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
        )

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def server(self) -> int:
        """The server's process, 0 if there is none."""
        found = re.search(r"process (\d+)", self("status").stdout)
        return int(found[1]) if found else 0


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    found = Script(tmp_path, free_port())
    yield found
    tmux = shutil.which("tmux")
    assert tmux, "tmux is not installed"
    subprocess.run([tmux, "kill-server"], env=os.environ | {"TMUX_TMPDIR": str(tmp_path)}, capture_output=True)


def test_it_starts_answers_comes_back_after_a_crash_and_finishes_what_it_accepted(script: Script) -> None:
    assert script("status").returncode == 3
    (script.folder / "server").mkdir()
    (script.folder / "server" / "__init__.py").write_text("raise AssertionError('not this one')")
    (script.folder / "keys").write_text("alice another")
    flags = [*SMALL, "--api-keys-file", "keys"]
    started = script("start", *flags, MICROBATCH_DEFAULT_MAX_TOKENS="5", MICROBATCH_API_KEYS="secret")
    assert started.returncode == 0, started.stderr
    url = f"http://127.0.0.1:{script.port}"
    assert started.stdout == f"ready at {url}/v1 (session test, log {script.log})\n"
    service = Address(url)
    key = {"authorization": "Bearer secret"}
    assert service.chat().status_code == 401
    assert service.chat(headers=key, ignore_eos=True).json()["usage"]["completion_tokens"] == 5
    assert "secret" not in script.log.read_text() + subprocess.check_output(["ps", "ax", "-o", "args"], text=True)

    tail = script.folder / "tail"
    tail.write_text('#!/bin/sh\necho "tail $*"\n')
    tail.chmod(0o755)
    followed = script("logs", LOG="/elsewhere", PATH=f"{script.folder}:{os.environ['PATH']}").stdout
    assert followed == f"tail -n 100 -F {script.log}\n"

    first = script.server
    assert script("status").returncode == 0
    os.kill(first, signal.SIGKILL)
    eventually(lambda: script.server not in (0, first) and script("status").returncode == 0, "it is ready again")
    assert "status 137 and is started again" in script.log.read_text()

    again = script("start")
    assert (again.returncode, "runs already" in again.stderr) == (1, True)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(service.chat, headers=key, max_tokens=60, ignore_eos=True)
        eventually(lambda: service.sample("microbatch_output_tokens_total") > 0, "it answers")
        assert script("stop").returncode == 0
        assert answer.result().json()["usage"]["completion_tokens"] == 60
    assert script("status").returncode == 3


def test_a_server_that_fails_while_it_stops_is_not_started_again(script: Script) -> None:
    assert script("start", *SMALL).returncode == 0
    service, server = Address(f"http://127.0.0.1:{script.port}"), script.server
    with ThreadPoolExecutor(2) as pool:
        pool.submit(service.chat, max_tokens=900, ignore_eos=True)
        eventually(lambda: service.sample("microbatch_output_tokens_total") > 0, "it answers")
        stopped = pool.submit(script, "stop")
        eventually(lambda: service.get("/health/ready").json()["state"] == "draining", "it finishes its answer")
        os.kill(server, signal.SIGKILL)
        assert stopped.result().returncode == 0
    assert script("status").returncode == 3
    assert "started again" not in script.log.read_text()


def test_it_starts_whatever_shell_its_user_has(script: Script) -> None:
    shell = script.folder / "fish"
    shell.write_text('#!/bin/sh\n/bin/sh "$@"\nexit $?\n')  # a process of its own for each command, as fish has
    shell.chmod(0o755)
    started = script("start", *SMALL, "--name", "two words", SHELL=str(shell), START_TIMEOUT="60")
    assert started.returncode == 0, started.stderr
    assert Address(f"http://127.0.0.1:{script.port}").get("/v1/models").json()["data"][0]["id"] == "two words"
    assert script("stop").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "variables", "reason"),
    [
        (["--nope"], {}, "--nope"),
        (["--host", "0.0.0.0"], {}, "MICROBATCH_HOST"),
        ([], {"MODEL": "/nowhere"}, "there is no file or folder /nowhere"),
        ([], {"MODEL": "./empty"}, "there is no config.json in empty"),
        ([], {"PYTHON": "/nowhere/python"}, "make install"),
    ],
)
def test_what_cannot_start_says_why_and_leaves_no_session(
    arguments: list[str], variables: dict[str, str], reason: str, script: Script
) -> None:
    (script.folder / "empty").mkdir()
    failed = script("start", *arguments, **variables)
    assert failed.returncode == 1
    assert reason in failed.stderr
    assert script("status").returncode == 3


def test_a_port_in_use_is_told_before_a_session_is_made(script: Script) -> None:
    with live() as other:
        script.port = int(other.url.rpartition(":")[2])
        failed = script("start")
    assert failed.returncode == 1
    assert "another PORT" in failed.stderr
