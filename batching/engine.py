"""The interfaces between the worker thread and an engine."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from batching.stream import Row
from batching.types import ModelInfo, PromptLogprob, TokenLogprob

NO_LOGPROBS: Mapping[int, TokenLogprob] = MappingProxyType({})


class Steps(Protocol):
    """The worker's side of a running batch, called by the engine once a decode step."""

    def emit(
        self, rows: Sequence[Row], tokens: Sequence[int], logprobs: Mapping[int, TokenLogprob] = NO_LOGPROBS
    ) -> list[bool]:
        """Hand over one new token per row, and the log probabilities of some, by index.

        Returns, per row, whether it has finished. Rows that finished before are ignored. A row may appear twice, with
        two tokens.
        """
        ...

    def emit_prompt(self, row: Row, start: int, logprobs: Sequence[PromptLogprob | None]) -> bool:
        """Hand over the log probabilities of a row's prompt from its token `start` on, None for the first one.

        A row that wants them gets all of them before its first token, in any number of pieces. Returns whether it is
        over: with `max_tokens` 0 that is after the last piece. Pieces repeated after a retry are dropped.
        """
        ...

    def admit(self) -> list[Row]:
        """Rows that join the running batch from now on. Only for an engine whose `info.joins` is true."""
        ...


class Engine(Protocol):
    """Continues prompts. Every method runs on the worker thread, which owns the device.

    `run` blocks until every row is over. It may raise `OutOfMemory` (the worker splits the batch and tries again)
    or anything else: every row of the batch gets an error, and the worker goes on with the next batch unless the error
    leaves the device unusable (`errors.is_sticky`).
    """

    @property
    def info(self) -> ModelInfo: ...

    def run(self, rows: Sequence[Row], steps: Steps) -> None: ...

    def memory(self) -> int:
        """Bytes the device's allocator holds now."""
        ...
