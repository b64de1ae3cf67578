"""`Runner` in plain torch: no CUDA graphs, and a sampler for each sequence. For the CPU, and for tests.

It computes what the CUDA runner computes, one operation at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from batching.packed.attention import AttentionMetadata, Chunk, TorchAttention
from batching.packed.runner import RunningSequence
from batching.sampling import Sampler
from batching.types import TokenLogprob


@dataclass(frozen=True, slots=True)
class ReadyOutput:
    """`SamplerOutput` that is already known."""

    sequences: Sequence[RunningSequence]
    tokens: list[int]
    logprobs: Mapping[int, TokenLogprob]

    def read(self) -> tuple[list[int], Mapping[int, TokenLogprob]]:
        return self.tokens, self.logprobs


class CPURunner:
    """`kv_cache` is laid out as in `AttentionMetadata`."""

    def __init__(self, model: PreTrainedModel, kv_cache: Tensor, num_slots: int) -> None:
        self.num_slots = num_slots
        self._model = model
        self._kv_cache = kv_cache
        self._vocab_size = model.config.get_text_config().vocab_size
        self._samplers: dict[RunningSequence, Sampler] = {}
        self._newest: dict[RunningSequence, int] = {}
        self.logits = torch.empty(0)

    def add_sequence(self, sequence: RunningSequence) -> None:
        self._samplers[sequence] = Sampler([sequence.row.request], self._vocab_size, self._kv_cache.device)

    def remove_sequence(self, sequence: RunningSequence) -> None:
        del self._samplers[sequence]
        self._newest.pop(sequence, None)

    def copy_kv(self, source: int, target: int, count: int) -> None:
        self._kv_cache[:, :, :, target : target + count] = self._kv_cache[:, :, :, source : source + count]

    def prefill(self, chunks: Sequence[tuple[RunningSequence, Chunk]]) -> None:
        ids = [
            token
            for sequence, chunk in chunks
            for token in sequence.row.request.prompt[chunk.num_computed_tokens : chunk.seq_len]
        ]
        ends = accumulate(chunk.num_tokens for _, chunk in chunks)
        complete = [
            end - 1
            for end, (sequence, chunk) in zip(ends, chunks, strict=True)
            if sequence.remaining_prompt == chunk.num_tokens
        ]
        self.logits = self._forward(ids, [chunk for _, chunk in chunks], complete)

    def prompt_logits(self, sequence: RunningSequence, chunk: Chunk) -> Tensor:
        ids = sequence.row.request.prompt[chunk.num_computed_tokens : chunk.seq_len]
        return self._forward(ids, [chunk], range(chunk.num_tokens))

    def decode(self, sequences: Sequence[RunningSequence]) -> None:
        ids = [self._newest[sequence] for sequence in sequences]
        self.logits = self._forward(ids, [sequence.decode_chunk() for sequence in sequences], range(len(sequences)))

    def _forward(self, ids: Sequence[int], chunks: list[Chunk], wanted: Sequence[int]) -> Tensor:
        """Logits of the tokens at the `wanted` places."""
        positions = torch.cat([torch.arange(chunk.num_computed_tokens, chunk.seq_len) for chunk in chunks])
        starts = torch.tensor([chunk.kv_start for chunk in chunks])
        counts = torch.tensor([chunk.num_tokens for chunk in chunks])
        logits: Tensor = self._model(
            input_ids=torch.tensor([ids]),
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=torch.tensor(wanted, dtype=torch.int64),
            attention_metadata=AttentionMetadata(
                self._kv_cache, starts.repeat_interleave(counts) + positions, TorchAttention(chunks)
            ),
        ).logits[0]
        return logits

    def needs_host_sync(self, sequences: Sequence[RunningSequence]) -> bool:
        """Never: every token is known at once."""
        return False

    def accept_token(self, sequence: RunningSequence, token: int) -> None:
        """Nothing to do: the sampler knows what it sampled."""

    def sample(self, sequences: Sequence[RunningSequence]) -> ReadyOutput:
        logits = self.logits.float()
        tokens = logits.argmax(-1).tolist()
        logprobs: dict[int, TokenLogprob] = {}
        for index, sequence in enumerate(sequences):
            sampler = self._samplers[sequence]
            if not sampler.is_plain_argmax:
                tokens[index] = int(sampler(logits[index : index + 1].clone()))
                if 0 in sampler.logprobs:
                    logprobs[index] = sampler.logprobs[0]
            self._newest[sequence] = tokens[index]
        return ReadyOutput(sequences, tokens, logprobs)
