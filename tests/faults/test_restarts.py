"""The process itself: killed under a supervisor with clients that try again, and stopped in the midst of answers."""

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from tests.live import PATIENCE, ROOT, Address, Process, environment, eventually, free_port, process

CLIENTS = 8


class Supervisor(Address):
    """Starts the service again whenever it ends, as systemd would, until it is told to stop. The first one's engine
    hangs after a step. Batches are of four requests."""

    def __init__(self) -> None:
        self._port = free_port()
        super().__init__(f"http://127.0.0.1:{self._port}")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep)
        self._asking = threading.Lock()
        self.statuses: list[int] = []
        self.running: subprocess.Popen[bytes] | None = None

    def wait_ready(self) -> None:
        """Until requests are taken. One thread at a time asks, so that the service's start has the cores."""
        with self._asking:
            eventually(self._answers, "the service is ready", 5 * PATIENCE, pause=0.1)

    def _answers(self) -> bool:
        try:
            return self.get("/health/ready").status_code == 200
        except httpx2.TransportError:
            return False

    def _keep(self) -> None:
        while not self._over.is_set():
            command = [sys.executable, "-m", "tests.failing_server", "--port", str(self._port), "--log-level", "error"]
            command += ["--max-batch-size", "4", "--batch-window-ms", "10000"]
            variables = environment(FAIL="nothing" if self.statuses else "hang")
            with subprocess.Popen(command, cwd=ROOT, env=variables) as self.running:
                self.statuses.append(self.running.wait())

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        self._thread.start()
        try:
            self.wait_ready()
            yield
        finally:
            self._over.set()
            assert self.running is not None
            self.running.terminate()
            self._thread.join(PATIENCE)


def ask_until_answered(service: Supervisor, number: int) -> tuple[str, int]:
    """So many tokens' answer to a question, and how many times it was asked for."""
    messages = [{"role": "user", "content": "Hi"}]
    attempts = 0
    while True:
        attempts += 1
        with contextlib.suppress(httpx2.TransportError):
            answer = service.chat(messages=messages, max_tokens=number)
            if answer.status_code == 200:
                return str(answer.json()["choices"][0]["message"]["content"]), attempts
        service.wait_ready()


def test_after_a_kill_every_client_that_tries_again_is_answered() -> None:
    supervisor = Supervisor()
    with supervisor.keeping(), ThreadPoolExecutor(CLIENTS) as pool:
        numbers = [2 + n // 2 for n in range(CLIENTS)]
        asked = [pool.submit(ask_until_answered, supervisor, number) for number in numbers]
        eventually(lambda: supervisor.sample("microbatch_running_rows") == 4, "a batch runs")
        assert supervisor.running is not None
        supervisor.running.send_signal(signal.SIGKILL)
        found = [one.result() for one in asked]
        assert [answer for answer, _ in found] == ["Hello!"[:number] for number in numbers]
        assert all(attempts > 1 for _, attempts in found), "what was lost was asked for again"
    assert supervisor.statuses == [-signal.SIGKILL, 0]


def test_a_signal_in_the_midst_of_answers_is_an_outcome_for_each() -> None:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.rigged_server", "--step-ms", "20", "--max-batch-size", "4"]
    command += ["--port", str(port), "--drain-timeout-s", "0"]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) as popen:
        service = Process(f"http://127.0.0.1:{port}", popen)
        service.wait_ready()
        with ThreadPoolExecutor(CLIENTS) as pool:
            messages = [{"role": "user", "content": "Hi"}]
            asked = [
                pool.submit(service.chat, messages=messages, max_tokens=4000, ignore_eos=True, stream=bool(n % 2))
                for n in range(CLIENTS)
            ]
            eventually(lambda: service.sample("microbatch_output_tokens_total") >= 40, "a batch is in its midst")
            service.terminate()
            answers = [one.result() for one in asked]
        assert service.wait() == 0
        assert popen.stderr is not None
        lines = popen.stderr.read()
    assert lines.count(" request ") == CLIENTS
    assert all(answer.status_code == 503 or "stopping" in answer.text for answer in answers)
    assert lines.count("outcome=drained") == CLIENTS


@pytest.mark.parametrize(("fail", "signals"), [("load", 1), ("encode", 1), ("encode", 2)])
def test_a_thread_that_hangs_does_not_keep_the_process_from_ending(fail: str, signals: int) -> None:
    with process(module="tests.failing_server", FAIL=fail) as service, ThreadPoolExecutor() as pool:
        if fail == "encode":
            service.wait_ready()
            pool.submit(service.chat)
        eventually(lambda: "hangs\n" in service.lines, "a thread hangs")
        service.terminate()
        if signals == 2:
            eventually(lambda: any("state stopped" in line for line in service.lines), "the first signal is heard")
            service.terminate()
        assert service.wait() == (0 if signals == 1 else 128 + signal.SIGTERM)


def test_a_second_signal_ends_a_process_whose_event_loop_stands() -> None:
    with process(module="tests.failing_server", FAIL="stand") as service, ThreadPoolExecutor() as pool:
        service.wait_ready()
        pool.submit(service.chat)
        eventually(lambda: "hangs\n" in service.lines, "the event loop stands")
        service.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            service.popen.wait(0.5)
        service.terminate()
        assert service.wait() == 128 + signal.SIGTERM
