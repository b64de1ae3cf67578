"""Ray Serve with two replicas on a CPU, started as the guide says: load, a crash, an update."""

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil  # type: ignore[import-untyped]
import pytest
import yaml
from openai import OpenAI

from batching.types import DEFAULT_ROWS
from server.http.middleware import allowed_hosts
from server.settings import Settings
from tests.live import QUESTION, ROOT, Address, environment, free_port
from tests.server.test_tracing import PARENT, TRACE, Collector, collecting

CONFIG = ROOT / "deploy" / "ray" / "serve.yaml"
LONG: dict[str, Any] = {"ignore_eos": True, "max_tokens": 100}
ROWS = 4
"""Of a batch in these tests."""
SLOW = 240.0
"""Seconds of patience with processes of Ray and two models on two cores."""
TOKEN = secrets.token_hex(32)
MODEL = "smollm2-135m-instruct"
REPLICA = "ray::ServeReplica:microbatch"


def config(port: int, **settings: str) -> dict[str, Any]:
    """The deployed file, but for two replicas of the demo model on a CPU."""
    read: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    read["http_options"] |= {"host": "127.0.0.1", "port": port}
    deployment = deployment_of(read)
    del deployment["autoscaling_config"]
    settings |= {"max_batch_size": str(ROWS)}
    small = {"MICROBATCH_CONTEXT_WINDOW": "1024", "MICROBATCH_TOKEN_BUDGET": "16384", "OMP_NUM_THREADS": "1"}
    variables = small | {f"MICROBATCH_{name.upper()}": value for name, value in settings.items()}
    deployment |= {
        "num_replicas": 2,
        "graceful_shutdown_timeout_s": 60,
        "max_ongoing_requests": deployment["max_ongoing_requests"] * ROWS // 64,
        "ray_actor_options": {"num_cpus": 0.1, "num_gpus": 0, "runtime_env": {"env_vars": variables}},
    }
    return read


def deployment_of(configuration: dict[str, Any]) -> dict[str, Any]:
    [deployment] = next(one["deployments"] for one in configuration["applications"] if one["name"] == "microbatch")
    found: dict[str, Any] = deployment
    return found


@dataclass
class Cluster(Address):
    """`serve run` and what it wrote so far."""

    folder: Path
    popen: subprocess.Popen[str]
    collector: Collector
    lines: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def http(self, **options: Any) -> Iterator[httpx2.Client]:
        with httpx2.Client(base_url=self.url, timeout=SLOW, trust_env=False, **options) as client:
            yield client

    def replicas(self) -> list[Any]:
        """The processes of the replicas."""
        return [each for each in descendants(self.popen.pid) if title(each).startswith(REPLICA)]

    def answered(self) -> dict[str, float]:
        """How many requests each replica has answered, by its name."""
        return self._by_replica("microbatch_request_duration_seconds_count", ("outcome", "answered"))

    def _by_replica(self, metric: str, label: tuple[str, str]) -> dict[str, float]:
        return {
            dict(labels)["replica"]: value
            for (name, labels), value in self.samples().items()
            if name == metric and label in labels
        }

    def deploy(self, configuration: dict[str, Any]) -> None:
        """`serve deploy`, as for an update."""
        file = self.folder / "update.yaml"
        file.write_text(yaml.safe_dump(configuration))
        dashboard = re.search(r"View the dashboard at \S*?(http://[\d.:]+)", "".join(self.lines))
        assert dashboard
        command = [program("serve"), "deploy", "--address", dashboard[1], str(file)]
        done = subprocess.run(command, cwd=ROOT, env=ray_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def descendants(pid: int) -> list[Any]:
    """The processes that a process has started, and so on; none if it is gone."""
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def title(process: Any) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def ray_environment() -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "NO_COLOR": "1"}
    # The router asks replicas how busy they are, and two models on two cores answer late.
    own["RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S"] = "1"
    return environment(**own, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)


def wait(condition: Any, what: str) -> None:
    """`eventually`, with more patience."""
    given_up = threading.Event()
    timer = threading.Timer(SLOW, given_up.set)
    timer.start()
    try:
        while not condition():
            assert not given_up.wait(0.2), f"never came true: {what}"
    finally:
        timer.cancel()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as found:
        yield found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Cluster]:
    folder, port = tmp_path_factory.mktemp("ray"), free_port()
    (folder / "serve.yaml").write_text(
        yaml.safe_dump(config(port, default_max_tokens="5", otlp_endpoint=collector.url))
    )
    command = [program("serve"), "run", str(folder / "serve.yaml")]
    with subprocess.Popen(
        command, cwd=ROOT, env=ray_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as popen:
        found = Cluster(f"http://127.0.0.1:{port}", folder, popen, collector)
        reader = threading.Thread(target=lambda: found.lines.extend(popen.stdout or ()))
        reader.start()
        try:
            wait(lambda: popen.poll() is not None or ready(found), "the replicas are ready")
            assert popen.poll() is None, "".join(found.lines)
            wait(lambda: len(found.answered()) == 2, "both replicas are heard of")
            yield found
        finally:
            processes = descendants(popen.pid)
            popen.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                popen.wait(10)
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            popen.kill()
            reader.join()


def ready(cluster: Cluster) -> bool:
    try:
        return cluster.get("/health/ready").status_code == 200
    except httpx2.TransportError:
        return False


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as executor:
        yield executor


def test_the_file_waits_longer_than_the_service_and_has_only_its_settings() -> None:
    read = yaml.safe_load(CONFIG.read_text())
    deployment = deployment_of(read)
    limit = Settings.model_fields["request_timeout_s"].default
    assert read["http_options"]["request_timeout_s"] > limit
    assert deployment["graceful_shutdown_timeout_s"] > limit
    defaults = Settings.model_fields
    target = deployment["autoscaling_config"]["target_ongoing_requests"]
    assert deployment["max_ongoing_requests"] == 2 * target
    assert 2 * DEFAULT_ROWS <= 2 * target <= defaults["queue_size"].default
    variables = deployment["ray_actor_options"]["runtime_env"]["env_vars"]
    assert {name.removeprefix("MICROBATCH_").lower() for name in variables} <= set(defaults)
    assert variables["MICROBATCH_HOST"] == read["http_options"]["host"]
    assert "*" in allowed_hosts(variables["MICROBATCH_HOST"], ()), "clients ask for the machine by any name"


@pytest.mark.deploy
@pytest.mark.model
def test_two_replicas_share_a_load(cluster: Cluster, pool: ThreadPoolExecutor) -> None:
    before = cluster.answered()
    answers = [pool.submit(cluster.chat, stream=n % 2 == 0) for n in range(64)]
    assert [answer.result().status_code for answer in answers] == [200] * 64

    def shares() -> list[float]:
        return [count - before[replica] for replica, count in cluster.answered().items()]

    wait(lambda: sum(shares()) == 64, "each replica has told what it answered")
    assert min(shares()) > 0


@pytest.mark.deploy
@pytest.mark.model
def test_a_request_is_traced_as_the_settings_say(cluster: Cluster) -> None:
    assert cluster.chat(headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}).status_code == 200
    trace = bytes.fromhex(TRACE)
    wait(lambda: any(span.trace_id == trace for span in cluster.collector.spans), "its spans have come")


@pytest.mark.deploy
@pytest.mark.model
def test_a_session_stays_where_its_prefix_is(cluster: Cluster) -> None:
    text = " ".join(f"{number} is a number." for number in range(60))
    for number in range(6):
        messages: list[Any] = [{"role": "user", "content": f"Text {number}: {text}"}]
        for turn in range(3):
            answer = cluster.chat(messages=messages, headers={"x-session-id": f"session {number}"}).json()
            assert turn == 0 or answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 200
            messages = [*messages, answer["choices"][0]["message"], {"role": "user", "content": "And then?"}]


@pytest.mark.deploy
@pytest.mark.model
def test_a_replica_that_dies_takes_only_its_own_requests_along_and_comes_back(
    cluster: Cluster, pool: ThreadPoolExecutor
) -> None:
    names = set(cluster.answered())
    lost, kept = cluster.replicas()
    answers: list[Future[Any]] = [pool.submit(cluster.chat, **LONG) for _ in range(10)]
    with cluster.openai(max_retries=5, timeout=SLOW) as client:
        patient = [pool.submit(complete, client) for _ in range(3)]
        running = "microbatch_running_rows"
        wait(lambda: all(cluster.sample(running, replica=name) for name in names), "both replicas run")
        os.kill(lost.pid, signal.SIGKILL)
        statuses = [answer.result().status_code for answer in answers]
        # A client that tries again as OpenAI's does, gets its answer.
        assert [answer.result() for answer in patient] == [40] * 3
    assert 200 in statuses
    assert all(status == 200 or status >= 500 for status in statuses)
    assert len(set(statuses)) > 1
    assert kept.is_running()
    assert [cluster.chat().status_code for _ in range(4)] == [200] * 4
    wait(lambda: len(cluster.replicas()) == 2 and len(set(cluster.answered()) - names) == 1, "another one is there")
    wait(lambda: len(cluster.answered()) == 2, "the dead one is forgotten")


def complete(client: OpenAI) -> int:
    """The length of an answer that OpenAI's client asked for."""
    extra = {"ignore_eos": True}
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=40, extra_body=extra)
    assert answer.usage is not None
    return answer.usage.completion_tokens


@pytest.mark.deploy
@pytest.mark.model
def test_an_update_fails_no_request(cluster: Cluster, pool: ThreadPoolExecutor) -> None:
    over = threading.Event()
    old = set(cluster.answered())

    def ask() -> list[int]:
        statuses: list[int] = []
        while not over.is_set():
            statuses.append(cluster.chat(stream=len(statuses) % 2 == 0).status_code)
        return statuses

    clients = [pool.submit(ask) for _ in range(4)]
    try:
        cluster.deploy(config(int(cluster.url.rpartition(":")[2]), default_max_tokens="7"))
        wait(lambda: len(set(cluster.answered()) - old) == 2, "both replicas are new ones")
        wait(lambda: not set(cluster.answered()) & old, "the old ones have gone")
    finally:
        over.set()
    statuses = [status for client in clients for status in client.result()]
    assert len(statuses) > 8
    assert set(statuses) == {200}
    assert cluster.chat(ignore_eos=True).json()["usage"]["completion_tokens"] == 7
