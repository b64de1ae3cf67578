"""One request on its way through a batch.

The event loop owns a row until the worker takes it; from then on the worker is its only writer, but for `cancelled`,
which the loop may set at any time and the worker reads at the next step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from batching.types import Finish, Request

if TYPE_CHECKING:
    from batching.stream import Stream


class Row:
    """`arrived` is monotonic seconds; `turn` is the row's place in the queue, `passed_over` counts batches that
    took a row behind it instead. `reused` is how many of the prompt's tokens had been computed for another row."""

    __slots__ = ("arrived", "cancelled", "over", "passed_over", "request", "reused", "sent", "stream", "turn")

    def __init__(self, request: Request, stream: Stream, arrived: float) -> None:
        self.request = request
        self.stream = stream
        self.arrived = arrived
        self.passed_over = 0
        self.reused = 0
        self.turn = 0.0
        self.sent = 0
        self.over = False
        self.cancelled = False

    def __repr__(self) -> str:
        place = "over" if self.over else f"{self.sent} sent" if self.sent else "waiting"
        return f"<Row {self.request.id} {place}>"

    def push(self, token: int) -> Finish | None:
        """Count one new token; the row is over if it is a stop token or the last one allowed."""
        sampling = self.request.sampling
        self.sent += 1
        if token in sampling.stop_token_ids:
            self.over = True
            return Finish.STOP
        if self.sent >= sampling.max_tokens:
            self.over = True
            return Finish.LENGTH
        return None
