"""A row while it is in the packed decode loop: its place in the pool and how far it has come."""

from batching.attention import Piece
from batching.pool import Extent
from batching.row import Row


class Seat:
    """Worker thread only. `lane` is the row's place in the device's state while it has the seat.

    `done` counts the tokens of the prompt that are in the extent, `begun` the output tokens that the device has been
    told to choose, `tokens` are the prompt and the output tokens that were read so far.
    """

    __slots__ = ("begun", "done", "extent", "lane", "row", "tokens")

    def __init__(self, row: Row, lane: int, extent: Extent) -> None:
        self.row = row
        self.lane = lane
        self.extent = extent
        self.done = 0
        self.begun = 0
        self.tokens = list(row.request.prompt)

    def __repr__(self) -> str:
        return f"<Seat {self.lane} {self.row.request.id} {self.done}+{self.begun}>"

    @property
    def left(self) -> int:
        """Tokens of the prompt that are still to be processed."""
        return len(self.row.request.prompt) - self.done

    @property
    def wants_step(self) -> bool:
        """Whether the next token is to be chosen: some are left, and the row is not known to be over."""
        return 0 < self.begun < self.row.request.sampling.max_tokens and not (self.row.over or self.row.cancelled)

    def piece(self, most: int) -> Piece:
        """The next tokens of the prompt, at most so many."""
        return Piece(self.extent.start, self.done, min(self.left, most))

    def next_position(self) -> Piece:
        """Where the newest token, which the device has chosen, goes in the next step."""
        return Piece(self.extent.start, len(self.row.request.prompt) + self.begun - 1, 1)
