"""A thread that sees what nothing on the event loop can tell: that the loop itself stands, or the worker does.

The loop is asked for a sign of life a few times a second. What it takes to answer is what any client would have waited.
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
"""How often the thread looks, if the limit is not so short that it must look more often."""

LOOKS = 10
"""How often it looks within the limit at least."""

STANDS_SECONDS = 1.0
"""From when on a loop that stands is worth a line in the log."""

HELD = 3
"""How many times the limit a native call may keep the interpreter to itself."""

FRAMES = 20
TELL_SECONDS = 2.0


class Watchdog:
    """Made and entered on the thread of `loop`, which it looks after with its worker from a thread of its own.

    `limit` (seconds) is what the worker, with work in hand, or the loop may go without a sign of life. Then
    `worker_stuck` is called on the loop, or `end` on the watchdog's thread, with what the loop does instead. `lag` is
    told on the loop how long that took to answer (seconds), four times a second. `hold_off` is called now and then,
    with a time (seconds) that will not pass before it is called again, unless this thread stands too.

    Looks are counted, not seconds, so that a process that was stopped as a whole (a debugger, a suspended machine) is
    not taken for a stuck one when it goes on.
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
        self._looks = math.ceil(limit / self._period)  # without a sign of life
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
        """One look at both. Whoever has given no sign of life for as many looks as the limit has is stuck."""
        if self._looked % (self._looks // LOOKS) == 0:
            self._hold_off(HELD * self._limit)
        self._looked += 1
        if self._asked:
            self._loop_stands()
        else:
            self._loop_idle = 0
            self._look_at_worker()  # whose progress comes by the loop
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
                f"the event loop has stood for {self._limit:g} s; exiting. It is in {stack_of(self._loop_thread)}"
            )
        elif self._loop_idle == self._stands:
            seconds = self._loop_idle * self._period
            tell(logging.WARNING, f"the event loop has stood for {seconds:g} s. It is in {stack_of(self._loop_thread)}")

    def _look_at_worker(self) -> None:
        at = self._progress.at
        self._worker_idle = self._worker_idle + 1 if at is not None and at == self._seen else 0
        self._seen = at
        if self._worker_idle == self._looks:
            self._loop.call_soon_threadsafe(self._worker_stuck)


def stack_of(thread: int, most: int = FRAMES) -> str:
    """Where a thread is, in one line: its `most` innermost functions, the innermost last."""
    frames = traceback.walk_stack(sys._current_frames().get(thread))
    # Without the text of the lines, which would have to be read from files.
    stack = traceback.StackSummary.extract(frames, limit=most, lookup_lines=False)
    return " > ".join(f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno} {f.name}" for f in reversed(stack))


def tell(level: int, message: str) -> threading.Thread:
    """Log from a thread of its own: a log that nobody reads may be what the loop waits for."""
    teller = threading.Thread(target=logger.log, args=(level, "%s", message), name="teller", daemon=True)
    teller.start()
    return teller


def end_process(reason: str) -> None:
    """Say why, and end the process with an error, so that its supervisor starts it again."""
    tell(logging.CRITICAL, reason).join(TELL_SECONDS)
    os._exit(1)


def end_unless_called_again(seconds: float) -> None:
    """End the process with an error and every thread's stack on stderr, unless this is called again in time.

    What does this needs no interpreter, so that it works where a native call holds that, and the watchdog stands too.
    """
    faulthandler.dump_traceback_later(min(seconds, threading.TIMEOUT_MAX), exit=True)
