"""Forward passes captured as CUDA graphs: prefill by how many tokens, decode steps by how many sequences.

Worker thread only. A pass is two graphs, the model's forward pass and the sampling, because a row's grammar may be
matched on the host while the model runs. All state is on the device and is advanced there, so a decode step is two
launches and a copy of the tokens back; a prefill is one copy more. Launched one by one, the kernels of a pass would
each have to get the interpreter back from the event loop first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from batching.packed import triton_sampling
from batching.packed.attention import AttentionMetadata
from batching.packed.sampling_state import SamplingState
from batching.packed.triton_attention import QUERY_BLOCK, DecodeAttention, PrefillAttention

Graph = torch.cuda.CUDAGraph


@dataclass(frozen=True, slots=True)
class PassOutputs:
    """What a forward pass leaves: `logits` of the sequences in `slots` [sequences, int32], from which the graph
    `sample` takes `tokens`."""

    slots: Tensor
    logits: Tensor
    tokens: Tensor
    sample: Graph


class PrefillInputs:
    """What a prefill reads, in one integer tensor that is written with one copy."""

    def __init__(self, tokens: int, num_slots: int, device: torch.device | str) -> None:
        blocks = num_slots + tokens // QUERY_BLOCK
        sizes = [tokens, tokens, tokens, blocks + 1, blocks, blocks, num_slots, num_slots]
        self.all = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self.ids, self.positions, self.kv_slots, *rest = torch.split(self.all, sizes)
        # By block of at most QUERY_BLOCK tokens of a sequence, as `PrefillAttention` has them; and by prompt that is
        # complete with this pass: the index of its last token, and its sequence slot.
        self.cu_seqlens_q, self.kv_starts, self.seq_lens, self.last_tokens, self.slots = rest


@dataclass(frozen=True, slots=True)
class PassGraph:
    """A captured forward pass over `size` tokens of prompts, or over `size` decoding sequences."""

    size: int
    out: PassOutputs
    forward: Graph


@dataclass(frozen=True, slots=True)
class PrefillGraph(PassGraph):
    inputs: PrefillInputs


@dataclass(frozen=True, slots=True)
class DecodeGraph(PassGraph):
    attention: DecodeAttention  # a graph knows only the addresses of what it reads, so this keeps the tensors alive


def decode_sizes(num_slots: int) -> list[int]:
    """The numbers of sequences that decode steps are captured for: a step uses the next larger one."""
    few = (n for n in (1, 2, 4) if n < num_slots)
    return sorted({*few, *range(8, num_slots, 8 if num_slots <= 128 else 32), num_slots})


def prefill_sizes(prefill_chunk: int, max_prefill_tokens: int) -> list[int]:
    """The numbers of tokens that prefills are captured for."""
    sizes = [*range(256, 2049, 256), *(n << power for power in range(10, 20) for n in (3, 4))]
    return sorted({*(size for size in sizes if size < max_prefill_tokens), prefill_chunk, max_prefill_tokens})


def prefill_logits(
    model: PreTrainedModel, kv_cache: Tensor, inputs: PrefillInputs, wanted: Tensor | None = None
) -> Tensor:
    """Logits [wanted, vocabulary] of the tokens at the `wanted` places; else of the `last_tokens`.

    Tokens beyond the end of `cu_seqlens_q` have no effect.
    """
    attend = PrefillAttention(inputs.cu_seqlens_q.int(), inputs.kv_starts.int(), inputs.seq_lens.int())
    logits: Tensor = model(
        input_ids=inputs.ids[None],
        position_ids=inputs.positions[None],
        use_cache=False,
        logits_to_keep=inputs.last_tokens if wanted is None else wanted,
        attention_metadata=AttentionMetadata(kv_cache, inputs.kv_slots, attend),
    ).logits
    return logits[0]


class GraphCapture:
    """Captures forward passes, the largest first, into memory that all share: only one of them runs at a time."""

    def __init__(self, model: PreTrainedModel, kv_cache: Tensor, state: SamplingState) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._state = state
        self._memory_pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # one: cuBLAS keeps memory for each
        self._spare_slot = len(state.int_params) - 1
        self._prefill_outputs = self._outputs(self._spare_slot)

    def decode(self, sequences: int) -> DecodeGraph:
        """A decode step of so many sequences."""
        out, attention = self._outputs(sequences), self._decode_attention(sequences)
        forward = self._graph(lambda: out.logits.copy_(self._decode_logits(out.slots, attention)))
        return DecodeGraph(sequences, out, forward, attention)

    def prefill(self, tokens: int, inputs: PrefillInputs) -> PrefillGraph:
        """A forward pass over so many tokens of prompts."""
        inputs.kv_slots.fill_(self._kv_cache.shape[3] - 1)
        inputs.slots.fill_(self._spare_slot)
        out = self._prefill_outputs

        def run() -> None:
            out.slots.copy_(inputs.slots)
            out.logits.copy_(prefill_logits(self._model, self._kv_cache, inputs))

        return PrefillGraph(tokens, out, self._graph(run), inputs)

    def _decode_attention(self, sequences: int) -> DecodeAttention:
        _, _, kv_heads, _, size = self._kv_cache.shape
        heads = self._model.config.get_text_config().num_attention_heads
        kv_starts, seq_lens = torch.zeros(2, sequences, dtype=torch.int32, device=self._kv_cache.device)
        return DecodeAttention.of(kv_starts, seq_lens, kv_heads, heads // kv_heads, size)

    def _decode_logits(self, slots: Tensor, attention: DecodeAttention) -> Tensor:
        int_params = self._state.int_params[slots.long()]
        position = int_params[:, triton_sampling.POSITION.value]
        kv_start = int_params[:, triton_sampling.KV_START.value]
        attention.kv_starts.copy_(kv_start)
        attention.seq_lens.copy_(position + 1)
        logits: Tensor = self._model(
            input_ids=int_params[None, :, triton_sampling.TOKEN.value],
            position_ids=position[None],
            use_cache=False,
            attention_metadata=AttentionMetadata(self._kv_cache, kv_start + position, attention),
        ).logits
        return logits[0]

    def _outputs(self, sequences: int) -> PassOutputs:
        state, device = self._state, self._kv_cache.device
        slots = torch.full((sequences,), self._spare_slot, dtype=torch.int32, device=device)
        logits = torch.zeros(sequences, state.counts.shape[1], dtype=self._kv_cache.dtype, device=device)
        tokens = torch.zeros(sequences, dtype=torch.int64, device=device)
        tensors = state.int_params, state.float_params, state.counts, state.bias, state.bitmask
        sample = self._graph(lambda: triton_sampling.sample(logits, slots, *tensors, tokens))
        return PassOutputs(slots, logits, tokens, sample)

    def _graph(self, run: Callable[[], object]) -> Graph:
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # what is loaded or compiled at first use must not be captured
        torch.cuda.current_stream().wait_stream(stream)
        graph = Graph()
        with torch.cuda.graph(graph, pool=self._memory_pool, stream=stream):
            run()
        return graph


AnyGraph = TypeVar("AnyGraph", bound=PassGraph)


def smallest(graphs: Sequence[AnyGraph], size: int) -> AnyGraph:
    """The smallest of the graphs, which are in order, that has room for `size`."""
    return next(graph for graph in graphs if graph.size >= size)
