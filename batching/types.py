"""The values exchanged between text (above) and tokens (here). All are frozen, so any thread may read them."""

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
"""Default for the number of rows that run at a time."""


class Finish(StrEnum):
    """Why a row has finished."""

    STOP = "stop"  # a stop token, or a stop string found above
    LENGTH = "length"  # max_tokens reached
    CANCELLED = "cancelled"  # the client disconnected
    DEADLINE = "deadline"  # the request's time limit passed
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Forced:
    """Ends a thought: once a row has `after` tokens, none of them `unless`, it continues with `tokens`.

    With `first`, only if that is the row's first token, which shows that a thought has begun.
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

    With `max_tokens` 0 the row finishes with the log probabilities of its prompt, so it needs `prompt_logprobs`.
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
    logprob_token_ids: tuple[int, ...] = ()  # other tokens whose log probabilities are wanted with them
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0


class Matcher(Protocol):
    """One row's state in its grammar. Called by one thread at a time. Both methods may raise anything."""

    def fill(self, allowed: TokenBitmask) -> bool:
        """Set the bits of the allowed next tokens in `allowed`, which is all zeros; True if the text may end here.

        No bit set and True: the grammar is complete.
        """
        ...

    def advance(self, token: int) -> None:
        """Accept a token. Raises ValueError if it is not allowed."""
        ...


class Grammar(Protocol):
    """A compiled grammar, immutable and shared by any number of rows."""

    def matcher(self) -> Matcher:
        """A new row's state, at the start of the grammar. Thread-safe."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued. `time_limit` is in seconds from submission.

    Waiting clients share the device by their requests' `weight`; `client` is any name that identifies one. Among a
    client's own requests those with lower `priority` are served sooner.
    The answer must match `grammar`. If it resembles `prediction`, it takes less time; that changes no answer. Requests
    with a common prefix and the same `salt` share its cached KV. `trace` is the caller's trace context, only for
    observers.
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
    prediction: tuple[int, ...] = ()
    trace: tuple[tuple[str, str], ...] = ()
    total_tokens: int = field(init=False, compare=False)
    """Maximum tokens of this request: prompt and allowed output."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "total_tokens", len(self.prompt) + self.sampling.max_tokens)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log probability, and the likeliest tokens with theirs, likeliest first; then those asked for by id."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class PromptLogprob(TokenLogprob):
    """The same for a prompt token. `rank` is its rank among all tokens; the likeliest has 1."""

    rank: int


class Delta(NamedTuple):
    """A stream's tokens since the previous delta; the last delta has the reason why the row finished.

    `logprobs` has one entry per token if the request wants them, otherwise none. Those of the prompt come before the
    first token, one piece per delta, with an entry per token, which is None for the prompt's first token.
    """

    tokens: tuple[int, ...]
    finish: Finish | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[PromptLogprob | None, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The description of a loaded model for the layers above. Sizes are in tokens, memory in bytes.

    `joins`: rows can join a running batch, and cost their current tokens, without padding. `max_rows`: default for the
    number of rows that run at a time.
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
