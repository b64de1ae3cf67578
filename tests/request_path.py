"""Which project files a request runs through, in order: what a reader has to open to follow it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from dis import opmap
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
ROOMS = tuple(f"{ROOT / room}/" for room in ("server", "batching"))
RESUME = bytes([opmap["RESUME"]])
WATCHDOG = "server/watchdog.py"
COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>")
APART = (WATCHDOG, "batching/worker.py")
"""Threads that start here have work of their own, whoever asks; the worker's is also a request's."""


@dataclass
class RequestPath:
    """Project files in the order in which functions of theirs were called by threads begun inside `followed`, from the
    first bytes that arrive.

    A stay is a run of calls into one file; a call into one that was left before is one more stay. Going on after an
    `await` is no call, nor is a comprehension, which newer Pythons run in place.
    """

    stays: list[str] = field(default_factory=list)
    before_queue: list[str] = field(default_factory=list)
    entered: set[str] = field(default_factory=set)  # the watchdog's thread, which looks now and then, aside
    begun: bool = False
    over: bool = False

    def begin(self) -> None:
        """Forget all so far."""
        self.stays, self.before_queue, self.entered, self.begun = [], [], set(), False

    def end(self) -> None:
        """Note nothing more: how a service ends is not a request's path."""
        self.over = True

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        """For `threading.setprofile`."""
        here = project_file(frame)
        self.begun = self.begun or frame.f_code.co_qualname == "Connection.buffer_updated"
        if here is None or event != "call" or not self.begun or self.over or frame.f_code.co_name in COMPREHENSIONS:
            return
        if not begun_in(frame, WATCHDOG):
            self.entered.add(here)
        if begun_in(frame, *APART) or frame.f_lasti > start(frame.f_code):
            return
        if not self.stays or self.stays[-1] != here:
            self.stays.append(here)
        if frame.f_code.co_qualname == "RowQueue.push" and not self.before_queue:
            self.before_queue = list(self.stays)


def project_file(frame: FrameType) -> str | None:
    """Relative to the project, or None for a frame from elsewhere."""
    return relative(frame.f_code.co_filename)


@cache
def relative(name: str) -> str | None:
    return str(Path(name).relative_to(ROOT)) if name.startswith(ROOMS) else None


@cache
def start(code: CodeType) -> int:
    """Where the code is when it is first entered: its cells, and a coroutine or generator, have been made before."""
    return code.co_code[::2].find(RESUME) * 2


def begun_in(frame: FrameType, *files: str) -> bool:
    """Whether the frame or one that called it is in one of the files."""
    while frame is not None:
        if project_file(frame) in files:
            return True
        frame = frame.f_back  # type: ignore[assignment]  # the loop ends there
    return False


@contextmanager
def followed() -> Iterator[RequestPath]:
    """What threads do that start while the block runs."""
    path = RequestPath()
    threading.setprofile(path.profile)
    try:
        yield path
    finally:
        threading.setprofile(None)
