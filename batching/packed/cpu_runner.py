"""`Runner` in plain torch: every pass as it comes, every row with a sampler of its own. For the CPU, and for tests.

What it computes is what the CUDA runner computes, one operation at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from batching.packed.attention import Piece, RowAttention, Work
from batching.packed.runner import Seat
from batching.sampling import Sampler
from batching.types import TokenLogprob


@dataclass(frozen=True, slots=True)
class Chosen:
    """`Choice` that is already known."""

    seats: Sequence[Seat]
    tokens: list[int]
    logprobs: Mapping[int, TokenLogprob]

    def read(self) -> tuple[list[int], Mapping[int, TokenLogprob]]:
        """See `Choice`."""
        return self.tokens, self.logprobs


class HostRunner:
    """`memory` is the pool, as in `Work`."""

    def __init__(self, model: PreTrainedModel, memory: Tensor, lanes: int) -> None:
        self.lanes = lanes
        self._model = model
        self._memory = memory
        self._vocab_size = model.config.get_text_config().vocab_size
        self._samplers: dict[Seat, Sampler] = {}
        self._newest: dict[Seat, int] = {}
        self.logits = torch.empty(0)

    def enter(self, seat: Seat) -> None:
        """See `Runner`."""
        self._samplers[seat] = Sampler([seat.row.request], self._vocab_size, self._memory.device)

    def leave(self, seat: Seat) -> None:
        """See `Runner`."""
        del self._samplers[seat]
        self._newest.pop(seat, None)

    def copy(self, source: int, target: int, count: int) -> None:
        """See `Runner`."""
        self._memory[:, :, :, target : target + count] = self._memory[:, :, :, source : source + count]

    def prompts(self, work: Sequence[tuple[Seat, Piece]]) -> None:
        """See `Runner`."""
        ids = [token for seat, piece in work for token in seat.row.request.prompt[piece.done : piece.used]]
        ends = [seat.left == piece.count for seat, piece in work]
        self._pass(ids, [piece for _, piece in work], ends)

    def steps(self, seats: Sequence[Seat]) -> None:
        """See `Runner`."""
        self._pass(
            [self._newest[seat] for seat in seats], [seat.next_position() for seat in seats], [True] * len(seats)
        )

    def _pass(self, ids: list[int], pieces: list[Piece], kept: list[bool]) -> None:
        slots = torch.cat([torch.arange(piece.start + piece.done, piece.start + piece.used) for piece in pieces])
        positions = torch.cat([torch.arange(piece.done, piece.used) for piece in pieces])
        ends = torch.tensor([piece.count for piece in pieces]).cumsum(0) - 1
        self.logits = self._model(
            input_ids=torch.tensor([ids]),
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=ends[torch.tensor(kept)],
            work=Work(self._memory, slots, RowAttention(pieces)),
        ).logits[0]

    def waits(self, seats: Sequence[Seat]) -> bool:
        """See `Runner`: every token is known at once."""
        return False

    def told(self, seat: Seat, token: int) -> None:
        """See `Runner`."""

    def choose(self, seats: Sequence[Seat]) -> Chosen:
        """See `Runner`."""
        logits = self.logits.float()
        tokens = logits.argmax(-1).tolist()
        logprobs: dict[int, TokenLogprob] = {}
        for place, seat in enumerate(seats):
            sampler = self._samplers[seat]
            if not sampler.plain:
                tokens[place] = int(sampler(logits[place : place + 1].clone()))
                if 0 in sampler.logprobs:
                    logprobs[place] = sampler.logprobs[0]
            self._newest[seat] = tokens[place]
        return Chosen(seats, tokens, logprobs)
