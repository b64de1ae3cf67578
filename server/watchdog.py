"""A thread that detects what the event loop cannot: that the loop itself or the worker is stuck.

It asks the loop for a sign of life a few times a second. The loop's delay is what any client would have waited.
"""

import asyncio
import faulthandler
import logging
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from batching.progress import Progress

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
"""Interval between checks, unless the limit is so short that it needs more frequent ones."""

LOOKS = 10
"""Minimum number of checks within the limit."""

STANDS_SECONDS = 1.0
"""How long the loop may be blocked before it is logged."""

HELD = 3
"""How many times the limit a native call may hold the GIL."""

FRAMES = 20
TELL_SECONDS = 2.0


class Watchdog:
    """Created and entered on the thread of `loop`; watches the loop and the worker from a thread of its own.

    `limit`: seconds that the busy worker or the loop may go without a sign of life. Then `worker_stuck` is called on
    the loop, or `end` on the watchdog's thread with what the loop is doing. `lag` is called on the loop four times a
    second with the loop's delay in seconds. `hold_off` is called regularly with a time in seconds within which it will
    be called again, unless this thread is stuck, too.

    Checks are counted, not seconds, so that a process that was paused as a whole (a debugger, a suspended machine) is
    not taken for a stuck one when it resumes.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        limit: float,
        progress: Progress,
        worker_stuck: Callable[[], object],
        lag: Callable[[float], object],
        end: Callable[[str], object],
        hold_off: Callable[[float], object] = lambda seconds: None,
    ) -> None:
        self._loop = loop
        self._loop_thread = threading.get_ident()
        self._limit = limit
        self._progress = progress
        self._worker_stuck = worker_stuck
        self._lag = lag
        self._end = end
        self._hold_off = hold_off
        self._period = min(LOOK_SECONDS, limit / LOOKS)
        self._looks = math.ceil(limit / self._period)  # checks without a sign of life
        self._stands = math.ceil(STANDS_SECONDS / self._period)
        self._seen = progress.at
        self._worker_idle = 0
        self._loop_idle = 0
        self._asked = False
        self._looked = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self._period):
            try:
                self.look()
            except RuntimeError:  # the loop is closed
                return

    def look(self) -> None:
        """Check both once. One that gave no sign of life for as many checks as the limit has is stuck."""
        if self._looked % (self._looks // LOOKS) == 0:
            self._hold_off(HELD * self._limit)
        self._looked += 1
        if self._asked:
            self._loop_stands()
        else:
            self._loop_idle = 0
            self._look_at_worker()  # its progress is reported through the loop
            self._ask()

    def _ask(self) -> None:
        self._asked = True
        self._loop.call_soon_threadsafe(self._answer, time.monotonic())

    def _answer(self, asked_at: float) -> None:
        self._asked = False
        self._lag(time.monotonic() - asked_at)

    def _loop_stands(self) -> None:
        self._loop_idle += 1
        if self._loop_idle == self._looks:
            self._end(
                f"the event loop was blocked for {self._limit:g} s; exiting. It is in {stack_of(self._loop_thread)}"
            )
        elif self._loop_idle == self._stands:
            seconds = self._loop_idle * self._period
            tell(
                logging.WARNING, f"the event loop was blocked for {seconds:g} s. It is in {stack_of(self._loop_thread)}"
            )

    def _look_at_worker(self) -> None:
        at = self._progress.at
        self._worker_idle = self._worker_idle + 1 if at is not None and at == self._seen else 0
        self._seen = at
        if self._worker_idle == self._looks:
            self._loop.call_soon_threadsafe(self._worker_stuck)


def stack_of(thread: int, most: int = FRAMES) -> str:
    """Where a thread is, in one line: its `most` innermost functions, the innermost last."""
    frames = traceback.walk_stack(sys._current_frames().get(thread))
    # Without source lines, which would have to be read from files.
    stack = traceback.StackSummary.extract(frames, limit=most, lookup_lines=False)
    return " > ".join(f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno} {f.name}" for f in reversed(stack))


def tell(level: int, message: str) -> threading.Thread:
    """Log from a separate thread, because a blocked log may be what the loop is waiting for."""
    teller = threading.Thread(target=logger.log, args=(level, "%s", message), name="teller", daemon=True)
    teller.start()
    return teller


def end_process(reason: str) -> None:
    """Log the reason and exit with an error, so that the supervisor restarts the process."""
    tell(logging.CRITICAL, reason).join(TELL_SECONDS)
    os._exit(1)


def end_unless_called_again(seconds: float) -> None:
    """Exit with an error and every thread's stack on stderr unless this is called again in time.

    The timer runs without the GIL, so it works even if a native call holds the GIL and the watchdog is stuck, too.
    """
    faulthandler.dump_traceback_later(min(seconds, threading.TIMEOUT_MAX), exit=True)
