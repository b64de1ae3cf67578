"""Forward passes captured as CUDA graphs: mixed passes by how many tokens, decode steps by how many sequences.

Worker thread only. A mixed pass computes prompts, and the newest tokens of sequences that decode along with them: the
weights are read once for both. A pass is two graphs, the model's forward pass and the sampling, because a row's grammar
may be matched on the host while the model runs. All state is on the device and is advanced there, so a decode step is
two launches and a copy of the tokens back; a mixed pass is one copy more. Launched one by one, the kernels of a pass
would each have to get the interpreter back from the event loop first.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from batching.packed import triton_sampling
from batching.packed.attention import Attend, AttentionMetadata, Wanted
from batching.packed.layer import logits_of
from batching.packed.sampling_state import SamplingState
from batching.packed.triton_attention import (
    BLOCK_COLUMNS,
    QUERY_BLOCK,
    DecodeAttention,
    MixedAttention,
    PrefillAttention,
)
from batching.packed.triton_layer import HOPPER, capability

Graph = torch.cuda.CUDAGraph

MAX_WIDE_TOKENS = 256
"""Tokens of a decode step with drafts. With more of them an H100 multiplies for longer than it reads the weights."""


@dataclass(frozen=True, slots=True)
class PassOutputs:
    """What forward passes leave: `logits` of the sequences in `slots` [sequences, int32], from which `sampled` are
    taken, and what is read back of them: `numbers`, of which `results` are a part."""

    slots: Tensor
    logits: Tensor
    numbers: Tensor

    def results(self, sequences: int, width: int) -> Tensor:
        """[sequences, OUT_TOKENS + width], as `triton_sampling.advance` writes it."""
        columns = triton_sampling.OUT_TOKENS.value + width
        return self.numbers[: sequences * columns].view(sequences, columns)


class PassInputs:
    """The host's inputs of a mixed forward pass, in one integer tensor that is written with one copy."""

    def __init__(self, tokens: int, num_slots: int, device: torch.device | str) -> None:
        blocks = num_slots + tokens // QUERY_BLOCK
        sizes = [tokens, tokens, tokens, 1, blocks * BLOCK_COLUMNS.value, num_slots, num_slots, 1, 1]
        self.all = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        # By token; those of sequences that decode come first, and are written on the device.
        self.ids, self.positions, self.kv_slots, *rest = torch.split(self.all, sizes)
        # By block of at most QUERY_BLOCK tokens of a prompt, as `PrefillAttention` has them.
        self.num_blocks, columns, *rest = rest
        self.blocks = columns.view(blocks, BLOCK_COLUMNS.value)
        # By sequence that gets a token, those that decode first: the index of its last token, and its sequence slot;
        # how many decode, and how many there are.
        self.last_tokens, self.slots, self.num_decodes, self.num_sequences = rest


@dataclass(frozen=True, slots=True)
class MixedGraph:
    """A captured forward pass over `size` tokens."""

    size: int
    forward: Graph
    inputs: PassInputs


@dataclass(frozen=True, slots=True)
class DecodeGraph:
    """A captured forward pass over the newest tokens of `size` sequences, `width` each: drafts follow the first."""

    size: int
    width: int
    forward: Graph
    kept: tuple[Tensor, ...]  # a graph only holds addresses, so this keeps the tensors alive


@dataclass(frozen=True, slots=True)
class SampleGraph:
    """Captured sampling for `size` sequences, each with the logits of `width` tokens."""

    size: int
    width: int
    run: Graph


def decode_sizes(num_slots: int) -> list[int]:
    """The numbers of sequences that decode steps are captured for: a step uses the next larger one."""
    few = (n for n in (1, 2, 4) if n < num_slots)
    spaced = (*range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, 1024, 128))
    return sorted({*few, *(n for n in spaced if n < num_slots), num_slots})


def wide_sizes(num_slots: int, width: int) -> list[int]:
    """The numbers of sequences that decode steps with drafts are captured for, `width` tokens each."""
    most = min(num_slots, MAX_WIDE_TOKENS // width)
    powers = (1 << power for power in range(most.bit_length()))
    return sorted({*(size for size in powers if size < most), most})


def mixed_sizes(prefill_chunk: int, max_prefill_tokens: int) -> list[int]:
    """The numbers of tokens that mixed passes are captured for."""
    sizes = [*range(256, 2049, 256), *(n << power for power in range(10, 20) for n in (3, 4))]
    return sorted({*(size for size in sizes if size < max_prefill_tokens), prefill_chunk, max_prefill_tokens})


class GraphCapture:
    """Captures forward passes, the largest first, into memory that all share: only one of them runs at a time.

    At most `max_tokens` are sampled at a time, those of drafts included. With `only_run` each pass just runs, once.
    """

    def __init__(self, model: PreTrainedModel, kv_cache: Tensor, state: SamplingState, max_tokens: int) -> None:
        self.only_run = False
        self._model = model
        self._few_layers = FewLayers(model)
        self._kv_cache = kv_cache
        self._state = state
        self._memory_pool = torch.cuda.graph_pool_handle()
        # One of each, because cuBLAS keeps memory for every stream. Decode attention, which waits for memory, runs
        # beside prefill attention, which waits for the matrix units.
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._beside = torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]
        self._num_slots = len(state.int_params) - 1
        self._num_heads: int = model.config.get_text_config().num_attention_heads
        slots = torch.full((self._num_slots,), self._num_slots, dtype=torch.int32, device=kv_cache.device)
        logits = torch.zeros(max_tokens, state.counts.shape[1], dtype=kv_cache.dtype, device=kv_cache.device)
        self._mixed_decodes: DecodeAttention | None = None
        self._prefill_attention = self._prefill_attention_here()
        numbers = torch.zeros(
            (triton_sampling.OUT_TOKENS.value + 1) * max_tokens, dtype=torch.int64, device=slots.device
        )
        self.out = PassOutputs(slots, logits, numbers)

    def sample(self, sequences: int, width: int) -> SampleGraph:
        """Capture sampling of the first `sequences` of `out`, with the logits of `width` tokens each."""
        state, slots = self._state, self.out.slots[:sequences]
        logits, results = self.out.logits[: sequences * width], self.out.results(sequences, width)
        params = state.int_params, state.float_params, state.counts

        def run() -> None:
            sampled = triton_sampling.sample(logits, slots, *params, state.bias, state.bitmask, state.drafts)
            triton_sampling.advance(
                sampled, slots, *params, state.drafts, state.history, results, drafting=state.is_drafting
            )

        return SampleGraph(sequences, width, self._graph(run))

    def decode(self, sequences: int, width: int) -> DecodeGraph:
        """Capture the decode step for this many sequences, with `width` tokens each."""
        slots, device = self.out.slots[:sequences], self._kv_cache.device
        tokens = sequences * width
        ids, positions, kv_slots = torch.zeros(3, tokens, dtype=torch.int64, device=device)
        attend = self._decode_attention(slots, width)
        num_decodes = torch.full((1,), sequences, dtype=torch.int64, device=device)

        def run() -> None:
            self._place_decodes(attend, num_decodes, ids, positions, kv_slots)
            self.out.logits[:tokens].copy_(self._logits(ids, positions, kv_slots, attend))

        kept = ids, positions, kv_slots, num_decodes, *attend.tensors
        return DecodeGraph(sequences, width, self._graph(run), kept)

    def mixed(self, tokens: int, inputs: PassInputs) -> MixedGraph:
        """Capture the mixed forward pass for this many tokens."""
        inputs.kv_slots.fill_(self._kv_cache.shape[3] - 1)
        inputs.slots.fill_(self._num_slots)
        decodes = self._mixed_decode_attention(inputs)

        def run() -> None:
            self.out.slots.copy_(inputs.slots)
            self.out.logits[: self._num_slots].copy_(self.mixed_logits(inputs, decodes))

        return MixedGraph(tokens, self._graph(run), inputs)

    def mixed_logits(
        self, inputs: PassInputs, decodes: DecodeAttention | None = None, *, of_all: bool = False
    ) -> Tensor:
        """Logits [tokens, vocabulary] of the `last_tokens`, or `of_all`.

        Tokens beyond those that decode and those of prompts have no effect.
        """
        decodes = decodes or self._mixed_decode_attention(inputs)
        places = inputs.ids, inputs.positions, inputs.kv_slots
        self._place_decodes(decodes, inputs.num_decodes, *places)
        blocks = inputs.num_blocks.int(), inputs.blocks.int()
        attend = MixedAttention(self._prefill_attention(*blocks), decodes, self._beside)
        return self._logits(*places, attend, None if of_all else self._last_tokens(inputs, decodes))

    def _last_tokens(self, inputs: PassInputs, decodes: DecodeAttention) -> Wanted:
        """The last token of each sequence, which attends as one that decodes."""
        seq_lens = (inputs.positions[inputs.last_tokens] + 1).int()
        return Wanted(inputs.last_tokens, replace(decodes, seq_lens=seq_lens, num_sequences=inputs.num_sequences))

    def _logits(
        self, ids: Tensor, positions: Tensor, kv_slots: Tensor, attend: Attend, wanted: Wanted | None = None
    ) -> Tensor:
        return logits_of(self._model, ids, positions, AttentionMetadata(self._kv_cache, kv_slots, attend, wanted))

    def _place_decodes(
        self, attend: DecodeAttention, num_decodes: Tensor, ids: Tensor, positions: Tensor, kv_slots: Tensor
    ) -> None:
        state = self._state
        triton_sampling.place_decodes(
            attend.slots, num_decodes, state.int_params, state.block_tables, state.drafts, ids, positions, kv_slots,
            attend.seq_lens, attend.num_drafted, width=attend.width, spare_kv_slot=self._kv_cache.shape[3] - 1,
        )  # fmt: skip

    def _prefill_attention_here(self) -> Callable[[Tensor, Tensor], PrefillAttention]:
        """With its `num_blocks` and `blocks` to be given."""
        tables, device = self._state.block_tables, self._kv_cache.device
        if capability(device) == HOPPER:
            from batching.packed import gluon_attention  # takes a while, and other GPUs do without

            if gluon_attention.suits(self._kv_cache, self._num_heads):
                next_tile = torch.zeros(1, dtype=torch.int32, device=device)
                return partial(gluon_attention.HopperPrefillAttention, block_tables=tables, next_tile=next_tile)
        return partial(PrefillAttention, block_tables=tables)

    def _mixed_decode_attention(self, inputs: PassInputs) -> DecodeAttention:
        if self._mixed_decodes is None:
            self._mixed_decodes = self._decode_attention(self.out.slots)
        return self._mixed_decodes.of_first(len(inputs.ids), inputs.num_decodes)

    def _decode_attention(self, slots: Tensor, width: int = 1) -> DecodeAttention:
        return DecodeAttention.of(slots, self._state.block_tables, self._kv_cache.shape[2], width=width)

    def _graph(self, run: Callable[[], object]) -> Graph:
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), self._few_layers.alone():
            run()  # loading and compilation at first use must not be captured
        torch.cuda.current_stream().wait_stream(stream)
        graph = Graph()
        if self.only_run:
            return graph
        with torch.cuda.graph(graph, pool=self._memory_pool, stream=stream):
            run()
        return graph


class FewLayers:
    """A model's list of layers, and one layer of each form, which launch what all of them do. The last one is among
    them, whatever its form."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._base = model.base_model
        count = model.config.get_text_config().num_hidden_layers
        lists = ((name, part) for name, part in self._base.named_children() if isinstance(part, nn.ModuleList))
        self._name, self._all = next(
            ((name, part) for name, part in lists if len(part) == count), ("", nn.ModuleList())
        )
        unlike = {form_of(layer): layer for layer in self._all[:-1]}
        self._few = nn.ModuleList([*unlike.values(), *self._all[-1:]])

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The model has no other layers meanwhile, if its layers are a list."""
        if not self._name:
            yield
            return
        setattr(self._base, self._name, self._few)
        try:
            yield
        finally:
            setattr(self._base, self._name, self._all)


def form_of(layer: nn.Module) -> Hashable:
    """The same for layers whose weights have the same names, shapes and types."""
    return tuple((name, weight.shape, weight.dtype) for name, weight in layer.state_dict().items())


class Sized(Protocol):
    @property
    def size(self) -> int: ...


AnyGraph = TypeVar("AnyGraph", bound=Sized)


def smallest(graphs: Sequence[AnyGraph], size: int) -> AnyGraph:
    """The smallest of the graphs, which are in order, that has room for `size`."""
    return next(graph for graph in graphs if graph.size >= size)
