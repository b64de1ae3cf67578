"""The device's state of every sequence slot: the newest token, where the next one goes, and how to sample it.

Worker thread only, CUDA only. A slot's state is written when a row gets it and advanced on the device from then on, so
that a decode step needs nothing from the host.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from batching.packed import triton_sampling as columns
from batching.packed.runner import RunningSequence


class SamplingState:
    """`num_slots` sequence slots of at most `max_blocks` blocks of the KV cache, and one more without a row that pads a
    CUDA graph's batch: it writes to the block `spare_block`."""

    def __init__(
        self, num_slots: int, vocab_size: int, max_blocks: int, spare_block: int, device: torch.device
    ) -> None:
        self.int_params = torch.zeros(num_slots + 1, columns.NUM_COLUMNS.value, dtype=torch.int64, device=device)
        self.float_params = torch.ones(num_slots + 1, columns.NUM_COLUMNS.value, device=device)
        self.counts = torch.zeros(num_slots + 1, vocab_size, dtype=torch.int16, device=device)
        self.bias = torch.zeros(num_slots + 1, vocab_size, device=device)
        self.bitmask = torch.zeros(num_slots + 1, -(-vocab_size // 32), dtype=torch.int32, device=device)
        # One extra column that is never written, because attention reads one block ahead.
        self.block_tables = torch.full((num_slots + 1, max_blocks + 1), spare_block, dtype=torch.int64, device=device)
        self._device = device
        self._num_sent: dict[RunningSequence, int] = {}  # number of its blocks in the table

    def add_sequences(self, sequences: Sequence[RunningSequence], guided: Sequence[bool]) -> None:
        """Write the state of new sequences; `guided` marks those with a token bitmask from the host."""
        slots = self.to_device(torch.tensor([sequence.slot for sequence in sequences]))
        ints = [_int_params(sequence, masked) for sequence, masked in zip(sequences, guided, strict=True)]
        floats = [_float_params(sequence) for sequence in sequences]
        self.int_params.index_copy_(0, slots, self.to_device(torch.tensor(ints, dtype=torch.int64)))
        self.float_params.index_copy_(0, slots, self.to_device(torch.tensor(floats)))
        for sequence in sequences:
            sampling = sequence.row.request.sampling
            if sampling.penalised:
                self._reset_counts(sequence)
            if sampling.logit_bias or sampling.min_tokens:
                self.set_bias(sequence, may_stop=sequence.num_output_tokens >= sampling.min_tokens)

    def send_blocks(self, sequences: Iterable[RunningSequence]) -> None:
        """Write the blocks that these sequences got since the last call."""
        places: list[int] = []
        blocks: list[int] = []
        for sequence in sequences:
            known, mine = self._num_sent.get(sequence, 0), sequence.blocks
            if known != len(mine):
                first = sequence.slot * self.block_tables.shape[1]
                places += range(first + known, first + len(mine))
                blocks += mine[known:]
                self._num_sent[sequence] = len(mine)
        if places:
            at, values = self.to_device(torch.tensor([places, blocks]))
            self.block_tables.view(-1).index_copy_(0, at, values)

    def remove_sequence(self, sequence: RunningSequence) -> None:
        """Forget a sequence that lost its slot and blocks."""
        self._num_sent.pop(sequence, None)

    def set_bias(self, sequence: RunningSequence, *, may_stop: bool) -> None:
        """Write a sequence's `logit_bias` and, until it `may_stop`, mask its stop tokens."""
        sampling = sequence.row.request.sampling
        values = dict(sampling.logit_bias) | dict.fromkeys(() if may_stop else sampling.stop_token_ids, -float("inf"))
        bias = self.bias[sequence.slot].zero_()
        if values:
            tokens, added = torch.tensor(list(values)), torch.tensor(list(values.values()))
            bias.index_copy_(0, self.to_device(tokens), self.to_device(added))

    def to_device(self, values: Tensor) -> Tensor:
        """Copy to the device without synchronising."""
        return values.pin_memory().to(self._device, non_blocking=True)

    def _reset_counts(self, sequence: RunningSequence) -> None:
        request = sequence.row.request
        counts = self.counts[sequence.slot].zero_()
        if request.sampling.repetition_penalty != 1.0:
            counts.index_fill_(0, self.to_device(torch.tensor(request.prompt)), columns.IN_PROMPT.value)
        if sequence.num_output_tokens:
            own = self.to_device(torch.tensor(sequence.tokens[len(request.prompt) :]))
            counts.index_add_(0, own, torch.ones_like(own, dtype=counts.dtype))


def _int_params(sequence: RunningSequence, guided: bool) -> list[int]:
    request = sequence.row.request
    sampling = request.sampling
    flags = columns.RANDOM.value * (not sampling.greedy) | columns.PENALISED.value * sampling.penalised
    flags |= columns.BIASED.value * bool(sampling.logit_bias or sampling.min_tokens) | columns.GUIDED.value * guided
    # As if the last token were the newest: sampling the next one advances the slot.
    position = len(sequence.tokens) - 1
    return [0, position, sequence.num_output_tokens, sampling.seed, sampling.top_k, flags, 0, 0]


def _float_params(sequence: RunningSequence) -> list[float]:
    sampling = sequence.row.request.sampling
    penalties = [sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty]
    return [sampling.temperature or 1.0, sampling.top_p, sampling.min_p, *penalties, 0.0, 0.0]
