"""Laws of the watchdog: what is stuck ends the process, what is only slow does not, and probes never wait."""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest

from batching.events import BatchEnded, BatchStarted, Outcome, Stepped
from batching.progress import Progress
from server.watchdog import LOOKS, stuck
from tests.live import eventually, live, process, scripted
from tests.server.test_app import error_of

STARTED = BatchStarted(rows=1, prompt_tokens=1, padded_tokens=1, window_wait=0.0, queue_waits=(0.0,))


@pytest.fixture
def progress() -> Progress:
    return Progress()


@pytest.fixture
def looks_until_stuck(monkeypatch: pytest.MonkeyPatch, progress: Progress) -> Callable[[Iterable[object]], int | None]:
    """How often the watchdog looks until it finds the worker stuck, None if it does not while `between` goes on.

    Each item of `between` happens while the watchdog sleeps, after its start.
    """

    def count(between: Iterable[object]) -> int | None:
        happening, looks = iter(between), 0

        async def sleep(seconds: float) -> None:
            nonlocal looks
            assert seconds == 60.0 / LOOKS
            try:
                next(happening)
            except StopIteration:
                raise TimeoutError from None
            looks += 1

        monkeypatch.setattr(asyncio, "sleep", sleep)
        try:
            asyncio.run(stuck(progress, 60.0))
        except TimeoutError:
            return None
        return looks

    return count


def test_a_worker_without_work_is_not_stuck(
    progress: Progress, looks_until_stuck: Callable[[Iterable[object]], int | None]
) -> None:
    assert looks_until_stuck(range(100)) is None
    progress(STARTED)
    progress(BatchEnded(rows=1, running=0, duration=1.0, memory=0))
    assert looks_until_stuck(range(100)) is None


def test_a_worker_with_work_that_makes_no_progress_is_stuck(
    progress: Progress, looks_until_stuck: Callable[[Iterable[object]], int | None]
) -> None:
    progress(STARTED)
    assert looks_until_stuck(range(100)) == LOOKS


@pytest.mark.parametrize(
    "sign",
    [
        lambda progress: progress(Stepped(at=0.0, tokens=1, running=1)),
        lambda progress: progress(STARTED),
        lambda progress: progress.mark(),
    ],
    ids=["a step", "another batch", "a layer of a long prompt"],
)
def test_each_sign_of_progress_starts_the_time_anew(
    sign: Callable[[Progress], object],
    progress: Progress,
    looks_until_stuck: Callable[[Iterable[object]], int | None],
) -> None:
    progress(STARTED)
    assert looks_until_stuck(sign(progress) if n % (LOOKS - 1) == 0 else None for n in range(100)) is None
    assert looks_until_stuck(sign(progress) if n == 4 else None for n in range(100)) == 5 + LOOKS


def test_a_mark_without_a_batch_is_no_work(progress: Progress) -> None:
    progress.mark()
    assert progress.at is None
    assert progress.seconds() == 0.0


def test_probes_and_scrapes_do_not_wait_for_generation() -> None:
    with live(scripted(stepped=True)) as service, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(service.chat, stream=stream) for stream in (False, True)]
        service.wait_running()
        for path in ("/health/live", "/health/ready", "/metrics", "/version"):
            assert service.get(path).status_code == 200
        assert service.sample("microbatch_worker_seconds_since_progress") > 0
        assert not any(answer.done() for answer in answers)
        service.engine.release(100)
        assert [answer.result().status_code for answer in answers] == [200, 200]
        eventually(lambda: service.sample("microbatch_worker_seconds_since_progress") == 0, "there is no work")


def test_a_stuck_worker_turns_liveness_red_and_fails_what_waits() -> None:
    with live(scripted(stepped=True), max_batch_size=1, watchdog_s=0.2) as service, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(service.chat) for _ in range(2)]
        for answer in answers:
            error_of(answer.result(), 500, "engine_error")
        assert service.get("/health/live").status_code == 503
        assert service.get("/health/ready").status_code == 503
        error_of(service.chat(), 503, "service_failed")
        eventually(service.service.stopped.is_set, "the process is to end")
        assert service.service.exit_code == 1
        assert [row.outcome for row in service.wait_ended(2)] == [Outcome.ERROR] * 2


@pytest.mark.parametrize(
    ("fail", "reason"), [("hang", "no progress for 0.5 s"), ("break_device", "an illegal memory access")]
)
def test_the_process_ends_with_an_error_so_that_its_supervisor_restarts_it(fail: str, reason: str) -> None:
    with process("--watchdog-s", "0.5", module="tests.failing_server", FAIL=fail) as service:
        service.wait_ready()
        response = service.chat(stream=True)
        assert "engine_error" in response.text
        assert service.wait() == 1
    assert reason in "".join(service.lines)
