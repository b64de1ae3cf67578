"""The device's state of every sequence slot: the newest token, where the next one goes, and how to sample it.

Worker thread only, CUDA only. A slot's state is written when a row gets it and advanced on the device from then on, so
that a decode step needs nothing from the host.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from batching.packed import triton_sampling as columns
from batching.packed.kv_cache import BLOCK_SIZE
from batching.packed.runner import RunningSequence
from batching.packed.speculation import MAX_HISTORY, preface


class SamplingState:
    """`num_slots` sequence slots of at most `max_blocks` blocks of the KV cache, and one more without a row that pads a
    CUDA graph's batch: it writes to the block `spare_block`. At most `max_draft_tokens` are drafted for a row in a
    step."""

    def __init__(
        self,
        num_slots: int,
        vocab_size: int,
        max_blocks: int,
        spare_block: int,
        max_draft_tokens: int,
        device: torch.device,
    ) -> None:
        self.int_params = torch.zeros(num_slots + 1, columns.NUM_COLUMNS.value, dtype=torch.int64, device=device)
        self.float_params = torch.ones(num_slots + 1, columns.NUM_COLUMNS.value, device=device)
        self.counts = torch.zeros(num_slots + 1, vocab_size, dtype=torch.int16, device=device)
        self.bias = torch.zeros(num_slots + 1, vocab_size, device=device)
        self.bitmask = torch.zeros(num_slots + 1, -(-vocab_size // 32), dtype=torch.int32, device=device)
        # One extra column that is never written, because attention reads one block ahead.
        self.block_tables = torch.full((num_slots + 1, max_blocks + 1), spare_block, dtype=torch.int64, device=device)
        self.drafts = torch.zeros(num_slots + 1, max(1, max_draft_tokens), dtype=torch.int32, device=device)
        # A prompt, a prediction as long as the answer, and the answer.
        max_history = min(2 * max_blocks * BLOCK_SIZE, MAX_HISTORY) if max_draft_tokens else 1
        self.history = torch.zeros(num_slots + 1, max_history, dtype=torch.int32, device=device)
        self.is_drafting = max_draft_tokens > 0
        self._device = device
        self._num_sent: dict[RunningSequence, int] = {}  # number of its blocks in the table

    def add_sequences(self, sequences: Sequence[RunningSequence], guided: Sequence[bool]) -> None:
        """Write the state of new sequences; `guided` marks those with a token bitmask from the host."""
        slots = self.to_device(torch.tensor([sequence.slot for sequence in sequences]))
        texts = [_text(sequence) if self.is_drafting else () for sequence in sequences]
        ints = [
            _int_params(sequence, masked, len(text))
            for sequence, masked, text in zip(sequences, guided, texts, strict=True)
        ]
        floats = [_float_params(sequence) for sequence in sequences]
        self.int_params.index_copy_(0, slots, self.to_device(torch.tensor(ints, dtype=torch.int64)))
        self.float_params.index_copy_(0, slots, self.to_device(torch.tensor(floats)))
        for sequence, text in zip(sequences, texts, strict=True):
            sampling = sequence.row.request.sampling
            if 0 < len(text) <= self.history.shape[1]:
                self.history[sequence.slot, : len(text)] = self.to_device(torch.tensor(text, dtype=torch.int32))
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

    def start_drafting(self, sequence: RunningSequence) -> None:
        """Draft for a sequence that was added while it had to be sampled token by token."""
        self.int_params[sequence.slot, columns.FLAGS.value] |= columns.SPECULATIVE.value

    def set_bias(self, sequence: RunningSequence, *, may_stop: bool) -> None:
        """Write a sequence's `logit_bias` and, until it `may_stop`, mask its stop tokens."""
        sampling = sequence.row.request.sampling
        bias = self.bias[sequence.slot].zero_()
        # Stop tokens that only the tokenizer has need no mask.
        masked = () if may_stop else [token for token in sampling.stop_token_ids if 0 <= token < len(bias)]
        values = dict(sampling.logit_bias) | dict.fromkeys(masked, -float("inf"))
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


def _text(sequence: RunningSequence) -> list[int]:
    """The text in which drafts are looked for, to which sampling adds."""
    request = sequence.row.request
    begun = preface(request.prompt, request.prediction, request.sampling.max_tokens)
    return begun + sequence.tokens[len(request.prompt) :]


def _int_params(sequence: RunningSequence, guided: bool, length: int) -> list[int]:
    request = sequence.row.request
    sampling = request.sampling
    single = guided or sequence.num_output_tokens < sampling.min_tokens
    flags = columns.RANDOM.value * (not sampling.greedy) | columns.PENALISED.value * sampling.penalised
    flags |= columns.BIASED.value * bool(sampling.logit_bias or sampling.min_tokens) | columns.GUIDED.value * guided
    flags |= columns.SPECULATIVE.value * (not single)
    # As if the last token were the newest: sampling the next one advances the slot.
    position = len(sequence.tokens) - 1
    numbers = position, sequence.num_output_tokens, sampling.seed, sampling.top_k, flags, sampling.max_tokens
    return [0, *numbers, length, 0]


def _float_params(sequence: RunningSequence) -> list[float]:
    sampling = sequence.row.request.sampling
    unused = [0.0] * (columns.NUM_COLUMNS.value - columns.RATE.value - 1)
    penalties = [sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty]
    return [sampling.temperature or 1.0, sampling.top_p, sampling.min_p, *penalties, 0.0, *unused]
