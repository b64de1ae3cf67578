"""What the device knows of every lane: the newest token, where the next one goes, and how to choose it.

Worker thread only, CUDA only. A lane's state is written when a row gets it and advanced on the device from then on, so
that a step needs nothing from the host.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from batching.packed import triton_sampling
from batching.packed.runner import Seat


class Slots:
    """`lanes` lanes, and one more without a row that fills up a captured step; it writes to the pool's slot `spare`."""

    def __init__(self, lanes: int, vocab_size: int, spare: int, device: torch.device) -> None:
        self.ints = torch.zeros(lanes + 1, triton_sampling.COLUMNS, dtype=torch.int64, device=device)
        self.floats = torch.ones(lanes + 1, triton_sampling.COLUMNS, device=device)
        self.counts = torch.zeros(lanes + 1, vocab_size, dtype=torch.int16, device=device)
        self.bias = torch.zeros(lanes + 1, vocab_size, device=device)
        self.allowed = torch.zeros(lanes + 1, -(-vocab_size // 32), dtype=torch.int32, device=device)
        self.ints[lanes, triton_sampling.START] = spare
        self._device = device

    def enter(self, seats: Sequence[Seat], masked: Sequence[bool]) -> None:
        """Write the state of rows that begin; `masked` says whose tokens the host will rule out."""
        at = self.send(torch.tensor([seat.lane for seat in seats]))
        whole = [_whole(seat, mask) for seat, mask in zip(seats, masked, strict=True)]
        self.ints.index_copy_(0, at, self.send(torch.tensor(whole, dtype=torch.int64)))
        self.floats.index_copy_(0, at, self.send(torch.tensor([_part(seat) for seat in seats])))
        for seat in seats:
            sampling = seat.row.request.sampling
            if sampling.penalised:
                self._start_counts(seat)
            if sampling.logit_bias or sampling.min_tokens:
                self.set_bias(seat, early=sampling.min_tokens > 0)

    def set_bias(self, seat: Seat, *, early: bool) -> None:
        """A lane's `logit_bias`; and if it is `early` for the row to stop, its stop tokens are kept out."""
        sampling = seat.row.request.sampling
        values = dict(sampling.logit_bias) | dict.fromkeys(sampling.stop_token_ids if early else (), -float("inf"))
        row = self.bias[seat.lane].zero_()
        if values:
            row.index_copy_(0, self.send(torch.tensor(list(values))), self.send(torch.tensor(list(values.values()))))

    def send(self, values: Tensor) -> Tensor:
        """Copy to the device without waiting for it."""
        return values.pin_memory().to(self._device, non_blocking=True)

    def _start_counts(self, seat: Seat) -> None:
        counts = self.counts[seat.lane].zero_()
        if seat.row.request.sampling.repetition_penalty != 1.0:
            counts.index_fill_(0, self.send(torch.tensor(seat.row.request.prompt)), triton_sampling.IN_PROMPT)


def _whole(seat: Seat, masked: bool) -> list[int]:
    request = seat.row.request
    sampling = request.sampling
    flags = (
        triton_sampling.DRAWN * (not sampling.greedy)
        | triton_sampling.PENALISED * sampling.penalised
        | triton_sampling.MASKED * masked
    )
    flags |= triton_sampling.BIASED * bool(sampling.logit_bias or sampling.min_tokens)
    # As if the prompt's last token had been the newest: choosing the first token moves the lane on to where that goes.
    return [0, len(request.prompt) - 1, seat.extent.start, 0, sampling.seed, sampling.top_k, flags, 0]


def _part(seat: Seat) -> list[float]:
    sampling = seat.row.request.sampling
    penalties = [sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty]
    return [sampling.temperature or 1.0, sampling.top_p, sampling.min_p, *penalties, 0.0, 0.0]
