"""What the packed scheduler needs from a device: forward passes and sampling."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from batching.packed.attention import Chunk
from batching.packed.kv_cache import BlockTable
from batching.stream import Row
from batching.types import TokenLogprob


class RunningSequence:
    """A row in the packed engine. Worker thread only.

    While it runs, `slot` is its sequence slot, its index in the device's state, and `table` its part of the KV cache;
    while it waits, or has given way to older ones, `table` is None. `order` counts arrivals.
    `num_output_tokens` counts the output tokens whose sampling has been launched; `tokens` are the prompt and the
    output tokens that were read back so far. The first `num_prefill_tokens` of them are computed in prefill chunks; the
    keys and values of `num_computed_tokens` are in the cache.
    """

    __slots__ = (
        "num_computed_tokens", "num_output_tokens", "num_prefill_tokens", "order", "row", "slot", "table", "tokens",
    )  # fmt: skip

    def __init__(self, row: Row, order: int) -> None:
        self.row = row
        self.order = order
        self.slot = -1
        self.table: BlockTable | None = None
        self.num_computed_tokens = 0
        self.num_output_tokens = 0
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
        """Tokens that are still to be computed before the next one can be sampled."""
        return self.num_prefill_tokens - self.num_computed_tokens

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens, those included that the device is still sampling."""
        return len(self.row.request.prompt) + self.num_output_tokens

    @property
    def wants_decode(self) -> bool:
        """Whether to sample another token: some are left, and the row is not known to be over."""
        unfinished = self.num_output_tokens < self.row.request.sampling.max_tokens
        return unfinished and not (self.row.over or self.row.cancelled)

    @property
    def is_read(self) -> bool:
        """Whether every token that was sampled has been read back."""
        return self.num_tokens == len(self.tokens)

    def start(self, slot: int, table: BlockTable, num_cached_tokens: int) -> None:
        """Run, for the first time or again: the tokens so far are its prompt now."""
        self.slot, self.table = slot, table
        self.num_prefill_tokens = len(self.tokens)
        self.num_computed_tokens = num_cached_tokens

    def prefill_chunk(self, max_tokens: int) -> Chunk:
        """The next tokens to be computed, at most `max_tokens`."""
        return Chunk(self.blocks, self.num_computed_tokens, min(self.remaining_prefill, max_tokens))

    def decode_chunk(self) -> Chunk:
        """The newest token, which the device has sampled: where it goes in the next decode step."""
        return Chunk(self.blocks, self.num_tokens - 1, 1)


class SamplerOutput(Protocol):
    """Tokens that the device is sampling, one for each of `sequences`."""

    @property
    def sequences(self) -> Sequence[RunningSequence]: ...

    def read(self) -> tuple[list[int], Mapping[int, TokenLogprob]]:
        """Wait for the tokens. Returns them, and the log probabilities of sequences that want them, by index."""
        ...


class Runner(Protocol):
    """Every method returns as soon as its work is launched on the device, which runs it in order.

    A forward pass leaves logits, and `sample` must follow for the same sequences before the next one.
    """

    num_slots: int
    """How many sequences can run at a time."""

    @property
    def logits(self) -> Tensor:
        """[sequences, vocabulary] of the last forward pass; valid until the next one."""
        ...

    def add_sequence(self, sequence: RunningSequence) -> None:
        """It has got a sequence slot and blocks of the KV cache; the second time after it gave way."""
        ...

    def preempt_sequence(self, sequence: RunningSequence) -> None:
        """It gives way: slot and blocks are lost, everything else is kept until it is added again."""
        ...

    def remove_sequence(self, sequence: RunningSequence) -> None:
        """It is over."""
        ...

    def forward(
        self, decoding: Sequence[RunningSequence], chunks: Sequence[tuple[RunningSequence, Chunk]] = ()
    ) -> None:
        """Compute the newest token of sequences that decode, and prefill chunks of others, in one pass.

        The logits are of the sequences that decode, then of those whose prefill is complete with this, in order.
        """
        ...

    def prompt_logits(self, sequence: RunningSequence, chunk: Chunk) -> Tensor:
        """Compute a prefill chunk that does not complete its prompt: logits [tokens, vocabulary] of all of it."""
        ...

    def needs_host_sync(self, sequences: Sequence[RunningSequence]) -> bool:
        """Whether `sample` needs every earlier token to have been accepted: a row has a grammar, say."""
        ...

    def accept_token(self, sequence: RunningSequence, token: int) -> None:
        """The sequence's newest token, as it was read back."""
        ...

    def sample(self, sequences: Sequence[RunningSequence]) -> SamplerOutput:
        """Sample the next token of each sequence of the last forward pass, by its own settings."""
        ...
