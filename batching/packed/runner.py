"""What the packed scheduler needs from a device: forward passes and sampling."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from batching.engine import NO_LOGPROBS
from batching.packed.attention import Chunk
from batching.packed.kv_cache import BlockTable
from batching.stream import Row
from batching.types import TokenLogprob


class RunningSequence:
    """A row in the packed engine. Worker thread only.

    While it runs, `slot` is its sequence slot, its index in the device's state, and `table` its part of the KV cache;
    while it waits, or after preemption, `table` is None. `order` counts arrivals, `turn` those of its client that wait.
    `tokens` are the prompt and the output tokens that were read back so far. The first `num_prefill_tokens` of them are
    computed in prefill chunks; the keys and values of `num_computed_tokens` are in the cache. `num_unread_outputs` of
    the sampler are on their way, each of one token, or more if some were drafted: at most `max_unread_tokens` in all.
    """

    __slots__ = (
        "max_unread_tokens", "num_computed_tokens", "num_prefill_tokens", "num_unread_outputs", "order", "row", "slot",
        "table", "tokens", "turn",
    )  # fmt: skip

    def __init__(self, row: Row, order: int) -> None:
        self.row = row
        self.order = order
        self.turn = 0
        self.slot = -1
        self.table: BlockTable | None = None
        self.num_computed_tokens = 0
        self.num_unread_outputs = 0
        self.max_unread_tokens = 0
        self.tokens = list(row.request.prompt)
        self.num_prefill_tokens = len(self.tokens)

    def __repr__(self) -> str:
        progress = f"{self.num_computed_tokens}+{self.num_output_tokens}"
        return f"<RunningSequence {self.slot} {self.row.request.id} {progress}>"

    @property
    def blocks(self) -> list[int]:
        """Its blocks of the KV cache; empty while it waits."""
        return self.table.blocks if self.table else []

    @property
    def remaining_prefill(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return self.num_prefill_tokens - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        """Output tokens, including those still being sampled, of which there may be more if some were drafted."""
        return len(self.tokens) - len(self.row.request.prompt) + self.num_unread_outputs

    @property
    def max_tokens(self) -> int:
        """The most prompt and output tokens that it can have, including those still being sampled."""
        return min(len(self.tokens) + self.max_unread_tokens, self.row.request.total_tokens)

    @property
    def wants_decode(self) -> bool:
        """Whether to sample another token: some are left, and the row is not known to have finished."""
        unfinished = self.num_output_tokens < self.row.request.sampling.max_tokens
        return unfinished and not (self.row.over or self.row.cancelled)

    @property
    def is_read(self) -> bool:
        """Whether every sampled token has been read back."""
        return not self.num_unread_outputs

    def launched(self, max_tokens: int) -> None:
        """Sampling has been launched, which gives one token, or up to `max_tokens`."""
        self.num_unread_outputs += 1
        self.max_unread_tokens += max_tokens

    def read(self, max_tokens: int) -> None:
        """The tokens of a launched sampling have been read."""
        self.num_unread_outputs -= 1
        self.max_unread_tokens -= max_tokens

    def start(self, slot: int, table: BlockTable, num_cached_tokens: int) -> None:
        """Start, or restart after preemption with all tokens so far as its prompt."""
        self.slot, self.table = slot, table
        self.num_prefill_tokens = len(self.tokens)
        self.num_computed_tokens = num_cached_tokens

    def prefill_chunk(self, max_tokens: int) -> Chunk:
        """The next tokens to be computed, at most `max_tokens`."""
        return Chunk(self.blocks, self.num_computed_tokens, min(self.remaining_prefill, max_tokens))


class Sampled(NamedTuple):
    """Tokens that were read: `tokens[i]` is one of `sequences[i]`, each of which stands there once for every token.

    `logprobs` has those of sequences that want them, by the same index.
    """

    sequences: Sequence[RunningSequence]
    tokens: Sequence[int]
    logprobs: Mapping[int, TokenLogprob] = NO_LOGPROBS


class SamplerOutput(Protocol):
    """Tokens that the device is sampling, for each of `sequences` one, or with drafts up to `max_tokens`."""

    @property
    def sequences(self) -> Sequence[RunningSequence]: ...

    @property
    def max_tokens(self) -> int: ...

    def read(self) -> Sampled:
        """Wait for the tokens."""
        ...


class Runner(Protocol):
    """Every method may return as soon as its work is launched on the device, which runs it in order.

    A forward pass leaves logits, and `sample` must follow for the same sequences before the next one.
    """

    num_slots: int
    """Maximum number of running sequences."""

    works_beside_host: bool
    """Whether methods return before the device has done its work."""

    mixed_sizes: Sequence[int]
    """Numbers of tokens to which forward passes with prefill chunks are padded, in order; empty if they are not."""

    @property
    def logits(self) -> Tensor:
        """[tokens to be sampled, vocabulary] of the last forward pass; valid until the next one."""
        ...

    def add_sequence(self, sequence: RunningSequence) -> None:
        """The sequence got a slot and KV cache blocks, for the first time or again after preemption."""
        ...

    def preempt_sequence(self, sequence: RunningSequence) -> None:
        """The sequence loses its slot and blocks; everything else is kept until it is added again."""
        ...

    def remove_sequence(self, sequence: RunningSequence) -> None:
        """The sequence has finished."""
        ...

    def num_draft_tokens(self, decoding: Sequence[RunningSequence]) -> int:
        """How many tokens may be drafted for each sequence in a decode step: 0 if that would not pay."""
        ...

    def forward(
        self,
        decoding: Sequence[RunningSequence],
        chunks: Sequence[tuple[RunningSequence, Chunk]] = (),
        num_draft_tokens: int = 0,
    ) -> None:
        """Compute the newest tokens of decoding sequences, and prefill chunks of others, in one forward pass.

        After each newest token come up to `num_draft_tokens` of a draft, if there is one. The logits are those of the
        decoding sequences, then of those whose prefill this completes, in order.
        """
        ...

    def prompt_logits(self, sequence: RunningSequence, chunk: Chunk) -> Tensor:
        """Compute a prefill chunk that does not complete its prompt: logits [tokens, vocabulary] of all of it."""
        ...

    def needs_host_sync(self, sequences: Sequence[RunningSequence]) -> bool:
        """Whether `sample` needs every earlier token accepted first, for example because a row has a grammar."""
        ...

    def accept_tokens(self, sequences: Sequence[RunningSequence], tokens: Sequence[int]) -> None:
        """Take the sequences' newest tokens after they were read back, in order; those of removed ones are ignored."""
        ...

    def sample(self, sequences: Sequence[RunningSequence]) -> SamplerOutput:
        """Sample the next token of each sequence of the last forward pass, with its own parameters; and those that
        follow it, as far as it was drafted. Without sequences the output has no tokens, and is read once that pass has
        ended."""
        ...
