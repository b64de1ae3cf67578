"""What the packed decode loop asks of a device: passes over prompts, steps, and choices of tokens."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from batching.packed.attention import Piece
from batching.packed.kv_cache import Extent
from batching.stream import Row
from batching.types import TokenLogprob


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


class Choice(Protocol):
    """Tokens that the device is choosing, one for each of `seats`."""

    @property
    def seats(self) -> Sequence[Seat]: ...

    def read(self) -> tuple[list[int], Mapping[int, TokenLogprob]]:
        """Wait for them; and the log probabilities of those seats that asked, by place."""
        ...


class Runner(Protocol):
    """Every method returns as soon as the device has its orders, which it carries out one after the other.

    A pass (`prompts` or `steps`) leaves logits, and `choose` must follow for the same seats before the next pass.
    """

    lanes: int
    """How many seats there can be."""

    @property
    def logits(self) -> Tensor:
        """Of the last pass, a row for each of its seats; valid until the next pass."""
        ...

    def enter(self, seat: Seat) -> None:
        """A row has got a lane and an extent."""
        ...

    def leave(self, seat: Seat) -> None:
        """It has no further use for them."""
        ...

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the keys and values of `count` slots from one place of the pool to another."""
        ...

    def prompts(self, work: Sequence[tuple[Seat, Piece]]) -> None:
        """Process pieces of prompts. The logits are of the last token of those that end their prompt, in order."""
        ...

    def steps(self, seats: Sequence[Seat]) -> None:
        """Process each seat's newest token."""
        ...

    def waits(self, seats: Sequence[Seat]) -> bool:
        """Whether `choose` needs to know all tokens chosen before: some row has a grammar, say."""
        ...

    def told(self, seat: Seat, token: int) -> None:
        """The seat's newest token, as it was read."""
        ...

    def choose(self, seats: Sequence[Seat]) -> Choice:
        """Choose the next token of each of the last pass's seats, by its own settings."""
        ...
