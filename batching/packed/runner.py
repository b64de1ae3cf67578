"""What the packed scheduler asks of a device: prefill and decode forward passes, and sampling."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from batching.packed.attention import Chunk
from batching.packed.kv_cache import KVAllocation
from batching.stream import Row
from batching.types import TokenLogprob


class RunningSequence:
    """A row while it is in the running batch. Worker thread only.

    `slot` is its sequence slot, its index in the device's state, and `kv` its part of the KV cache.
    `num_computed_tokens` counts the prompt tokens whose keys and values are there, `num_output_tokens` the output
    tokens whose sampling has been launched; `tokens` are the prompt and the output tokens that were read back so far.
    """

    __slots__ = ("kv", "num_computed_tokens", "num_output_tokens", "row", "slot", "tokens")

    def __init__(self, row: Row, slot: int, kv: KVAllocation) -> None:
        self.row = row
        self.slot = slot
        self.kv = kv
        self.num_computed_tokens = 0
        self.num_output_tokens = 0
        self.tokens = list(row.request.prompt)

    def __repr__(self) -> str:
        progress = f"{self.num_computed_tokens}+{self.num_output_tokens}"
        return f"<RunningSequence {self.slot} {self.row.request.id} {progress}>"

    @property
    def remaining_prompt(self) -> int:
        """Prompt tokens that are still to be computed."""
        return len(self.row.request.prompt) - self.num_computed_tokens

    @property
    def wants_decode(self) -> bool:
        """Whether to sample another token: some are left, and the row is not known to be over."""
        unfinished = 0 < self.num_output_tokens < self.row.request.sampling.max_tokens
        return unfinished and not (self.row.over or self.row.cancelled)

    def prefill_chunk(self, max_tokens: int) -> Chunk:
        """The next tokens of the prompt, at most `max_tokens`."""
        return Chunk(self.kv.start, self.num_computed_tokens, min(self.remaining_prompt, max_tokens))

    def decode_chunk(self) -> Chunk:
        """The newest token, which the device has sampled: where it goes in the next decode step."""
        return Chunk(self.kv.start, len(self.row.request.prompt) + self.num_output_tokens - 1, 1)


class SamplerOutput(Protocol):
    """Tokens that the device is sampling, one for each of `sequences`."""

    @property
    def sequences(self) -> Sequence[RunningSequence]: ...

    def read(self) -> tuple[list[int], Mapping[int, TokenLogprob]]:
        """Wait for them; and the log probabilities of those sequences that asked, by index."""
        ...


class Runner(Protocol):
    """Every method returns as soon as its work is launched on the device, which runs it in order.

    A forward pass (`prefill` or `decode`) leaves logits, and `sample` must follow for the same sequences before the
    next one.
    """

    num_slots: int
    """How many sequences can run at a time."""

    @property
    def logits(self) -> Tensor:
        """[sequences, vocabulary] of the last forward pass; valid until the next one."""
        ...

    def add_sequence(self, sequence: RunningSequence) -> None:
        """A row has got a sequence slot and its part of the KV cache."""
        ...

    def remove_sequence(self, sequence: RunningSequence) -> None:
        """It has no further use for them."""
        ...

    def copy_kv(self, source: int, target: int, count: int) -> None:
        """Copy the keys and values of `count` KV slots from one place of the cache to another."""
        ...

    def prefill(self, chunks: Sequence[tuple[RunningSequence, Chunk]]) -> None:
        """Compute prefill chunks. The logits are of the last token of those that complete their prompt, in order."""
        ...

    def prompt_logits(self, sequence: RunningSequence, chunk: Chunk) -> Tensor:
        """Compute a prefill chunk that does not complete its prompt: logits [tokens, vocabulary] of all of it."""
        ...

    def decode(self, sequences: Sequence[RunningSequence]) -> None:
        """Compute each sequence's newest token."""
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
