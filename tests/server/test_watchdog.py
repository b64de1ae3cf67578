"""Laws of the watchdog: what is stuck ends the process, what is only slow does not, and probes never wait."""

import asyncio
import contextlib
import io
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import httpx2
import pytest

from batching.events import BatchEnded, BatchStarted, Outcome, PromptScored, Stepped
from batching.progress import Progress
from server import watchdog
from server.watchdog import HELD, LOOK_SECONDS, LOOKS, Watchdog, end_process
from tests.failing_server import LOOP_FAILURES
from tests.live import eventually, live, process, scripted
from tests.server.test_app import error_of

STARTED = BatchStarted(rows=1, prompt_tokens=1, padded_tokens=1, window_wait=0.0, queue_waits=(0.0,))


class Loop:
    """An event loop that does what it is asked to as soon as it does not stand."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], object]] = []
        self.stands = False

    def call_soon_threadsafe(self, callback: Callable[..., object], *arguments: object) -> None:
        self._waiting.append(lambda: callback(*arguments))
        self.go_on()

    def go_on(self) -> None:
        while self._waiting and not self.stands:
            self._waiting.pop(0)()


class Watched:
    """A watchdog that looks only when it is told to, with a limit of 60 seconds; `told` is what it did."""

    def __init__(self, progress: Progress, limit: float = 60.0) -> None:
        self.told: list[str] = []
        self.lags: list[float] = []
        self.held_off: list[float] = []
        self.loop = Loop()
        self._dog = Watchdog(
            cast(asyncio.AbstractEventLoop, self.loop),
            limit,
            progress,
            lambda: self.told.append("worker"),
            self.lags.append,
            self.told.append,
            self.held_off.append,
        )
        self.looks = round(limit / min(LOOK_SECONDS, limit / LOOKS))

    def look(self, times: int) -> list[str]:
        """What it did meanwhile."""
        before = len(self.told)
        for _ in range(times):
            self._dog.look()
        return self.told[before:]


@pytest.fixture
def progress() -> Progress:
    return Progress()


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the watchdog logs."""
    found: list[str] = []
    monkeypatch.setattr(watchdog, "tell", lambda level, message: found.append(message))
    return found


@pytest.fixture
def watched(progress: Progress, lines: list[str]) -> Watched:
    return Watched(progress)


# The worker


def test_a_worker_without_work_is_not_stuck(progress: Progress, watched: Watched) -> None:
    assert watched.look(10 * watched.looks) == []
    progress(STARTED)
    progress(BatchEnded(running=0, duration=1.0))
    assert watched.look(10 * watched.looks) == []


def test_a_worker_with_work_that_makes_no_progress_is_stuck(progress: Progress, watched: Watched) -> None:
    progress(STARTED)
    assert watched.look(watched.looks) == []  # at the first look the work was news
    assert watched.look(1) == ["worker"]
    assert watched.look(10 * watched.looks) == []


@pytest.mark.parametrize(
    "sign",
    [
        lambda progress: progress(Stepped(tokens=1, running=1, rows=1)),
        lambda progress: progress(STARTED),
        lambda progress: progress(PromptScored(tokens=256, running=1)),
        lambda progress: progress.mark(),
    ],
    ids=["a step", "another batch", "a piece of a prompt", "a layer of a long prompt"],
)
def test_each_sign_of_progress_starts_the_time_anew(
    sign: Callable[[Progress], object], progress: Progress, watched: Watched
) -> None:
    progress(STARTED)
    for _ in range(5):
        assert watched.look(watched.looks - 1) == []
        sign(progress)
    assert watched.look(watched.looks) == []
    assert watched.look(1) == ["worker"]


def test_a_worker_whose_news_the_loop_cannot_take_is_not_stuck(progress: Progress, watched: Watched) -> None:
    progress(STARTED)
    watched.look(watched.looks - 1)
    watched.loop.stands = True
    assert watched.look(watched.looks // 2) == []
    progress(Stepped(tokens=1, running=1, rows=1))
    watched.loop.stands = False
    watched.loop.go_on()
    assert watched.look(watched.looks) == []


# The loop


def test_a_loop_that_answers_each_time_does_not_stand(watched: Watched) -> None:
    assert watched.look(10 * watched.looks) == []
    assert len(watched.lags) == 10 * watched.looks


def test_a_loop_that_does_not_answer_within_the_limit_is_the_end(watched: Watched) -> None:
    watched.loop.stands = True
    assert watched.look(watched.looks) == []  # at the first look it was asked
    [reason] = watched.look(1)
    assert "the event loop was blocked for 60 s; exiting" in reason
    assert watched.look(10 * watched.looks) == []


def test_each_answer_of_the_loop_starts_the_time_anew(watched: Watched) -> None:
    for _ in range(5):
        watched.loop.stands = True
        assert watched.look(watched.looks) == []
        watched.loop.stands = False
        watched.loop.go_on()
        assert watched.look(1) == []
    assert len(watched.lags) == 10


def test_a_loop_that_stands_for_a_second_is_told_once_with_where_it_is(watched: Watched, lines: list[str]) -> None:
    watched.loop.stands = True
    watched.look(round(1 / LOOK_SECONDS))
    assert lines == []
    watched.look(watched.looks // 2)
    [line] = lines
    assert line.startswith("the event loop was blocked for 1 s. It is in ")
    assert "server/test_watchdog.py" in line
    assert "\n" not in line


@pytest.mark.parametrize("limit", [0.1, 1.0, 7.3, 120.0, 1000.0])
def test_what_ends_the_process_without_the_watchdog_is_held_off_in_time(limit: float) -> None:
    watched = Watched(Progress(), limit)
    watched.look(watched.looks)
    assert len(watched.held_off) >= LOOKS - 1
    assert set(watched.held_off) == {HELD * limit}


def test_a_log_that_nobody_reads_does_not_keep_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    monkeypatch.setattr(watchdog, "TELL_SECONDS", 0.01)
    stuck = logging.StreamHandler(io.StringIO())
    logger = logging.getLogger("server.watchdog")
    logger.addHandler(stuck)
    try:
        with stuck.lock:  # type: ignore[union-attr]
            end_process("nobody hears this")
    finally:
        logger.removeHandler(stuck)
    assert statuses == [1]


# What both keep


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
    ("fail", "reason"),
    [
        ("hang", "no progress for 1 s"),
        ("break_device", "an illegal memory access"),
        ("stand", "the event loop was blocked for 1 s; exiting. It is in "),
        ("hold", "Timeout (0:00:03"),
    ],
)
def test_the_process_ends_with_an_error_so_that_its_supervisor_restarts_it(fail: str, reason: str) -> None:
    flags = ("--watchdog-s", "1", "--log-level", "debug")
    with process(*flags, module="tests.failing_server", FAIL=fail) as service:
        service.wait_ready()
        with contextlib.suppress(httpx2.TransportError):  # a loop that stands answers nobody
            assert "engine_error" in service.chat(stream=True).text
        assert service.wait() == 1
    lines = "".join(service.lines)
    assert reason in lines
    assert fail not in LOOP_FAILURES or fail in lines.partition(reason)[2], "where the loop is"
    assert fail in LOOP_FAILURES or "Executing <" in lines, "what kept the loop for a moment"
