"""`python -m server`, but for what the variable FAIL names: a scripted engine that fails at its second step, or text
that does so on the event loop, on a helper thread, or while it is loaded."""

import os
import re
import runpy
import sys
import threading
import time
from collections.abc import Callable, Sequence

import server.model.loader
from batching.engine import Engine
from batching.progress import Progress
from server.model.defaults import Defaults
from server.model.text import Text
from server.output.detokenize import Detokenizer
from server.settings import Settings
from tests.live import BYTES, scripted

if os.environ.get("FAIL") == "break_device":
    import torch  # takes seconds, which no other failure needs


def hang() -> None:
    print("hangs", file=sys.stderr, flush=True)
    threading.Event().wait()


def break_device() -> None:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def stand() -> None:
    hang()


def hold() -> None:
    """In native code, which keeps the interpreter."""
    re.match("(a|a)*b", "a" * 64)


def linger() -> None:
    """Keep the event loop for a moment."""
    end = time.monotonic() + 0.03
    while time.monotonic() < end:
        pass


LOOP_FAILURES: dict[str, Callable[[], None]] = {"stand": stand, "hold": hold}
FAILURES: dict[str, Callable[[], None]] = {"hang": hang, "break_device": break_device}


class FailingText(Text):
    def encode(self, text: str, *, special: bool = False) -> tuple[int, ...]:
        if os.environ["FAIL"] == "encode" and "think>" not in text:  # whose tokens are looked up at the start
            hang()
        return super().encode(text, special=special)

    def detokenizer(self, *, special: bool = False, after: Sequence[int] = ()) -> Detokenizer:
        linger()
        LOOP_FAILURES.get(os.environ["FAIL"], lambda: None)()
        return super().detokenizer(special=special, after=after)


class FailingLoader:
    def __init__(self, settings: Settings, progress: Progress, when_imported: Callable[[], None]) -> None:
        self._fail = FAILURES.get(os.environ["FAIL"], lambda: None)

    def defaults(self) -> Defaults:
        return Defaults()

    def text(self) -> Text:
        if os.environ["FAIL"] == "load":
            hang()
        return FailingText(BYTES)

    def engine(self) -> Engine:
        return scripted("Hello!", before_step=lambda step: self._fail() if step else None)


if __name__ == "__main__":
    server.model.loader.ModelLoader = FailingLoader  # type: ignore[assignment,misc]
    runpy.run_module("server", run_name="__main__")
