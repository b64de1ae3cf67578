"""Passes through the model as captured CUDA graphs: pieces of prompts by how many tokens, steps by how many rows.

Worker thread only. A pass is two graphs, the model's forward pass and the choice of tokens, because a row's grammar may
be matched on the host while the model runs. All state is on the device and is advanced there, so a step is two
launches and a copy of the tokens back; a piece of prompts is one copy more. Launched one by one, the kernels of a pass
would each have to get the interpreter back from the event loop first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from batching.packed import triton_sampling
from batching.packed.attention import Work
from batching.packed.sampling_state import Slots
from batching.packed.triton_attention import QUERIES, DecodeAttention, PromptAttention

Graph = torch.cuda.CUDAGraph


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a pass leaves: `logits` of the row in each of `lanes` [rows, int32], and the `tokens` chosen of them."""

    lanes: Tensor
    logits: Tensor
    tokens: Tensor
    choose: Graph


@dataclass(frozen=True, slots=True)
class Captured:
    """A pass of a size. Graphs know addresses alone: `held` is all that `forward` reads beside the model and `out`."""

    size: int
    out: Outputs
    forward: Graph
    held: object


class PromptInputs:
    """What a pass over prompts reads, in one tensor that is written with one copy. Whole numbers all."""

    def __init__(self, tokens: int, lanes: int, device: torch.device | str) -> None:
        rows = lanes + tokens // QUERIES
        sizes = [tokens, tokens, tokens, rows + 1, rows, rows, lanes, lanes]
        self.all = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self.ids, self.positions, self.slots, *rest = torch.split(self.all, sizes)
        # By row of at most QUERIES tokens: where these begin, where the extent begins, how many of its slots count; and
        # by prompt that ends: which of the pass's tokens is its last, and its lane.
        self.bounds, self.starts, self.used, self.last, self.lanes = rest


def step_sizes(lanes: int) -> list[int]:
    """The numbers of rows that steps are captured for: each step has the next larger one."""
    return sorted({*(n for n in (1, 2, 4) if n < lanes), *range(8, lanes, 8 if lanes <= 128 else 32), lanes})


def prompt_sizes(piece: int, burst: int) -> list[int]:
    """The numbers of tokens that passes over prompts are captured for."""
    steps = [*range(256, 2049, 256), *(n << power for power in range(10, 20) for n in (3, 4))]
    return sorted({*(size for size in steps if size < burst), piece, burst})


class Capture:
    """Captures passes, the largest first, into memory that all share: only one of them runs at a time."""

    def __init__(self, model: PreTrainedModel, memory: Tensor, slots: Slots) -> None:
        self._model = model
        self._memory = memory
        self._slots = slots
        self._shared = torch.cuda.graph_pool_handle()
        self._beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # one: cuBLAS keeps memory for each
        self._no_lane = len(slots.ints) - 1
        self._of_prompts = self._outputs(self._no_lane)

    def step(self, rows: int) -> Captured:
        """A step of so many rows."""
        out, attend = self._outputs(rows), self._decode_attention(rows)
        forward = self._graph(lambda: out.logits.copy_(self._step(out.lanes, attend)))
        return Captured(rows, out, forward, attend)

    def prompts(self, tokens: int, inputs: PromptInputs) -> Captured:
        """A pass over so many tokens of prompts."""
        inputs.slots.fill_(self._memory.shape[3] - 1)
        inputs.lanes.fill_(self._no_lane)
        out = self._of_prompts

        def run() -> None:
            out.lanes.copy_(inputs.lanes)
            out.logits.copy_(self.prompt_pass(inputs))

        return Captured(tokens, out, self._graph(run), inputs)

    def prompt_pass(self, inputs: PromptInputs) -> Tensor:
        """Logits [lanes, vocabulary] of the `last` tokens. Tokens beyond the end of `bounds` come to nothing."""
        attend = PromptAttention(inputs.bounds.int(), inputs.starts.int(), inputs.used.int())
        logits: Tensor = self._model(
            input_ids=inputs.ids[None],
            position_ids=inputs.positions[None],
            use_cache=False,
            logits_to_keep=inputs.last,
            work=Work(self._memory, inputs.slots, attend),
        ).logits
        return logits[0]

    def _decode_attention(self, rows: int) -> DecodeAttention:
        _, _, kv_heads, _, size = self._memory.shape
        heads = self._model.config.get_text_config().num_attention_heads
        starts, lengths = torch.zeros(2, rows, dtype=torch.int32, device=self._memory.device)
        return DecodeAttention.of(starts, lengths, kv_heads, heads // kv_heads, size)

    def _step(self, lanes: Tensor, attend: DecodeAttention) -> Tensor:
        state = self._slots.ints[lanes.long()]
        position = state[:, triton_sampling.POSITION]
        attend.starts.copy_(state[:, triton_sampling.START])
        attend.lengths.copy_(position + 1)
        logits: Tensor = self._model(
            input_ids=state[None, :, triton_sampling.TOKEN],
            position_ids=position[None],
            use_cache=False,
            work=Work(self._memory, state[:, triton_sampling.START] + position, attend),
        ).logits
        return logits[0]

    def _outputs(self, rows: int) -> Outputs:
        slots, device = self._slots, self._memory.device
        lanes = torch.full((rows,), self._no_lane, dtype=torch.int32, device=device)
        logits = torch.zeros(rows, slots.counts.shape[1], dtype=self._memory.dtype, device=device)
        tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        state = slots.ints, slots.floats, slots.counts, slots.bias, slots.allowed
        choose = self._graph(lambda: triton_sampling.draw(logits, lanes, *state, tokens))
        return Outputs(lanes, logits, tokens, choose)

    def _graph(self, run: Callable[[], object]) -> Graph:
        beside = self._beside
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            run()  # what is loaded or compiled at first use must not be captured
        torch.cuda.current_stream().wait_stream(beside)
        graph = Graph()
        with torch.cuda.graph(graph, pool=self._shared, stream=beside):
            run()
        return graph


def smallest(passes: Sequence[Captured], size: int) -> Captured:
    """The smallest of the passes, which are in order, that has room for so many."""
    return next(captured for captured in passes if captured.size >= size)
