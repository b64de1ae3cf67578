"""What the packed decode loop asks of a device: passes over prompts, steps, and choices of tokens."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from batching.attention import Piece
from batching.seat import Seat
from batching.types import TokenLogprob


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
