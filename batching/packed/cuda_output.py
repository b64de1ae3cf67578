"""What a step of `CUDARunner` leaves: tokens and log probabilities that the device still computes, on their way back.

Worker thread only. Nothing here waits for the device but `read` and `wait`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batching.engine import NO_LOGPROBS
from batching.packed import triton_sampling
from batching.packed.runner import RunningSequence, Sampled
from batching.sampling import OtherLogprobs
from batching.types import TokenLogprob

OUT_DRAFTED, OUT_PROSPECT, OUT_TOKENS = (
    column.value for column in (triton_sampling.OUT_DRAFTED, triton_sampling.OUT_PROSPECT, triton_sampling.OUT_TOKENS)
)
PROSPECT_UNIT = triton_sampling.PROSPECT_UNIT.value


class PinnedOutput:
    """Pinned host memory for what one sampler output leaves, and the event that says that it is there."""

    def __init__(self, size: int) -> None:
        self._numbers = torch.empty(size, dtype=torch.int64, pin_memory=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def copy(self, results: Tensor) -> None:
        """Launch the copy."""
        self._numbers[: results.numel()].view_as(results).copy_(results, non_blocking=True)

    def record(self) -> None:
        """All copies of this output have been launched."""
        self._copied.record()

    def wait(self, sequences: int, width: int) -> NDArray[np.int64]:
        """[sequences, OUT_TOKENS + width]; valid until the next copy."""
        self._copied.synchronize()
        columns = OUT_TOKENS + width
        numbers: NDArray[np.int64] = self._numbers[: sequences * columns].view(sequences, columns).numpy()
        return numbers


@dataclass(slots=True)
class Prospect:
    """How many more tokens a sequence can expect of a step with drafts: the mean of those read last."""

    value: float = 0.0


class AsyncOutput:
    """`SamplerOutput` that the device is still computing."""

    def __init__(
        self,
        sequences: Sequence[RunningSequence],
        width: int,
        pinned: PinnedOutput,
        logprobs: "AsyncLogprobs | None",
        prospect: Prospect,
    ) -> None:
        self.sequences = sequences
        self.max_tokens = width
        self._pinned = pinned
        self._logprobs = logprobs
        self._prospect = prospect

    def read(self) -> Sampled:
        results = self._pinned.wait(len(self.sequences), self.max_tokens)
        if not self.sequences:
            return Sampled((), ())
        self._prospect.value = results[:, OUT_PROSPECT].mean() * PROSPECT_UNIT
        tokens = results[:, OUT_TOKENS:]
        given = tokens >= 0
        logprobs = self._logprobs.read(tokens) if self._logprobs else NO_LOGPROBS
        if self.max_tokens == 1:
            return Sampled(self.sequences, tokens[:, 0].tolist(), logprobs)
        for sequence, drafted, count in zip(
            self.sequences, results[:, OUT_DRAFTED].tolist(), given.sum(1).tolist(), strict=True
        ):
            sequence.row.num_drafted_tokens += drafted
            sequence.row.num_accepted_tokens += count - 1
        return Sampled([self.sequences[at] for at in given.nonzero()[0].tolist()], tokens[given].tolist(), logprobs)


class AsyncLogprobs:
    """Log probabilities of one sampler output, on their way to the host; computed as in `sampling.Logprobs`.

    `indices` are those of the sequences that want them, `at` the same on the device, `logits` [sequences x width,
    vocabulary], `tokens` [sequences, width]. `ids` are those of `others`, on the device.
    """

    def __init__(
        self, indices: list[int], others: OtherLogprobs, at: Tensor, ids: Tensor, logits: Tensor, tokens: Tensor
    ) -> None:
        self._indices = indices
        self._others = others
        width = tokens.shape[1]
        rows = (at[:, None] * width + torch.arange(width, device=at.device)).flatten()
        logprobs = logits[rows].float().log_softmax(-1)
        own = logprobs.gather(-1, tokens[at].flatten()[:, None].clamp(min=0))[:, 0]
        values, likeliest = logprobs.topk(others.most)
        named = logprobs.gather(-1, ids.repeat_interleave(width, 0))
        self._copies = [found.to("cpu", non_blocking=True) for found in (own, values, likeliest, named)]

    def read(self, tokens: NDArray[np.int64]) -> dict[int, TokenLogprob]:
        """By place among all tokens that are given, once the output's tokens [sequences, width] are there."""
        own, values, ids, named = (copy.tolist() for copy in self._copies)
        width = tokens.shape[1]
        given = (tokens >= 0).sum(1)
        before = np.cumsum(given) - given
        return {
            int(before[index]) + place: TokenLogprob(
                int(tokens[index, place]),
                own[row],
                self._others.of(at, ids[row], values[row], named[row]),
            )
            for at, index in enumerate(self._indices)
            for place, row in enumerate(range(at * width, at * width + int(given[index])))
        }
