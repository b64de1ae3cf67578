"""The types of the dicts that are sent as replies; /openapi.json is generated from them.

The strings below fields are their descriptions there. A `NotRequired` field is left out when it does not apply.
"""

from typing import Annotated, Literal, NotRequired, TypeAlias

import orjson
from pydantic import Field, WithJsonSchema
from typing_extensions import TypedDict  # pydantic takes that of `typing` only from Python 3.12 on

from batching.events import State

Ending: TypeAlias = Literal["stop", "length"]
FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "function_call"]
Sent: TypeAlias = Annotated[orjson.Fragment, WithJsonSchema({})]
"""JSON of any type, already encoded: what the client sent, or the default."""

# Fields that types inherit carry their descriptions with them, because only a type's own strings are read.
Fingerprint: TypeAlias = Annotated[
    str, Field(description="Stays the same as long as answers with a seed do: of the version, model and engine.")
]
Seconds: TypeAlias = Annotated[int, Field(description="Seconds since 1970.")]
Logprob: TypeAlias = Annotated[float, Field(description="Natural logarithm; -9999 stands for a probability of zero.")]


BUSY = (
    "tokenizer_busy",
    "compiler_busy",
    "too_many_listeners",
    "service_bodies_full",
    "service_connections_full",
)
"""Why requests are refused with a 429 or 503 above the batcher, which has reasons of its own."""

FAULTS = (
    *("unknown_api_key", "unknown_host", "unknown_origin", "unknown_url", "unknown_method"),
    *("malformed_request", "headers_too_large", "request_timeout", "body_too_large", "corrupt_body"),
    *("unsupported_content_type", "unsupported_encoding", "invalid_json", "unsupported_field", "unsupported_schema"),
    *("context_length_exceeded", "too_large"),
    *("model_not_found", "response_not_found", "previous_response_not_found"),
)
"""Why requests are refused for a fault of their own, where it has a name."""


class ErrorDetails(TypedDict):
    message: str
    """One sentence for humans."""
    type: str
    """The kind of error, by OpenAI's names."""
    param: str | None
    """The field at fault, if there is one."""
    code: str | None
    """The exact error, for programs."""


class Error(TypedDict):
    error: ErrorDetails


# Tokens


class PromptTokens(TypedDict):
    cached_tokens: int
    """Tokens whose KV was already cached from an earlier request."""


class CompletionTokens(TypedDict):
    reasoning_tokens: NotRequired[int]
    """Tokens of thoughts, tags included, if there are any."""
    accepted_prediction_tokens: NotRequired[int]
    """If the request has a `prediction`: tokens that were guessed rightly before they were computed."""
    rejected_prediction_tokens: NotRequired[int]
    """Tokens that were guessed wrongly; the answer has others in their place."""


class Usage(TypedDict):
    """Token counts. A prompt shared by several choices is counted once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    completion_tokens_details: NotRequired[CompletionTokens]


class LikelyToken(TypedDict):
    token: str
    logprob: Logprob
    bytes: list[int]


class ChosenToken(LikelyToken):
    top_logprobs: list[LikelyToken]


class ChatLogprobs(TypedDict):
    content: list[ChosenToken]
    refusal: None


class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    """Null for the first token of an echoed prompt."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """The offset of each token in the text, in characters."""


class RankedToken(TypedDict):
    logprob: Logprob
    rank: int
    """1 for the likeliest."""
    decoded_token: str


PROMPT_LOGPROBS = (
    "For each prompt position, its token and the likeliest ones by token id; null for the first. Left out if not "
    "requested."
)


StopReason: TypeAlias = Annotated[
    str | int | None,
    Field(description="The stop string, or the token of `stop_token_ids`, that ended the answer; else null."),
]
TokenIds: TypeAlias = Annotated[list[int], Field(description="With `return_token_ids`: the generated tokens.")]
PromptTokenIds: TypeAlias = Annotated[list[int], Field(description="With `return_token_ids`: the prompt's tokens.")]


class Ended(TypedDict, total=False):
    """The fields of a choice's chunks that only some of them have."""

    stop_reason: StopReason
    token_ids: TokenIds


class OfPrompt(TypedDict, total=False):
    prompt_token_ids: PromptTokenIds
    prompt_logprobs: Annotated[list[dict[str, RankedToken] | None], Field(description=PROMPT_LOGPROBS)]


# Chat completions


class MadeFunction(TypedDict):
    name: str
    arguments: str
    """JSON text, as the model wrote it; incomplete if the answer was cut off."""


class MadeCall(TypedDict):
    index: int
    id: str
    type: Literal["function"]
    function: MadeFunction


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    """Null only if there are calls."""
    refusal: None
    reasoning_content: NotRequired[str]
    """The model's reasoning; left out if there was none."""
    tool_calls: NotRequired[list[MadeCall]]
    """Left out if there are none."""
    function_call: NotRequired[MadeFunction]
    """Replaces `tool_calls` in answers to requests with `functions`."""


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason
    token_ids: NotRequired[TokenIds]


class Head(TypedDict):
    id: str
    created: Seconds
    model: str
    system_fingerprint: Fingerprint


class ChatCompletion(Head, OfPrompt):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class MoreArguments(TypedDict):
    arguments: str


class MoreOfCall(TypedDict):
    """More arguments for a call that started in an earlier delta."""

    index: int
    function: MoreArguments


class Delta(TypedDict, total=False):
    """The additions to a message. Fields without any are left out."""

    role: Literal["assistant"]
    content: str
    reasoning_content: str
    tool_calls: list[MadeCall | MoreOfCall]
    """A call starts with its id and name, and empty arguments."""
    function_call: MadeFunction | MoreArguments


class ChunkChoice(Ended):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(Head):
    """One event. With `stream_options.include_usage`, the last one has `usage` and no choices; with
    `continuous_usage_stats`, all have `usage`."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: NotRequired[Usage]
    prompt_token_ids: NotRequired[PromptTokenIds]
    """In the first event."""


# Completions


class TextChoice(OfPrompt):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Ending
    stop_reason: StopReason
    token_ids: NotRequired[TokenIds]


class TextCompletion(Head):
    """`choices` starts with all choices of the first prompt."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage


class TextChunkChoice(Ended, OfPrompt):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Ending | None


class TextChunk(Head):
    """One event. With `stream_options.include_usage`, the last one has `usage` and no choices; with
    `continuous_usage_stats`, all have `usage`."""

    object: Literal["text_completion"]
    choices: list[TextChunkChoice]
    usage: NotRequired[Usage]


class Tokenized(TypedDict):
    tokens: list[int]
    count: int
    max_model_len: int
    """Maximum tokens of prompt and answer together."""
    token_strs: NotRequired[list[str]]
    """Each token as the vocabulary spells it, if requested."""


class Detokenized(TypedDict):
    prompt: str


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: Seconds
    owned_by: str
    max_model_len: NotRequired[int]
    """Maximum tokens of prompt and answer together; left out while the model loads."""
    context_length: NotRequired[int]
    """The prompt length to trim to, in tokens: the window less room for the answer and a margin."""


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class Health(TypedDict):
    state: State


class DefaultSampling(TypedDict):
    temperature: float
    top_p: float
    top_k: int
    """0: no limit."""
    min_p: float
    repetition_penalty: float


class Version(TypedDict):
    version: str
    sampling: DefaultSampling | None
    """Sampling for requests that do not set it; null while the model loads."""
