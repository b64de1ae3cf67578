"""The values that cross the boundary between text (above) and tokens (here). All frozen: any thread may read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

TokenBitmask: TypeAlias = "NDArray[numpy.int32]"
"""A set of tokens [vocabulary / 32, int32]: token t is bit t % 32 of word t // 32."""


DEFAULT_ROWS = 32
"""Rows that run at a time where nothing else is known."""


class Finish(StrEnum):
    """Why a row is over."""

    STOP = "stop"  # a stop token, or a stop string found above
    LENGTH = "length"  # max_tokens reached
    CANCELLED = "cancelled"  # the client left
    DEADLINE = "deadline"  # the request's time limit passed
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Forced:
    """Once a row has `after` tokens, none of them `unless`, it continues with `tokens`: how a thought is ended.

    With `first`, only where that is the row's first token: how a thought is known to have begun.
    """

    after: int
    unless: int
    tokens: tuple[int, ...]
    first: int | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one row's tokens are sampled.

    Applied in this order: penalties, temperature, top_k, top_p, min_p. Temperature 0 is greedy. `seed` is any
    signed 64-bit number. `presence_penalty` and `frequency_penalty` count the row's own output tokens (OpenAI's
    definition); `repetition_penalty` counts prompt and output (transformers' definition).

    With `max_tokens` 0 the row is over once the log probabilities of its prompt were told: it needs `prompt_logprobs`.
    """

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0  # no stop token before there are this many
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    forced: Forced | None = None
    top_logprobs: int | None = None  # None: no log probabilities; 0: of the sampled token alone
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0


class Matcher(Protocol):
    """One row's state in its grammar. Only ever called by one thread at a time. Both methods may raise anything."""

    def fill(self, allowed: TokenBitmask) -> bool:
        """Set the bits of the tokens that may come next in `allowed`, which is empty; True if the text may end here.

        No bit set and True: the grammar is complete.
        """
        ...

    def advance(self, token: int) -> None:
        """Accept a token. Raises ValueError if it may not come next."""
        ...


class Grammar(Protocol):
    """A compiled grammar, immutable and shared by any number of rows."""

    def matcher(self) -> Matcher:
        """A new row's state: at the start of the grammar. Any thread."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued. `time_limit` is in seconds from submission.

    Waiting clients share the device by their requests' `weight`; `client` is any name that tells them apart. Among a
    client's own requests those of lower `priority` are served sooner.
    The answer must match `grammar`. The keys and values of a prompt may be reused by another with the same prefix if
    their `salt` is the same. `trace` is the caller's trace context, for observers alone.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    time_limit: float
    client: str = ""
    weight: float = 1.0
    priority: int = 0
    grammar: Grammar | None = None
    salt: str = ""
    trace: tuple[tuple[str, str], ...] = ()
    total_tokens: int = field(init=False, compare=False)
    """The most tokens this request can have: prompt and allowed output."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "total_tokens", len(self.prompt) + self.sampling.max_tokens)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log probability, and the likeliest tokens with theirs, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class PromptLogprob(TokenLogprob):
    """The same of a prompt's token. `rank` is its place among all tokens, the likeliest being 1."""

    rank: int


class Delta(NamedTuple):
    """What a stream hands out: the tokens since the last delta, and on the last one why the row is over.

    `logprobs` has one entry a token if the request asked for them, and none otherwise. Those of the prompt come before
    the first token, a piece in each delta: an entry for each token, None for the first, which nothing comes before.
    """

    tokens: tuple[int, ...]
    finish: Finish | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[PromptLogprob | None, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the layers above need to know of a loaded model. Sizes in tokens, memory in bytes.

    `joins`: rows can join a running batch, and cost the tokens that they have come to by now, without padding.
    `max_rows`: how many run at a time unless told otherwise.
    """

    device: str
    dtype: str
    parameters: int
    vocab_size: int
    context_window: int
    token_budget: int
    stop_token_ids: frozenset[int]
    joins: bool = False
    device_memory: int = 0
    max_rows: int = DEFAULT_ROWS
