"""Laws of the loop guard, which all tests with a live server rely on."""

import asyncio
import gc
import threading
import time
from typing import Any

import pytest

from server.model.text import Text
from tests.live import live
from tests.loop_guard import LIMIT_SECONDS, LoopGuard


def keep() -> None:
    """Use more of the processor than a callback may."""
    end = time.thread_time() + 1.5 * LIMIT_SECONDS
    while time.thread_time() < end:
        pass


def wait() -> None:
    time.sleep(1.5 * LIMIT_SECONDS)


def collect() -> None:
    end = time.thread_time() + 1.5 * LIMIT_SECONDS
    while time.thread_time() < end:
        gc.collect()


async def nested() -> None:
    await asyncio.sleep(0)
    keep()


async def called(callback: object, guard: LoopGuard) -> list[str]:
    loop = asyncio.get_running_loop()
    with guard:
        loop.call_soon(callback)  # type: ignore[arg-type]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    return guard.slow


def test_a_callback_that_keeps_the_loop_is_told_with_its_name() -> None:
    [slow] = asyncio.run(called(keep, LoopGuard()))
    assert "test_loop_guard.py" in slow
    assert "keep" in slow


def test_a_task_that_keeps_the_loop_between_two_waits_is_told_with_what_it_awaits() -> None:
    async def main() -> list[str]:
        with LoopGuard() as guard:
            await asyncio.create_task(nested())
        return guard.slow

    [slow] = asyncio.run(main())
    assert "nested" in slow


@pytest.mark.parametrize("callback", [wait, collect])
def test_waiting_and_the_collector_are_nobody_s_fault(callback: object) -> None:
    assert asyncio.run(called(callback, LoopGuard())) == []


def test_other_threads_and_loops_that_are_not_watched_are_left_alone() -> None:
    guard = LoopGuard()
    thread = threading.Thread(target=lambda: asyncio.run(nested()))

    async def main() -> None:
        with guard:
            thread.start()
            await asyncio.get_running_loop().run_in_executor(None, thread.join)

    asyncio.run(main())
    asyncio.run(nested())
    assert guard.slow == []


def test_a_live_server_whose_loop_is_kept_fails_its_test(monkeypatch: pytest.MonkeyPatch) -> None:
    detokenizer = Text.detokenizer

    def slow(self: Text, **settings: Any) -> object:
        keep()
        return detokenizer(self, **settings)

    monkeypatch.setattr(Text, "detokenizer", slow)
    with pytest.raises(AssertionError, match="the event loop was kept for too long"), live() as service:
        assert service.chat().status_code == 200
