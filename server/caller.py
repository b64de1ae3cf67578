"""Who asks: the request's id, whose share of the device it takes, and the trace it belongs to."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """`name` is that of the API key, or empty where none is asked for; `share` is the key's weight.

    `trace` has the W3C headers `traceparent` and `tracestate`, those that came.
    """

    request_id: str
    name: str = ""
    share: float = 1.0
    trace: tuple[tuple[str, str], ...] = ()

    def row_id(self, choice: int) -> str:
        """The id of one of a request's rows: the request's own for the first."""
        return f"{self.request_id}.{choice}" if choice else self.request_id
