"""What the batcher reports. Metrics and logs are observers of these events.

All are emitted on the event loop's thread. Times are `time.monotonic()` seconds, durations seconds.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

logger = logging.getLogger(__name__)


class State(StrEnum):
    """The batcher's life: see `batching/batcher.py` for who moves it."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


class Outcome(StrEnum):
    """How a request that was accepted ended. Every accepted request gets exactly one."""

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


@dataclass(frozen=True, slots=True)
class Rejected:
    """A request that was not accepted: `queue_full`, `too_busy`, `not_ready`, or a reason of the layer above."""

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
    """Rows were handed to the worker while a batch runs, which has `running` rows with them."""

    rows: int
    running: int
    prompt_tokens: int
    queue_waits: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RowStarted:
    """A row of `client` was handed to the worker at `at`, with `batch_size` rows in the batch, itself among them."""

    id: str
    at: float
    queue_wait: float
    batch_size: int
    client: str = ""


@dataclass(frozen=True, slots=True)
class Stepped:
    """One decode step of a batch is on the loop: `tokens` rows got a token each, `running` are not over."""

    at: float
    tokens: int
    running: int


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Log probabilities of `tokens` more of a row's prompt are on the loop; `running` rows are not over."""

    at: float
    tokens: int
    running: int


@dataclass(frozen=True, slots=True)
class BatchEnded:
    """`memory` is what the device's allocator holds now, in bytes; `running` rows were given since it ended."""

    rows: int
    running: int
    duration: float
    memory: int


@dataclass(frozen=True, slots=True)
class RowEnded:
    """An accepted request reached its one outcome. `queue_wait` and `ttft` are None if it never got that far.

    `num_cached_tokens` of the prompt came from the prefix cache. The row gave way `num_preemptions` times.
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
    | RowEnded
)
Observer = Callable[[Event], None]


def broadcast(observers: Iterable[Observer]) -> Observer:
    """One observer that calls all of them. One that raises is logged and never hurts a request."""
    listeners = tuple(observers)

    def observe(event: Event) -> None:
        for listener in listeners:
            try:
                listener(event)
            except Exception:
                logger.exception("an observer failed on %s", type(event).__name__)

    return observe
