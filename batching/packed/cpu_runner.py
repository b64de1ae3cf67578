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
        if sequence not in self._samplers:
            self._samplers[sequence] = Sampler([sequence.row.request], self._vocab_size, self._kv_cache.device)

    def preempt_sequence(self, sequence: RunningSequence) -> None:
        """Nothing to do: nothing here goes by slots, and the sampler knows how far the row is."""

    def remove_sequence(self, sequence: RunningSequence) -> None:
        self._samplers.pop(sequence, None)
        self._newest.pop(sequence, None)

    def forward(
        self, decoding: Sequence[RunningSequence], chunks: Sequence[tuple[RunningSequence, Chunk]] = ()
    ) -> None:
        ids = [self._newest[sequence] for sequence in decoding]
        ids += [
            token for sequence, chunk in chunks for token in sequence.tokens[chunk.num_computed_tokens : chunk.seq_len]
        ]
        all_chunks = [sequence.decode_chunk() for sequence in decoding] + [chunk for _, chunk in chunks]
        ends = accumulate(chunk.num_tokens for chunk in all_chunks)
        unfinished = [False] * len(decoding) + [
            sequence.remaining_prefill > chunk.num_tokens for sequence, chunk in chunks
        ]
        wanted = [end - 1 for end, waits in zip(ends, unfinished, strict=True) if not waits]
        self.logits = self._forward(ids, all_chunks, wanted)

    def prompt_logits(self, sequence: RunningSequence, chunk: Chunk) -> Tensor:
        ids = sequence.tokens[chunk.num_computed_tokens : chunk.seq_len]
        return self._forward(ids, [chunk], range(chunk.num_tokens))

    def _forward(self, ids: Sequence[int], chunks: list[Chunk], wanted: Sequence[int]) -> Tensor:
        """Logits of the tokens at the `wanted` places."""
        positions = torch.cat([torch.arange(chunk.num_computed_tokens, chunk.seq_len) for chunk in chunks])
        kv_slots = torch.cat([chunk.kv_slots()[chunk.num_computed_tokens :] for chunk in chunks])
        logits: Tensor = self._model(
            input_ids=torch.tensor([ids]),
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=torch.tensor(wanted, dtype=torch.int64),
            attention_metadata=AttentionMetadata(self._kv_cache, kv_slots, TorchAttention(chunks)),
        ).logits[0]
        return logits

    def needs_host_sync(self, sequences: Sequence[RunningSequence]) -> bool:
        """Never: every token is known at once."""
        return False

    def accept_token(self, sequence: RunningSequence, token: int) -> None:
        """Nothing to do: the sampler has its own tokens."""

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
