"""`Runner` on a CUDA device: forward passes as CUDA graphs, tokens sampled on the device.

Worker thread only. Nothing here waits for the device but `read`.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, cycle

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from batching.engine import NO_LOGPROBS
from batching.grammar import GuidedRow
from batching.packed.attention import Chunk
from batching.packed.cuda_graphs import (
    DecodeGraph,
    GraphCapture,
    PassOutputs,
    PrefillGraph,
    PrefillInputs,
    prefill_logits,
    smallest,
)
from batching.packed.runner import RunningSequence
from batching.packed.sampling_state import SamplingState
from batching.packed.triton_attention import QUERY_BLOCK
from batching.types import TokenLogprob

MAX_IN_FLIGHT = 8
"""Sampler outputs that can be unread at a time: at most two an iteration, and two iterations."""


class PinnedOutput:
    """Pinned host memory for the tokens of one sampler output, and the event that says that they are there."""

    def __init__(self, num_slots: int) -> None:
        self._tokens = torch.empty(num_slots, dtype=torch.int64, pin_memory=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def copy(self, tokens: Tensor) -> None:
        """Launch the copy."""
        self._tokens[: len(tokens)].copy_(tokens, non_blocking=True)

    def record(self) -> None:
        """All copies of this output have been launched."""
        self._copied.record()

    def wait(self, count: int) -> list[int]:
        self._copied.synchronize()
        found: list[int] = self._tokens[:count].tolist()
        return found


class AsyncOutput:
    """`SamplerOutput` that the device is still computing."""

    def __init__(
        self, sequences: Sequence[RunningSequence], pinned: PinnedOutput, logprobs: "AsyncLogprobs | None"
    ) -> None:
        self.sequences = sequences
        self._pinned = pinned
        self._logprobs = logprobs

    def read(self) -> tuple[list[int], Mapping[int, TokenLogprob]]:
        tokens = self._pinned.wait(len(self.sequences))
        return tokens, self._logprobs.read(tokens) if self._logprobs else NO_LOGPROBS


class AsyncLogprobs:
    """Log probabilities of one sampler output, on their way to the host; computed as in `sampling.Logprobs`."""

    def __init__(self, indices: list[int], wanted: list[int], at: Tensor, logits: Tensor, tokens: Tensor) -> None:
        self._indices = indices
        self._wanted = wanted
        logprobs = logits[at].float().log_softmax(-1)
        own = logprobs.gather(-1, tokens[at][:, None])[:, 0]
        values, ids = logprobs.topk(max(wanted))
        self._copies = [found.to("cpu", non_blocking=True) for found in (own, values, ids)]

    def read(self, tokens: Sequence[int]) -> dict[int, TokenLogprob]:
        """By index, once the output's tokens are there."""
        own, values, ids = (copy.tolist() for copy in self._copies)
        return {
            index: TokenLogprob(tokens[index], own[at], tuple(zip(ids[at][:top], values[at][:top], strict=True)))
            for at, (index, top) in enumerate(zip(self._indices, self._wanted, strict=True))
        }


class CUDARunner:
    """`kv_cache` is laid out as in `AttentionMetadata`; its last KV slot belongs to no row."""

    def __init__(self, model: PreTrainedModel, kv_cache: Tensor, num_slots: int) -> None:
        self.num_slots = num_slots
        self._model = model
        self._kv_cache = kv_cache
        self._vocab_size = model.config.get_text_config().vocab_size
        self._spare_kv_slot = kv_cache.shape[3] - 1
        self._state = SamplingState(num_slots, self._vocab_size, self._spare_kv_slot, kv_cache.device)
        self._decode_graphs: list[DecodeGraph] = []
        self._prefill_graphs: list[PrefillGraph] = []
        self._slots_on_device: dict[int, list[int]] = {}  # by a decode graph's size: the slots it was last given
        self._new: list[RunningSequence] = []
        self._below_min_tokens: set[RunningSequence] = set()
        self._want_logprobs: set[RunningSequence] = set()
        self._guided: dict[RunningSequence, GuidedRow] = {}
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._pinned_outputs = cycle([PinnedOutput(num_slots) for _ in range(MAX_IN_FLIGHT)])
        self._last_pass: PassOutputs

    def capture(self, prefills: Sequence[int], decodes: Sequence[int]) -> Iterator[None]:
        """Capture prefills of so many tokens and decode steps of so many sequences, one each
        time the iterator moves on."""
        capture = GraphCapture(self._model, self._kv_cache, self._state)
        for tokens in sorted(prefills, reverse=True):
            inputs = PrefillInputs(tokens, self.num_slots, self._kv_cache.device)
            self._prefill_graphs.insert(0, capture.prefill(tokens, inputs))
            yield
        for sequences in sorted(decodes, reverse=True):
            self._decode_graphs.insert(0, capture.decode(sequences))
            yield

    def profile_run(self, tokens: int) -> None:
        """A prefill of so many tokens that belong to no row, without capture: to see how much memory it takes."""
        inputs = PrefillInputs(tokens, self.num_slots, self._kv_cache.device)
        inputs.kv_slots.fill_(self._spare_kv_slot)
        prefill_logits(self._model, self._kv_cache, inputs)
        torch.cuda.synchronize(self._kv_cache.device)

    def add_sequence(self, sequence: RunningSequence) -> None:
        request = sequence.row.request
        self._new.append(sequence)
        if GuidedRow.is_needed(request):
            self._guided[sequence] = GuidedRow(request, self._vocab_size, self._helper)
        if request.sampling.min_tokens:
            self._below_min_tokens.add(sequence)
        if request.sampling.top_logprobs is not None:
            self._want_logprobs.add(sequence)

    def remove_sequence(self, sequence: RunningSequence) -> None:
        if sequence in self._new:
            self._new.remove(sequence)
        self._guided.pop(sequence, None)
        self._below_min_tokens.discard(sequence)
        self._want_logprobs.discard(sequence)

    def copy_kv(self, source: int, target: int, count: int) -> None:
        self._kv_cache[:, :, :, target : target + count] = self._kv_cache[:, :, :, source : source + count]

    def prefill(self, chunks: Sequence[tuple[RunningSequence, Chunk]]) -> None:
        if self._new:
            self._state.add_sequences(self._new, [sequence in self._guided for sequence in self._new])
            self._new = []
        graph = smallest(self._prefill_graphs, sum(chunk.num_tokens for _, chunk in chunks))
        inputs = PrefillInputs(graph.size, self.num_slots, "cpu")
        fill(inputs, chunks, spare_kv_slot=self._spare_kv_slot, spare_slot=self.num_slots)
        graph.inputs.all.copy_(inputs.all.pin_memory(), non_blocking=True)
        graph.forward.replay()
        self._last_pass = graph.out

    def prompt_logits(self, sequence: RunningSequence, chunk: Chunk) -> Tensor:
        device = self._kv_cache.device
        on_host, inputs = (PrefillInputs(chunk.num_tokens, 1, place) for place in ("cpu", device))
        fill(on_host, [(sequence, chunk)], spare_kv_slot=self._spare_kv_slot, spare_slot=self.num_slots)
        inputs.all.copy_(on_host.all.pin_memory(), non_blocking=True)
        return prefill_logits(self._model, self._kv_cache, inputs, torch.arange(chunk.num_tokens, device=device))

    def decode(self, sequences: Sequence[RunningSequence]) -> None:
        graph = smallest(self._decode_graphs, len(sequences))
        slots = [sequence.slot for sequence in sequences] + [self.num_slots] * (graph.size - len(sequences))
        if self._slots_on_device.get(graph.size) != slots:
            graph.out.slots.copy_(torch.tensor(slots, dtype=torch.int32).pin_memory(), non_blocking=True)
            self._slots_on_device[graph.size] = slots
        graph.forward.replay()
        self._last_pass = graph.out

    def needs_host_sync(self, sequences: Sequence[RunningSequence]) -> bool:
        return bool(self._guided) and any(sequence in self._guided for sequence in sequences)

    def accept_token(self, sequence: RunningSequence, token: int) -> None:
        if self._guided and sequence in self._guided:
            self._guided[sequence].accept_token(token)

    def sample(self, sequences: Sequence[RunningSequence]) -> AsyncOutput:
        out = self._last_pass
        self._restrict(sequences)
        out.sample.replay()
        tokens = out.tokens[: len(sequences)]
        pinned = next(self._pinned_outputs)
        pinned.copy(tokens)
        logprobs = self._logprobs(sequences, out.logits, tokens) if self._want_logprobs else None
        pinned.record()
        return AsyncOutput(sequences, pinned, logprobs)

    @property
    def logits(self) -> Tensor:
        return self._last_pass.logits

    def _restrict(self, sequences: Sequence[RunningSequence]) -> None:
        """Send what only the host knows of the next tokens: which a grammar allows, and whether a row may stop."""
        if self._guided:
            guided = [sequence for sequence in sequences if sequence in self._guided]
            if guided:
                bitmasks = torch.from_numpy(np.stack([self._guided[sequence].bitmask() for sequence in guided]))
                slots = self._state.to_device(torch.tensor([sequence.slot for sequence in guided]))
                self._state.bitmask.index_copy_(0, slots, self._state.to_device(bitmasks))
        if self._below_min_tokens:
            for sequence in self._below_min_tokens.intersection(sequences):
                if sequence.num_output_tokens >= sequence.row.request.sampling.min_tokens:
                    self._state.set_bias(sequence, may_stop=True)
                    self._below_min_tokens.discard(sequence)

    def _logprobs(self, sequences: Sequence[RunningSequence], logits: Tensor, tokens: Tensor) -> AsyncLogprobs | None:
        indices = [index for index, sequence in enumerate(sequences) if sequence in self._want_logprobs]
        if not indices:
            return None
        wanted = [sequences[index].row.request.sampling.top_logprobs or 0 for index in indices]
        return AsyncLogprobs(indices, wanted, self._state.to_device(torch.tensor(indices)), logits, tokens)


def fill(
    inputs: PrefillInputs, chunks: Sequence[tuple[RunningSequence, Chunk]], *, spare_kv_slot: int, spare_slot: int
) -> None:
    """Write a prefill's chunks. Padding goes to the KV slot and the sequence slot that belong to no row."""
    end = 0
    for sequence, chunk in chunks:
        past, seq_len = chunk.num_computed_tokens, chunk.seq_len
        here = slice(end, end := end + chunk.num_tokens)
        inputs.ids[here] = torch.tensor(sequence.row.request.prompt[past:seq_len])
        torch.arange(past, seq_len, out=inputs.positions[here])
        torch.arange(chunk.kv_start + past, chunk.kv_start + seq_len, out=inputs.kv_slots[here])
    inputs.kv_slots[end:] = spare_kv_slot
    blocks = [block for _, chunk in chunks for block in chunk.split(QUERY_BLOCK)]
    cu_seqlens_q = list(accumulate((block.num_tokens for block in blocks), initial=0))
    inputs.cu_seqlens_q[: len(cu_seqlens_q)] = torch.tensor(cu_seqlens_q)
    inputs.cu_seqlens_q[len(cu_seqlens_q) :] = end
    inputs.kv_starts[: len(blocks)] = torch.tensor([block.kv_start for block in blocks])
    inputs.seq_lens[: len(blocks)] = torch.tensor([block.seq_len for block in blocks])
    ends = accumulate(chunk.num_tokens for _, chunk in chunks)
    complete = [
        (end, sequence.slot)
        for end, (sequence, chunk) in zip(ends, chunks, strict=True)
        if sequence.remaining_prompt == chunk.num_tokens
    ]
    inputs.last_tokens[: len(complete)] = torch.tensor([end - 1 for end, _ in complete])
    inputs.slots[: len(complete)] = torch.tensor([slot for _, slot in complete])
    inputs.slots[len(complete) :] = spare_slot
