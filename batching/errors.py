"""Errors below the HTTP layer. `server/http/errors.py` turns each into a status and a body."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

UNWINDING = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)
"""Raised to end a task, a generator or the process. Any other BaseException is a fault, such as a panic in a Rust
library, which is not an Exception."""


class BatchingError(Exception):
    """Base class of everything that the batcher raises or hands to a stream."""


class ModelError(BatchingError):
    """The model cannot be found, loaded or run on this device; the message is one sentence for the user."""


class NotReady(BatchingError):
    """The batcher accepts no requests in its current state (starting, draining, stopped or failed)."""

    def __init__(self, state: str) -> None:
        super().__init__(state)
        self.state = state


class QueueFull(BatchingError):
    """The queue is full; `retry_after` is the expected wait in seconds."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the queue is full, retry after {retry_after:.1f} s")
        self.retry_after = retry_after


class TooBusy(BatchingError):
    """The queue is too long for the request to meet its time limit; it would miss it by `retry_after` seconds."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"no answer is likely in time, retry after {retry_after:.1f} s")
        self.retry_after = retry_after


class TooLarge(BatchingError):
    """Not even an empty queue would have room for these requests together."""


class DeadlineExceeded(BatchingError):
    """The request's time limit passed before its answer was complete."""


class Drained(BatchingError):
    """The service is shutting down, and the drain time ended before this answer was complete."""


class EngineError(BatchingError):
    """The engine raised while this row was in its batch, or the worker thread died."""


class Stuck(EngineError):
    """The worker has a batch but makes no progress, so the process has to exit."""


class OutOfMemory(EngineError):
    """The device ran out of memory with this row alone in a batch, or after it had produced tokens."""


@contextmanager
def explained(failure: str) -> Iterator[None]:
    """Turn anything a library raises into a ModelError: `failure`, then the first line of the reason."""
    try:
        yield
    except (ModelError, *UNWINDING):
        raise
    except BaseException as error:  # the libraries' errors on bad files have no common base
        raise ModelError(f"{failure}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of its message, with the next one if it ends with a colon; its type's name if it has none."""
    first, _, rest = str(error).strip().partition("\n")
    second = rest.strip().partition("\n")[0]
    return (f"{first} {second}".strip() if first.endswith(":") else first) or type(error).__name__


SHORTAGE = ("out of memory", "ALLOC_FAILED", "not enough memory", "can't allocate memory")
"""What errors say that go away once memory is free: those of CUDA and MPS, cuBLAS, and the CPU's allocator."""


def is_sticky(error: BaseException) -> bool:
    """Whether this error leaves the device unusable for the rest of the process's life.

    A CUDA context keeps an error such as an illegal memory access or a failed device-side assert and returns it from
    every later call ("sticky" in NVIDIA's documentation of cudaGetLastError); only a new process can use the device
    again. Recognised by name and text, so that torch need not be imported.
    """
    text = str(error)
    if any(shortage in text for shortage in SHORTAGE):
        return False
    return "CUDA error" in text or any(kind.__name__ == "AcceleratorError" for kind in type(error).__mro__)
