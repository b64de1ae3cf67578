"""Seconds since the busy worker last made progress, for the watchdog and a gauge.

An observer of the batcher. An engine may also call `mark` on the worker thread when it progresses within a step.
"""

from __future__ import annotations

import time
from itertools import chain
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
            case StateChanged(state=State.STOPPED | State.FAILED):  # the end of the batch is no longer reported
                self.at = None

    def mark(self) -> None:
        """Record progress with the current batch. Without a batch this does nothing."""
        if self.at is not None:
            self.at = time.monotonic()

    def seconds(self) -> float:
        """Seconds since the last sign of progress; 0 while there is no work."""
        at = self.at
        return 0.0 if at is None else time.monotonic() - at

    def follow(self, model: PreTrainedModel) -> None:
        """Count each layer of a forward pass as progress on a CPU, where a long prompt can take minutes.

        On a GPU a layer returns once its kernels are queued, and a forward pass takes seconds at most.
        """
        if model.device.type == "cpu":
            # The list of layers has one of several names: layers, h or blocks.
            parts = model.get_decoder().children()  # type: ignore[no-untyped-call]
            for layer in chain.from_iterable(part for part in parts if type(part).__name__ == "ModuleList"):
                layer.register_forward_hook(lambda *_: self.mark())
