"""A real Prometheus for tests: Debian's package, with the deployed configuration and rules."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import yaml

from deploy.grafana.preview import Prometheus
from tests.live import PATIENCE, ROOT, eventually, free_port

FOLDER = ROOT / "deploy" / "prometheus"


def found(program: str) -> str:
    path = shutil.which(program)
    assert path, f"{program} is not installed"
    return path


@contextlib.contextmanager
def prometheus(folder: Path, server: str) -> Iterator[Prometheus]:
    """With the deployed configuration, but for the server's address and a scrape every half second."""
    config: dict[str, Any] = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "1s"}
    config["rule_files"] = [str(FOLDER / name) for name in config["rule_files"]]
    (folder / "targets.yml").write_text(yaml.safe_dump([{"targets": [server.removeprefix("http://")]}]))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        found("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stderr=log) as popen:
        try:
            eventually(lambda: popen.poll() is not None or answers(f"http://{address}/-/ready"), "Prometheus is ready")
            assert popen.poll() is None, (folder / "log").read_text()
            yield Prometheus(f"http://{address}")
        finally:
            popen.terminate()
            popen.wait(PATIENCE)


def answers(url: str) -> bool:
    try:
        return httpx2.get(url, trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False
