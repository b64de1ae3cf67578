"""Finds callbacks that keep an asyncio event loop for long: each costs every client of it that much.

What counts is processor time of the loop's thread, so that a busy machine blames nobody. Left out is what Python's
collector takes of it: in a test it goes through all that pytest has loaded.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from types import TracebackType
from typing import Any, Self

import anyio._backends._asyncio  # noqa: F401  # which anyio would do at its first use, on the loop

from server.watchdog import stack_of

FRAMES = 8
LIMIT_SECONDS = 0.02
SAMPLE_SECONDS = 0.002

ALLOWED: dict[str, str] = {
    "formatException": "a fault's traceback, for which the text of its lines is read from files",
    "_accept_connection": "asyncio's own, which accepts all connections that wait: on a busy machine a crowd's at once",
}
"""Functions that may take longer, by what `stack_of` calls them, and why."""

_run = asyncio.Handle._run
_guards: dict[int, LoopGuard] = {}


def _run_guarded(handle: asyncio.Handle) -> None:
    guard = _guards.get(threading.get_ident())
    if guard is None:
        _run(handle)
    else:
        guard.run(handle)


asyncio.Handle._run = _run_guarded  # type: ignore[assignment, method-assign]


class LoopGuard:
    """Entered on the thread of a loop, it watches that until it is left; `slow` tells of each callback over the limit.

    Where such a callback is can be seen only if Python gets to run another thread meanwhile. Of one that stays in
    native code it is told what was called.
    """

    def __init__(self) -> None:
        self.slow: list[str] = []
        self._begun: float | None = None  # processor time at which the callback began; None between two
        self._collecting = 0.0
        self._stack = ""
        self._over = threading.Event()

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(self._thread)
        _guards[self._thread] = self
        gc.callbacks.append(self._collect)
        self._sampler = threading.Thread(target=self._sample, name="loop-guard", daemon=True)
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del _guards[self._thread]
        gc.callbacks.remove(self._collect)
        self._over.set()
        self._sampler.join()

    def run(self, handle: asyncio.Handle) -> None:
        """Run a callback and take note if it took too long."""
        if self._begun is not None:  # a loop inside a callback
            return _run(handle)
        called = _name_of(handle)
        self._stack = ""
        self._begun = time.thread_time()
        try:
            _run(handle)
        finally:
            took, self._begun = time.thread_time() - self._begun, None
            if took > LIMIT_SECONDS and not any(name in self._stack + called for name in ALLOWED):
                self.slow.append(f"{took * 1000:.0f} ms: {called}: {self._stack or 'native code'}")

    def check(self) -> None:
        """Fail for what was too slow since the last time."""
        slow, self.slow = self.slow, []
        assert not slow, "the event loop was kept for too long:\n" + "\n".join(slow)

    def _collect(self, phase: str, info: dict[str, Any]) -> None:
        if threading.get_ident() != self._thread or self._begun is None:
            return
        if phase == "start":
            self._collecting = time.thread_time()
        else:
            self._begun += time.thread_time() - self._collecting

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            begun = self._begun
            if begun is not None and not self._stack and time.clock_gettime(self._clock) - begun > LIMIT_SECONDS / 2:
                self._stack = stack_of(self._thread, FRAMES)


def check_all() -> None:
    """The same for every loop that is watched."""
    for guard in list(_guards.values()):
        guard.check()


def _name_of(handle: asyncio.Handle) -> str:
    """What a handle is to call: of a task the chain of what awaits what, where that can be told."""
    callback = handle._callback  # type: ignore[attr-defined]
    task = getattr(callback, "__self__", None)
    if not isinstance(task, asyncio.Task):
        return str(getattr(callback, "__qualname__", callback))
    names = []
    awaited: Any = task.get_coro()
    while awaited is not None:
        names.append(getattr(awaited, "__qualname__", type(awaited).__name__))
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "ag_await", None)
    return " > ".join(names[-FRAMES:])
