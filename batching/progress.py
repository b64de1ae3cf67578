"""Seconds since the busy worker last made progress: what a watchdog and a gauge read.

An observer of the batcher. `mark` may be called on the worker thread too, by an engine that got further inside a step.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from batching.events import BatchEnded, BatchStarted, Event, PromptScored, State, StateChanged, Stepped

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Progress:
    """`at` is the monotonic time of the last sign of progress, or None while the worker has no work."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case BatchStarted() | Stepped() | PromptScored():
                self.at = time.monotonic()
            case BatchEnded(running=running):
                self.at = time.monotonic() if running else None
            case StateChanged(state=State.STOPPED | State.FAILED):  # no end of a batch is reported any more
                self.at = None

    def mark(self) -> None:
        """The worker got further with its batch. Without a batch this does nothing."""
        if self.at is not None:
            self.at = time.monotonic()

    def seconds(self) -> float:
        """Since the last sign of progress; 0 while there is no work."""
        at = self.at
        return 0.0 if at is None else time.monotonic() - at

    def follow(self, model: PreTrainedModel) -> None:
        """Count each layer of a forward pass as progress where a long prompt's pass can take minutes: on a CPU.

        On a GPU a layer's return only says that its kernels are queued; there a forward pass takes seconds at most.
        """
        if model.device.type == "cpu":
            for layer in getattr(model.get_decoder(), "layers", ()):  # type: ignore[no-untyped-call]
                layer.register_forward_hook(lambda *_: self.mark())
