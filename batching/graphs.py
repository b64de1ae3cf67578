"""A decode step as two captured CUDA graphs for each number of rows: the model's forward pass, and the choice of tokens.

Worker thread only. Two, because a row's grammar may be matched on the host while the model runs. All state is on the
device and is advanced there, so a step is two launches and one copy of the tokens back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from batching import draw
from batching.attention import Work
from batching.kernels import DecodeAttention
from batching.slots import Slots


def sizes(lanes: int) -> list[int]:
    """The numbers of rows that steps are captured for: each step has the next larger one."""
    return sorted({*(n for n in (1, 2, 4) if n < lanes), *range(8, lanes, 8 if lanes <= 128 else 32), lanes})


@dataclass(frozen=True, slots=True)
class Step:
    """For up to `len(lanes)` rows. `lanes` [rows, int32] says whose; `logits` and `tokens` are what comes out.

    The graphs know addresses alone: all that they read or write is held here.
    """

    lanes: Tensor
    logits: Tensor
    tokens: Tensor
    attend: DecodeAttention
    forward: torch.cuda.CUDAGraph
    choose: torch.cuda.CUDAGraph


class Capture:
    """Captures steps, the largest first, into memory that all share: only one of them runs at a time."""

    def __init__(self, model: PreTrainedModel, memory: Tensor, slots: Slots) -> None:
        self._model = model
        self._memory = memory
        self._slots = slots
        self._shared = torch.cuda.graph_pool_handle()

    def step(self, rows: int) -> Step:
        """The step of so many rows."""
        device = self._memory.device
        lanes = torch.full((rows,), len(self._slots.ints) - 1, dtype=torch.int32, device=device)
        tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        attend = self._attention(rows)
        logits: list[Tensor] = []
        forward = self._captured(lambda: logits.append(self._forward(lanes, attend)))
        choose = self._captured(lambda: self._choose(logits[-1], lanes, tokens))
        return Step(lanes, logits[-1], tokens, attend, forward, choose)

    def _attention(self, rows: int) -> DecodeAttention:
        device = self._memory.device
        _, _, kv_heads, _, size = self._memory.shape
        heads = self._model.config.get_text_config().num_attention_heads
        starts, lengths = torch.zeros(2, rows, dtype=torch.int32, device=device)
        return DecodeAttention.of(starts, lengths, kv_heads, heads // kv_heads, size)

    def _forward(self, lanes: Tensor, attend: DecodeAttention) -> Tensor:
        state = self._slots.ints[lanes.long()]
        position = state[:, draw.POSITION]
        attend.starts.copy_(state[:, draw.START])
        attend.lengths.copy_(position + 1)
        logits: Tensor = self._model(
            input_ids=state[None, :, draw.TOKEN],
            position_ids=position[None],
            use_cache=False,
            work=Work(self._memory, state[:, draw.START] + position, attend),
        ).logits
        return logits[0]

    def _choose(self, logits: Tensor, lanes: Tensor, tokens: Tensor) -> None:
        slots = self._slots
        draw.draw(logits, lanes, slots.ints, slots.floats, slots.counts, slots.bias, slots.allowed, tokens)

    def _captured(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            run()  # what is loaded or compiled at first use must not be captured
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._shared, stream=beside):
            run()
        return graph


def step_for(steps: Sequence[Step], rows: int) -> Step:
    """The smallest captured step that has room for so many rows."""
    return next(step for step in steps if len(step.lanes) >= rows)
