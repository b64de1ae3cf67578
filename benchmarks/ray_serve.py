"""Ray Serve with the file of deploy/ray, on this machine."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from benchmarks.contenders import free_port

ROOT = Path(__file__).parent.parent
STOP_SECONDS = 30


def installed() -> bool:
    """Whether Ray is."""
    return find_spec("ray") is not None


def configuration(port: int, replicas: int, variables: Mapping[str, str]) -> dict[str, Any]:
    """The deployed file with this port of 127.0.0.1, this many replicas, and the service's settings as variables. A
    replica has no GPU if it runs on the CPU."""
    import yaml

    read: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text())
    read["http_options"] |= {"host": "127.0.0.1", "port": port}
    [deployment] = next(one["deployments"] for one in read["applications"] if one["name"] == "microbatch")
    del deployment["autoscaling_config"]
    gpus = 0 if variables.get("MICROBATCH_DEVICE") == "cpu" else 1
    deployment["num_replicas"] = replicas
    deployment["ray_actor_options"] = {"num_cpus": 0, "num_gpus": gpus, "runtime_env": {"env_vars": dict(variables)}}
    return read


@contextlib.contextmanager
def ray_serving(replicas: int, folder: Path, variables: Mapping[str, str]) -> Iterator[tuple[SplitResult, Path]]:
    """`serve run`, not ready yet: its address and its log. Ended with all that it started."""
    import yaml

    port = free_port()
    file, log = folder / f"serve-{replicas}.yaml", folder / f"serve-{replicas}.log"
    file.write_text(yaml.safe_dump(configuration(port, replicas, variables)))
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(file)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {"RAY_AUTH_MODE": "disabled"} | os.environ | {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
    with (
        log.open("wb") as sink,
        subprocess.Popen(command, stdout=sink, stderr=sink, env=environment, cwd=ROOT, start_new_session=True) as popen,
    ):
        try:
            yield urlsplit(f"http://127.0.0.1:{port}"), log
        finally:
            popen.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                popen.wait(STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(popen.pid, signal.SIGKILL)
