"""The image's steps done in a clean environment, and compose's file against its own specification."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson
import pytest
import yaml
from compose_spec import PyCompose

from batching.checkpoint import locate
from server.settings import Settings
from tests.deploy.dockerfile import Replay, Stage, command, stages
from tests.live import PATIENCE, ROOT, SMALL, Process, environment, free_port

FOLDER = ROOT / "deploy" / "docker"
DOCKERFILE = FOLDER / "Dockerfile"
STAGES = {stage.name: stage for stage in stages(DOCKERFILE)}


def interpolated(text: str, variables: dict[str, str]) -> str:
    """As compose fills in ${NAME:-default}."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: variables.get(match[1], match[2]), text)


def compose(**variables: str) -> dict[str, Any]:
    """The file as compose reads it. Raises ValueError where it is not what its specification allows."""
    read: dict[str, Any] = yaml.safe_load(interpolated((FOLDER / "compose.yaml").read_text(), variables))
    PyCompose.from_json(orjson.dumps(read).decode())
    return read


def sources(stage: Stage) -> list[str]:
    """What a stage copies from the checkout."""
    return [source for rest in stage.of("COPY") if "--from" not in rest for source in rest.split()[:-1]]


def test_the_linter_has_nothing_to_say() -> None:
    linted = subprocess.run([Path(sys.executable).parent / "hadolint", DOCKERFILE], capture_output=True, text=True)
    assert (linted.returncode, linted.stdout + linted.stderr) == (0, "")


def test_all_that_is_copied_exists_and_is_let_through_and_nothing_else_is() -> None:
    rules = (FOLDER / "Dockerfile.dockerignore").read_text().split()
    assert rules[0] == "*"
    allowed = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = {source for stage in STAGES.values() for source in sources(stage)}
    assert {source.partition("/")[0] for source in copied} == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_the_image_runs_without_rights_and_holds_no_model() -> None:
    runtime = STAGES["runtime"]
    assert runtime.last("USER") == "10001"
    assert "useradd --uid 10001" in " ".join(runtime.of("RUN"))
    held = STAGES["build"].of("RUN") + runtime.of("RUN")
    assert not any(fnmatch(run, "*smollm2*") for run in held)
    assert STAGES[""].base == "runtime"  # what is built when no target is named
    written = runtime.environment()
    names = {name.removeprefix("MICROBATCH_").lower() for name in written if name.startswith("MICROBATCH_")}
    assert names <= set(Settings.model_fields)


@pytest.mark.deploy
@pytest.mark.model
def test_its_steps_in_a_clean_environment_make_a_service_that_runs(folder: Path) -> None:
    places = {"/src": folder / "src", "/opt/venv": folder / "venv"}
    places["/src"].mkdir()
    kept = {name: value for name, value in environment().items() if name.startswith(("PIP_", "HOME", "PATH"))}
    replay = Replay(ROOT, places, kept | {"PIP_NO_COMPILE": "1"})  # most of what is installed is never imported here
    replay.run(STAGES["build"])
    replay.run(STAGES["demo-packages"])

    runtime, port = STAGES["runtime"], str(free_port())
    variables = replay.variables | {
        name: replay.here(value.replace("$PATH", os.environ["PATH"])) for name, value in runtime.environment().items()
    }
    variables |= {"MICROBATCH_HOST": "127.0.0.1", "MICROBATCH_PORT": port, "OMP_NUM_THREADS": "1"}
    python = str(places["/opt/venv"] / "bin" / "python")
    entry = [python, *command(runtime.last("ENTRYPOINT"))[1:]]
    check = [python, *command(runtime.last("HEALTHCHECK"))[1:]]
    subprocess.run([python, "-c", "import server.app, batching.padded"], cwd=folder, env=variables, check=True)

    def healthy() -> bool:
        return subprocess.run(check, env=variables, cwd=folder, capture_output=True).returncode == 0

    assert not healthy()
    model = ["--model", locate(None, "auto", Settings.model_fields["cache_dir"].default)]
    with subprocess.Popen([*entry, *model, *SMALL], cwd=folder, env=variables, text=True) as popen:
        try:
            service = Process(f"http://127.0.0.1:{port}", popen)
            service.wait_ready()
            assert healthy()
            assert service.chat(max_tokens=2).status_code == 200
            assert service.get("/docs").status_code == 200  # files that are no Python are there too
            service.terminate()
            assert popen.wait(PATIENCE) == 0
        finally:
            popen.kill()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that is gone after the test, because what it holds is large."""
    with TemporaryDirectory() as name:
        yield Path(name)


def test_compose_is_what_its_specification_allows() -> None:
    for variables in ({}, {"MODEL": "/models/Qwen3-4B", "GPU": "1", "PORT": "8080", "NAME": "other"}):
        services = compose(**variables)["services"]
        assert set(services) == {"microbatch", "demo", "prometheus", "grafana"}
    with pytest.raises(ValueError, match="nope"):
        PyCompose.from_yaml("services: {a: {image: b, nope: 1}}")


def test_compose_mounts_what_exists_builds_what_there_is_and_waits_long_enough() -> None:
    services = compose(MODEL=str(ROOT))["services"]
    for service in services.values():
        # When a machine is shut down, the server drains and ends with 0, which is no failure.
        assert service["restart"] == "unless-stopped"
        for mount in service.get("volumes", []):
            source = mount.split(":")[0] if isinstance(mount, str) else mount["source"]
            if source.startswith((".", "/")):
                assert (FOLDER / source).resolve().exists(), source
        if build := service.get("build"):
            assert (FOLDER / build["context"]).resolve() == ROOT
            assert ROOT / build["dockerfile"] == DOCKERFILE
            assert build["target"] in STAGES
            drain = Settings.model_fields["drain_timeout_s"].default
            assert service["init"] is True
            assert float(service["stop_grace_period"].removesuffix("s")) >= drain + 10
    assert services["microbatch"]["profiles"] == ["gpu"]
    assert services["demo"]["profiles"] == ["cpu"]


def test_prometheus_and_grafana_in_compose_find_each_other_and_the_service() -> None:
    services = compose()["services"]
    assert yaml.safe_load((FOLDER / "targets.yml").read_text()) == [{"targets": ["microbatch:21010"]}]
    for name in ("microbatch", "demo"):
        assert services[name]["networks"]["default"]["aliases"] == ["microbatch"]
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    [provider] = yaml.safe_load((provisioning / "dashboards" / "microbatch.yml").read_text())["providers"]
    mounted = [str(mount) for mount in services["grafana"]["volumes"]]
    assert any(f":{provider['options']['path']}/" in mount for mount in mounted)


def test_its_environment_file_has_only_settings() -> None:
    names = re.findall(r"^#?MICROBATCH_(\w+)=", (FOLDER / "microbatch.env").read_text(), re.MULTILINE)
    assert names
    assert {name.lower() for name in names} <= set(Settings.model_fields)
