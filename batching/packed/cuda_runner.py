"""`Runner` on a CUDA device: forward passes as CUDA graphs, tokens sampled on the device.

Worker thread only. Nothing here waits for the device but `read`.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, cycle

import torch
from torch import Tensor
from transformers import PreTrainedModel

from batching.grammar import Bitmask, GuidedRow
from batching.memory import cache_bytes_per_token
from batching.packed.attention import Chunk
from batching.packed.cuda_graphs import (
    DecodeGraph,
    GraphCapture,
    MixedGraph,
    PassInputs,
    PassOutputs,
    SampleGraph,
    smallest,
    wide_sizes,
)
from batching.packed.cuda_output import OUT_TOKENS, AsyncLogprobs, AsyncOutput, PinnedOutput, Prospect
from batching.packed.kv_cache import BLOCK_SIZE
from batching.packed.runner import RunningSequence
from batching.packed.sampling_state import SamplingState
from batching.packed.triton_attention import QUERY_BLOCK
from batching.packed.triton_compile import compiled_together
from batching.sampling import OtherLogprobs

MAX_IN_FLIGHT = 8
"""Sampler outputs that can be unread at a time: at most two an iteration, and two iterations."""


class CUDARunner:
    """`kv_cache` is laid out as in `AttentionMetadata`; its last block belongs to no row. A row has at most
    `max_blocks`, and at most `max_draft_tokens` are drafted for it in a step."""

    works_beside_host = True

    def __init__(
        self, model: PreTrainedModel, kv_cache: Tensor, num_slots: int, max_blocks: int, max_draft_tokens: int = 0
    ) -> None:
        self.num_slots = num_slots
        self.mixed_sizes: Sequence[int] = ()
        self._max_draft_tokens = max_draft_tokens
        self._vocab_size = model.config.get_text_config().vocab_size
        self._device = kv_cache.device
        self._spare_block = kv_cache.shape[3] // BLOCK_SIZE - 1
        self._state = SamplingState(
            num_slots, self._vocab_size, max_blocks, self._spare_block, max_draft_tokens, self._device
        )
        wide = wide_sizes(num_slots, 1 + max_draft_tokens) if max_draft_tokens else []
        max_tokens = max([num_slots, *(size * (1 + max_draft_tokens) for size in wide)])
        self._capture = GraphCapture(model, kv_cache, self._state, max_tokens)
        self._wide_sizes = wide
        self._step_costs: dict[int, tuple[float, float]] = {}
        self._seconds_per_key = 0.0
        self._bytes = sum(parameter.nbytes for parameter in model.parameters())
        self._bytes_per_key = cache_bytes_per_token(model.config, kv_cache.dtype)
        self._prospect = Prospect()
        self._width = 1
        self._decode_graphs: list[DecodeGraph] = []
        self._wide_graphs: list[DecodeGraph] = []
        self._sample_graphs: list[SampleGraph] = []
        self._mixed_graphs: list[MixedGraph] = []
        self._slots_on_device: list[int] = []
        self._new: list[RunningSequence] = []
        self._below_min_tokens: set[RunningSequence] = set()
        self._want_logprobs: set[RunningSequence] = set()
        self._guided: dict[RunningSequence, GuidedRow] = {}
        self._bitmask = Bitmask(num_slots, self._vocab_size, self._device)
        self._pinned_outputs = cycle([PinnedOutput(len(self._out.numbers)) for _ in range(MAX_IN_FLIGHT)])

    def capture(self, mixed: Sequence[int], decodes: Sequence[int]) -> Iterator[None]:
        """Capture mixed forward passes for these numbers of tokens and decode steps for these numbers of sequences, one
        at each step of the iterator."""
        self.mixed_sizes = sorted(mixed)
        for tokens in reversed(self.mixed_sizes):
            inputs = PassInputs(tokens, self.num_slots, self._device)
            self._mixed_graphs.insert(0, self._capture.mixed(tokens, inputs))
            yield
        for sequences in sorted(decodes, reverse=True):
            self._decode_graphs.insert(0, self._capture.decode(sequences, 1))
            self._sample_graphs.insert(0, self._capture.sample(sequences, 1))
            yield
        width = 1 + self._max_draft_tokens
        for sequences in sorted(self._wide_sizes, reverse=True):
            self._wide_graphs.insert(0, self._capture.decode(sequences, width))
            self._sample_graphs.insert(0, self._capture.sample(sequences, width))
            yield

    def compile_kernels(self, mixed: Sequence[int], decodes: Sequence[int]) -> None:
        """All that the same passes launch, at once. Nothing can be captured afterwards."""
        self._capture.only_run = True
        with compiled_together():
            for _ in self.capture(mixed, decodes):
                pass

    @property
    def num_wide_graphs(self) -> int:
        """How many decode steps with drafts `capture` captures, in addition to what it is given."""
        return len(self._wide_sizes)

    def measure_steps(self) -> None:
        """What a step takes with and without drafts, while no sequence has any keys to read; and reading a key."""
        for wide in self._wide_graphs:
            narrow = smallest(self._decode_graphs, min(wide.size, self.num_slots))
            self._step_costs[wide.size] = self._seconds(narrow), self._seconds(wide)
        if self._step_costs:
            self._seconds_per_key = self._step_costs[1][0] / self._bytes * self._bytes_per_key

    def _seconds(self, graph: DecodeGraph) -> float:
        """Of a step: the least of three."""
        times: list[float] = []
        for _ in range(3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.forward.replay()
            self._sample_graph(graph.size, graph.width).run.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000)
        return min(times)

    def _sample_graph(self, sequences: int, width: int) -> SampleGraph:
        return smallest([graph for graph in self._sample_graphs if graph.width == width], sequences)

    def profile_run(self, tokens: int) -> None:
        """A forward pass over dummy tokens, without capture, to measure how much memory it takes."""
        inputs = PassInputs(tokens, self.num_slots, self._device)
        inputs.kv_slots.fill_(self._spare_block * BLOCK_SIZE)
        self._capture.mixed_logits(inputs)
        torch.cuda.synchronize(self._device)

    def add_sequence(self, sequence: RunningSequence) -> None:
        request = sequence.row.request
        self._new.append(sequence)
        if GuidedRow.is_needed(request):
            if sequence not in self._guided:  # it is after a preemption
                self._guided[sequence] = GuidedRow(request, self._vocab_size)
            self._bitmask.begin(self._guided[sequence], sequence.slot)
        if sequence.num_output_tokens < request.sampling.min_tokens:
            self._below_min_tokens.add(sequence)
        if request.sampling.top_logprobs is not None:
            self._want_logprobs.add(sequence)

    def preempt_sequence(self, sequence: RunningSequence) -> None:
        if sequence in self._new:
            self._new.remove(sequence)
        self._state.remove_sequence(sequence)

    def remove_sequence(self, sequence: RunningSequence) -> None:
        self.preempt_sequence(sequence)
        self._guided.pop(sequence, None)
        self._below_min_tokens.discard(sequence)
        self._want_logprobs.discard(sequence)

    def num_draft_tokens(self, decoding: Sequence[RunningSequence]) -> int:
        """All that may be drafted, if the tokens expected of a step with drafts are worth its time; else 0."""
        size = next((size for size in self._wide_sizes if size >= len(decoding)), None)
        if size is None or not self._prospect.value:
            return 0
        narrow, wide = self._step_costs[size]
        reading = self._seconds_per_key * sum(len(sequence.tokens) for sequence in decoding)
        is_worth_it = (1 + self._prospect.value) * (narrow + reading) > wide + reading
        return self._max_draft_tokens if is_worth_it else 0

    def forward(
        self,
        decoding: Sequence[RunningSequence],
        chunks: Sequence[tuple[RunningSequence, Chunk]] = (),
        num_draft_tokens: int = 0,
    ) -> None:
        self._send([*decoding, *(sequence for sequence, _ in chunks)])
        self._width = 1 + num_draft_tokens
        if chunks:
            self._mixed(decoding, chunks)
        else:
            self._decode(decoding)

    def prompt_logits(self, sequence: RunningSequence, chunk: Chunk) -> Tensor:
        self._send([sequence])
        on_host, inputs = (PassInputs(chunk.num_tokens, self.num_slots, place) for place in ("cpu", self._device))
        self._fill(on_host, [], [(sequence, chunk)])
        inputs.all.copy_(on_host.all.pin_memory(), non_blocking=True)
        return self._capture.mixed_logits(inputs, of_all=True)

    def _send(self, sequences: Sequence[RunningSequence]) -> None:
        """What the device does not know yet: the state of new sequences, and the blocks that these have got."""
        if self._new:
            self._state.add_sequences(self._new, [sequence in self._guided for sequence in self._new])
            self._new = []
        self._state.send_blocks(sequences)

    def _fill(
        self,
        inputs: PassInputs,
        decoding: Sequence[RunningSequence],
        chunks: Sequence[tuple[RunningSequence, Chunk]],
    ) -> None:
        spare_kv_slot = self._spare_block * BLOCK_SIZE
        fill(inputs, decoding, chunks, spare_kv_slot=spare_kv_slot, spare_slot=self.num_slots)

    def _mixed(self, decoding: Sequence[RunningSequence], chunks: Sequence[tuple[RunningSequence, Chunk]]) -> None:
        graph = smallest(self._mixed_graphs, len(decoding) + sum(chunk.num_tokens for _, chunk in chunks))
        inputs = PassInputs(graph.size, self.num_slots, "cpu")
        self._fill(inputs, decoding, chunks)
        graph.inputs.all.copy_(inputs.all.pin_memory(), non_blocking=True)
        graph.forward.replay()
        self._slots_on_device = []

    def _decode(self, sequences: Sequence[RunningSequence]) -> None:
        graph = smallest(self._decode_graphs if self._width == 1 else self._wide_graphs, len(sequences))
        slots = [sequence.slot for sequence in sequences] + [self.num_slots] * (graph.size - len(sequences))
        if self._slots_on_device != slots:
            pinned = torch.tensor(slots, dtype=torch.int32).pin_memory()
            self._out.slots[: graph.size].copy_(pinned, non_blocking=True)
            self._slots_on_device = slots
        graph.forward.replay()

    def needs_host_sync(self, sequences: Sequence[RunningSequence]) -> bool:
        return bool(self._guided) and any(sequence in self._guided for sequence in sequences)

    def accept_tokens(self, sequences: Sequence[RunningSequence], tokens: Sequence[int]) -> None:
        if not self._guided:
            return
        mine = [(s, token) for s, token in zip(sequences, tokens, strict=True) if s in self._guided]
        guided = [self._guided[sequence] for sequence, _ in mine]
        self._bitmask.accept_tokens(guided, [token for _, token in mine], [sequence.slot for sequence, _ in mine])

    def sample(self, sequences: Sequence[RunningSequence]) -> AsyncOutput:
        pinned = next(self._pinned_outputs)
        if not sequences:
            pinned.record()
            return AsyncOutput(sequences, self._width, pinned, None, self._prospect)
        self._restrict(sequences)
        self._sample_graph(len(sequences), self._width).run.replay()
        results = self._out.results(len(sequences), self._width)
        pinned.copy(results)
        logprobs = self._logprobs(sequences, results[:, OUT_TOKENS:]) if self._want_logprobs else None
        pinned.record()
        return AsyncOutput(sequences, self._width, pinned, logprobs, self._prospect)

    @property
    def logits(self) -> Tensor:
        return self._out.logits

    @property
    def _out(self) -> PassOutputs:
        return self._capture.out

    def _restrict(self, sequences: Sequence[RunningSequence]) -> None:
        """Send what only the host knows about the next tokens: which a grammar allows, and whether a row may stop."""
        if guided := [sequence.slot for sequence in sequences if sequence in self._guided]:
            between = slice(min(guided), max(guided) + 1)  # one copy; what it takes along is not read
            self._state.bitmask[between].copy_(self._bitmask.wait()[between], non_blocking=True)
        if self._below_min_tokens:
            for sequence in self._below_min_tokens.intersection(sequences):
                if sequence.num_output_tokens >= sequence.row.request.sampling.min_tokens:
                    self._state.set_bias(sequence, may_stop=True)
                    if sequence not in self._guided:
                        self._state.start_drafting(sequence)
                    self._below_min_tokens.discard(sequence)

    def _logprobs(self, sequences: Sequence[RunningSequence], tokens: Tensor) -> AsyncLogprobs | None:
        indices = [index for index, sequence in enumerate(sequences) if sequence in self._want_logprobs]
        if not indices:
            return None
        others = OtherLogprobs([sequences[index].row.request.sampling for index in indices])
        at = self._state.to_device(torch.tensor(indices))
        ids = self._state.to_device(others.ids) if others.ids.numel() else others.ids.to(self._device)
        return AsyncLogprobs(indices, others, at, ids, self._out.logits, tokens)


def fill(
    inputs: PassInputs,
    decoding: Sequence[RunningSequence],
    chunks: Sequence[tuple[RunningSequence, Chunk]],
    *,
    spare_kv_slot: int,
    spare_slot: int,
) -> None:
    """Write a mixed pass. Padding goes to the KV slot and the sequence slot that belong to no row."""
    end = first = len(decoding)
    for sequence, chunk in chunks:
        past, seq_len = chunk.num_computed_tokens, chunk.seq_len
        here = slice(end, end := end + chunk.num_tokens)
        inputs.ids[here] = torch.tensor(sequence.tokens[past:seq_len])
        torch.arange(past, seq_len, out=inputs.positions[here])
        inputs.kv_slots[here] = chunk.kv_slots()[past:]
    inputs.kv_slots[end:] = spare_kv_slot
    blocks = [(block, sequence.slot) for sequence, chunk in chunks for block in chunk.split(QUERY_BLOCK)]
    starts = accumulate((block.num_tokens for block, _ in blocks), initial=first)
    columns = [(b.seq_len, start, b.num_tokens, slot) for (b, slot), start in zip(blocks, starts, strict=False)]
    inputs.num_blocks[0] = len(blocks)
    inputs.blocks[: len(blocks)] = torch.tensor(sorted(columns, reverse=True))
    ends = accumulate((chunk.num_tokens for _, chunk in chunks), initial=first)
    next(ends)
    sampled = [(index, sequence.slot) for index, sequence in enumerate(decoding)]
    sampled += [
        (end - 1, sequence.slot)
        for end, (sequence, chunk) in zip(ends, chunks, strict=True)
        if sequence.remaining_prefill == chunk.num_tokens
    ]
    inputs.last_tokens[: len(sampled)] = torch.tensor([last for last, _ in sampled], dtype=torch.int64)
    inputs.slots[: len(sampled)] = torch.tensor([slot for _, slot in sampled], dtype=torch.int64)
    inputs.slots[len(sampled) :] = spare_slot
    inputs.num_decodes[0], inputs.num_sequences[0] = first, len(sampled)
