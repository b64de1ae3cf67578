"""The batcher's events. Metrics and logs are observers of these.

All are emitted on the event loop's thread. Times are `time.monotonic()` seconds, durations seconds.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

logger = logging.getLogger(__name__)


class State(StrEnum):
    """The batcher's states; `batching/batcher.py` has the transitions."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


class Outcome(StrEnum):
    """How an accepted request ended. Every accepted request gets exactly one outcome."""

    ANSWERED = "answered"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    DRAINED = "drained"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class StateChanged:
    state: State


@dataclass(frozen=True, slots=True)
class QueueChanged:
    """The queue's depth after rows came or went."""

    rows: int
    prompt_tokens: int


REFUSALS = ("queue_full", "too_busy", "not_ready")
"""Why the batcher refuses requests."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A request that was not accepted: for one of `REFUSALS`, or a reason of the layer above."""

    reason: str


@dataclass(frozen=True, slots=True)
class BatchStarted:
    """Rows were handed to the worker. `padded_tokens` is rows x longest prompt."""

    rows: int
    prompt_tokens: int
    padded_tokens: int
    window_wait: float
    queue_waits: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RowsJoined:
    """Rows were handed to the worker during a batch, which then has `running` rows."""

    rows: int
    running: int
    prompt_tokens: int
    queue_waits: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RowStarted:
    """A row of `client` was handed to the worker at `at`, as one of `batch_size` rows in the batch."""

    id: str
    at: float
    queue_wait: float
    batch_size: int
    client: str = ""


@dataclass(frozen=True, slots=True)
class Stepped:
    """Tokens of a batch arrived: `tokens` for `rows` of its rows, of which `running` have not finished."""

    tokens: int
    running: int
    rows: int


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Log probabilities of `tokens` more prompt tokens of a row arrived; `running` rows have not finished."""

    tokens: int
    running: int


@dataclass(frozen=True, slots=True)
class BatchEnded:
    """`running` rows were handed over since the batch ended."""

    running: int
    duration: float


@dataclass(frozen=True, slots=True)
class MemoryHeld:
    """Bytes that the device's allocator holds: told once the model is loaded, while a batch runs and after it."""

    memory: int


@dataclass(frozen=True, slots=True)
class RowEnded:
    """An accepted request reached its outcome. `queue_wait` and `ttft` are None if it never got that far.

    `num_cached_tokens` of the prompt came from the prefix cache. The row was preempted `num_preemptions` times.
    Speculation guessed `num_drafted_tokens` of the answer, of which `num_accepted_tokens` were right.
    """

    id: str
    outcome: Outcome
    finish: str
    prompt_tokens: int
    output_tokens: int
    queue_wait: float | None
    ttft: float | None
    duration: float
    batch_size: int
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    trace: tuple[tuple[str, str], ...] = ()
    client: str = ""


Event = (
    StateChanged
    | QueueChanged
    | Rejected
    | BatchStarted
    | RowsJoined
    | RowStarted
    | Stepped
    | PromptScored
    | BatchEnded
    | MemoryHeld
    | RowEnded
)
Observer = Callable[[Event], None]


def broadcast(observers: Iterable[Observer]) -> Observer:
    """An observer that calls all of them. One that raises is logged and never affects a request."""
    listeners = tuple(observers)

    def observe(event: Event) -> None:
        for listener in listeners:
            try:
                listener(event)
            except Exception:
                logger.exception("an observer failed on %s", type(event).__name__)

    return observe
