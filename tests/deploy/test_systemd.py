"""The unit as systemd reads it, and what it starts and stops, with the environment that it gives and no other."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from server.settings import Settings
from tests.live import PATIENCE, ROOT, SMALL, Process, free_port

FOLDER = ROOT / "deploy" / "systemd"
UNIT = FOLDER / "microbatch.service"
INSTALLED = "/opt/microbatch"
MOST_EXPOSED = 25
"""Of systemd's ten points of exposure, in tenths: its own word up to there is OK."""


def values(key: str) -> list[str]:
    """What the unit says under a key, in its order."""
    return re.findall(rf"^{key}=(.*)$", UNIT.read_text(), re.MULTILINE)


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    assert program, "systemd-analyze is not installed"
    return subprocess.run([program, *arguments], capture_output=True, text=True)


@pytest.mark.deploy
def test_systemd_takes_the_unit_without_a_word(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    # Verification looks for the program, which here is the one that runs this test.
    unit.write_text(UNIT.read_text().replace(f"{INSTALLED}/.venv/bin/python", sys.executable))
    verified = analyze("verify", str(unit))
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")


@pytest.mark.deploy
def test_systemd_finds_little_that_the_service_may_do() -> None:
    assessed = analyze("security", "--offline=true", f"--threshold={MOST_EXPOSED}", str(UNIT))
    assert assessed.returncode == 0, assessed.stdout + assessed.stderr
    exposure = re.search(r"exposure level for microbatch.service: ([\d.]+)", assessed.stdout)
    assert exposure
    assert float(exposure[1]) <= MOST_EXPOSED / 10


def test_systemd_waits_longer_than_the_service_may_take_to_stop() -> None:
    drain = Settings.model_fields["drain_timeout_s"].default
    [stop] = values("TimeoutStopSec")
    assert float(stop) >= drain + 10


def test_every_variable_is_a_setting() -> None:
    text = (FOLDER / "microbatch.env").read_text() + "\n".join(values("Environment"))
    names = re.findall(r"MICROBATCH_([A-Z_]+)=", text)
    assert len(names) > 4
    assert {name.lower() for name in names} <= set(Settings.model_fields)


@pytest.mark.deploy
@pytest.mark.model
def test_what_the_unit_starts_serves_and_ends_well_at_its_stop_signal(tmp_path: Path) -> None:
    [start] = values("ExecStart")
    [given] = values("Environment")
    [stop] = values("KillSignal")
    command = [*shlex.split(start.replace(f"{INSTALLED}/.venv/bin/python", sys.executable)), *SMALL]
    environment = dict(pair.split("=", 1) for pair in given.replace("/var/cache", str(tmp_path)).split())
    environment |= {"MICROBATCH_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    # The model that was converted before, so that it is not converted once more.
    environment["MICROBATCH_CACHE_DIR"] = str(Settings.model_fields["cache_dir"].default)
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, text=True) as popen:
        try:
            service = Process(f"http://127.0.0.1:{environment['MICROBATCH_PORT']}", popen)
            service.wait_ready()
            assert service.chat(max_tokens=2).status_code == 200
            popen.send_signal(signal.Signals[stop])
            assert popen.wait(PATIENCE) == 0
        finally:
            popen.kill()
