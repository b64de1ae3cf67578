"""`Runner` in plain torch: no CUDA graphs, and a sampler for each sequence. For the CPU, and for tests.

It computes what the CUDA runner computes, one operation at a time.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from batching.packed.attention import AttentionMetadata, Chunk, TorchAttention, Wanted
from batching.packed.kv_cache import BLOCK_SIZE
from batching.packed.layer import logits_of
from batching.packed.runner import RunningSequence, Sampled
from batching.packed.speculation import History, StepCost, num_matching, preface
from batching.sampling import Sampler
from batching.types import Request, TokenLogprob


@dataclass(frozen=True, slots=True)
class ReadyOutput:
    """`SamplerOutput` that is already known."""

    sequences: Sequence[RunningSequence]
    max_tokens: int
    sampled: Sampled

    def read(self) -> Sampled:
        return self.sampled


class SequenceState:
    """What the runner knows of a sequence: how to sample its tokens, and its text so far."""

    def __init__(self, request: Request, vocab_size: int, device: torch.device) -> None:
        self.sampler = Sampler([request], vocab_size, device)
        self.history = History(
            preface(request.prompt, request.prediction, request.sampling.max_tokens), request.sampling.max_tokens
        )
        self.num_output_tokens = 0
        self.newest = -1
        self._request = request

    @property
    def num_tokens(self) -> int:
        return len(self._request.prompt) + self.num_output_tokens

    def propose(self, count: int) -> list[int]:
        """A draft of at most `count` tokens, which do not exceed those that the row may have."""
        return self.history.propose(min(count, self._request.sampling.max_tokens - self.num_output_tokens - 1))

    def add(self, tokens: Sequence[int]) -> None:
        self.num_output_tokens += len(tokens)
        self.newest = tokens[-1]
        self.history.add(tokens)

    def sample(
        self, logits: Tensor, greedy: Sequence[int], draft: Sequence[int]
    ) -> list[tuple[int, TokenLogprob | None]]:
        """Sample from logits [1 + drafted tokens, vocabulary], as far as the draft is what was sampled before.

        `greedy` are the tokens of the largest logits.
        """
        stops = self._request.sampling.stop_token_ids
        found: list[tuple[int, TokenLogprob | None]] = []
        for place, argmax in enumerate(greedy):
            plain = self.sampler.is_plain_argmax
            token = argmax if plain else int(self.sampler(logits[place : place + 1].clone()))
            found.append((token, None if plain else self.sampler.logprobs.get(0)))
            if place == len(draft) or token != draft[place] or token in stops:
                break
        return found


class CPURunner:
    """`kv_cache` is laid out as in `AttentionMetadata`; its last block belongs to no row. At most `max_draft_tokens`
    are drafted for a sequence in a step. If `one_by_one`, each sequence has a forward pass of its own, because products
    of more rows are rounded differently."""

    works_beside_host = False
    mixed_sizes: Sequence[int] = ()

    def __init__(
        self,
        model: PreTrainedModel,
        kv_cache: Tensor,
        num_slots: int,
        max_draft_tokens: int = 0,
        *,
        one_by_one: bool = False,
    ) -> None:
        self.num_slots = num_slots
        self._one_by_one = one_by_one
        self._model = model
        self._kv_cache = kv_cache
        self._vocab_size = model.config.get_text_config().vocab_size
        self._states: dict[RunningSequence, SequenceState] = {}
        self._drafts: dict[RunningSequence, list[int]] = {}
        self._max_draft_tokens = max_draft_tokens
        self._cost = self._measured_cost(max_draft_tokens) if max_draft_tokens else None
        self.logits = torch.empty(0)

    @torch.inference_mode()
    def _measured_cost(self, max_draft_tokens: int) -> StepCost:
        """Of steps whose tokens go to the block that belongs to no row."""
        spare = self._kv_cache.shape[3] // BLOCK_SIZE - 1
        sizes = 1, 1 + max_draft_tokens
        best = dict.fromkeys(sizes, float("inf"))
        for size in sizes * 3:
            began = time.perf_counter()
            self._forward([0] * size, [Chunk([spare], 0, size)])
            best[size] = min(best[size], time.perf_counter() - began)
        return StepCost(best[1], max(0.0, best[sizes[1]] - best[1]) / max_draft_tokens)

    def add_sequence(self, sequence: RunningSequence) -> None:
        if sequence not in self._states:
            self._states[sequence] = SequenceState(sequence.row.request, self._vocab_size, self._kv_cache.device)

    def preempt_sequence(self, sequence: RunningSequence) -> None:
        """Nothing to do: nothing here goes by slots, and the state knows how far the row is."""

    def remove_sequence(self, sequence: RunningSequence) -> None:
        self._states.pop(sequence, None)

    def num_draft_tokens(self, decoding: Sequence[RunningSequence]) -> int:
        return self._max_draft_tokens

    def forward(
        self,
        decoding: Sequence[RunningSequence],
        chunks: Sequence[tuple[RunningSequence, Chunk]] = (),
        num_draft_tokens: int = 0,
    ) -> None:
        self._drafts = {sequence: self._draft(sequence, len(decoding), num_draft_tokens) for sequence in decoding}
        ids = [token for sequence, draft in self._drafts.items() for token in (self._states[sequence].newest, *draft)]
        ids += [
            token for sequence, chunk in chunks for token in sequence.tokens[chunk.num_computed_tokens : chunk.seq_len]
        ]
        steps = [
            Chunk(sequence.blocks, self._states[sequence].num_tokens - 1, 1 + len(draft))
            for sequence, draft in self._drafts.items()
        ]
        wanted = wanted_of(steps, chunks) if chunks else None
        self.logits = self._forward(ids, steps + [chunk for _, chunk in chunks], wanted)

    def _draft(self, sequence: RunningSequence, num_rows: int, limit: int) -> list[int]:
        if not limit or self._cost is None:
            return []
        state = self._states[sequence]
        count = self._cost.worth_drafting(state.history.rate, num_rows, limit)
        return state.propose(count) if count else []

    def prompt_logits(self, sequence: RunningSequence, chunk: Chunk) -> Tensor:
        ids = sequence.tokens[chunk.num_computed_tokens : chunk.seq_len]
        return self._forward(ids, [chunk])

    def _forward(self, ids: Sequence[int], chunks: list[Chunk], wanted: Wanted | None = None) -> Tensor:
        """Logits of the `wanted` tokens (None: of all)."""
        if self._one_by_one and len(chunks) > 1:  # decode steps: a prompt is alone in its pass
            return torch.cat([self._forward([token], [step]) for token, step in zip(ids, chunks, strict=True)])
        positions = torch.cat([torch.arange(chunk.num_computed_tokens, chunk.seq_len) for chunk in chunks])
        kv_slots = torch.cat([chunk.kv_slots()[chunk.num_computed_tokens :] for chunk in chunks])
        metadata = AttentionMetadata(self._kv_cache, kv_slots, TorchAttention(chunks), wanted)
        return logits_of(self._model, torch.tensor(ids), positions, metadata)

    def needs_host_sync(self, sequences: Sequence[RunningSequence]) -> bool:
        """Never: every token is known at once."""
        return False

    def accept_tokens(self, sequences: Sequence[RunningSequence], tokens: Sequence[int]) -> None:
        """Nothing to do: the samplers have their own tokens."""

    def sample(self, sequences: Sequence[RunningSequence]) -> ReadyOutput:
        logits = self.logits.float()
        greedy = logits.argmax(-1).tolist()
        sampled, tokens, logprobs = list[RunningSequence](), list[int](), dict[int, TokenLogprob]()
        end = 0
        for sequence in sequences:
            begin, end = end, end + 1 + len(self._drafts.get(sequence, ()))
            for token, logprob in self._sample(sequence, logits[begin:end], greedy[begin:end]):
                if logprob is not None:
                    logprobs[len(tokens)] = logprob
                sampled.append(sequence)
                tokens.append(token)
        most = 1 + max(map(len, self._drafts.values()), default=0)
        return ReadyOutput(sequences, most, Sampled(sampled, tokens, logprobs))

    def _sample(
        self, sequence: RunningSequence, logits: Tensor, greedy: Sequence[int]
    ) -> list[tuple[int, TokenLogprob | None]]:
        state, draft = self._states[sequence], self._drafts.get(sequence, [])
        guess = draft or (state.propose(1) if self._max_draft_tokens else [])
        found = state.sample(logits, greedy, draft)
        tokens = [token for token, _ in found]
        state.history.judge(num_matching(guess, tokens), max(1, len(guess)))
        state.add(tokens)
        sequence.row.num_drafted_tokens += len(draft)
        sequence.row.num_accepted_tokens += len(tokens) - 1
        return found


def wanted_of(steps: Sequence[Chunk], chunks: Sequence[tuple[RunningSequence, Chunk]]) -> Wanted:
    """All tokens of decode steps, which come first in the pass, and the last one of each prompt that ends with it."""
    first = sum(step.num_tokens for step in steps)
    ends = accumulate((chunk.num_tokens for _, chunk in chunks), initial=first)
    next(ends)
    last = [
        (end - 1, Chunk(chunk.blocks, chunk.seq_len - 1, 1))
        for end, (sequence, chunk) in zip(ends, chunks, strict=True)
        if sequence.remaining_prefill == chunk.num_tokens
    ]
    places = torch.tensor([*range(first), *(place for place, _ in last)], dtype=torch.int64)
    return Wanted(places, TorchAttention([*steps, *(chunk for _, chunk in last)]))
