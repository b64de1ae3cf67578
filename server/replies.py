"""The shapes of what is answered, for /openapi.json. Handlers write plain dicts; a test holds them to these types."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from batching.events import State

FinishReason = Literal["stop", "length", "tool_calls", "function_call"]


class Reply(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class ErrorDetails(Reply):
    message: str
    """One sentence for people."""
    type: str
    """The kind of error, in OpenAI's words."""
    param: str | None
    """The field at fault, if one is."""
    code: str | None
    """What exactly went wrong, for programs."""


class Error(Reply):
    error: ErrorDetails


class PromptTokens(Reply):
    cached_tokens: int
    """Tokens whose keys and values had been computed for an earlier request."""


class Usage(Reply):
    """Tokens. Choices that continue the same prompt count it once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class LikelyToken(Reply):
    token: str
    logprob: float
    """Natural logarithm; -9999 stands for a probability of zero."""
    bytes: list[int]


class ChosenToken(LikelyToken):
    top_logprobs: list[LikelyToken]


class ChatLogprobs(Reply):
    content: list[ChosenToken]
    refusal: None


class MadeFunction(Reply):
    name: str
    arguments: str
    """JSON text, as the model wrote it: an answer cut off may have part of it only."""


class MadeCall(Reply):
    index: int
    id: str
    type: Literal["function"]
    function: MadeFunction


class ChatMessage(Reply):
    role: Literal["assistant"]
    content: str | None
    """Null only beside calls."""
    refusal: None
    reasoning_content: str | None = None
    """The model's thinking; left out if there was none."""
    tool_calls: list[MadeCall] | None = None
    """Left out if there are none."""
    function_call: MadeFunction | None = None
    """The call of an answer to a request with `functions`, in place of `tool_calls`."""


class ChatChoice(Reply):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class RankedToken(Reply):
    logprob: float
    rank: int
    """1 for the likeliest."""
    decoded_token: str


PromptLogprobs = list[dict[str, RankedToken] | None]


class ChatCompletion(Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    """Seconds since 1970."""
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    """By token id, each token of the prompt and the likeliest in its place; null for the first token. Left out if not
    asked for."""


class FunctionDelta(Reply):
    name: str | None = None
    arguments: str


class CallDelta(Reply):
    """The first delta of a call has its id, type and name; all of them add to its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(Reply):
    """What is new in a message. Each field is left out where nothing is."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None
    function_call: FunctionDelta | None = None


class ChunkChoice(Reply):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(Reply):
    """One event. With `stream_options.include_usage`, one without choices and with `usage` comes last; with
    `continuous_usage_stats`, all have it."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class TextLogprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float | None]
    """Null for the first token of an echoed prompt."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Where each token starts in the text, in characters."""


class TextChoice(Reply):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]
    prompt_logprobs: PromptLogprobs | None = None
    """By token id, each token of the prompt and the likeliest in its place; null for the first token. Left out if not
    asked for."""


class TextCompletion(Reply):
    """`choices` has all answers to the first prompt first."""

    id: str
    object: Literal["text_completion"]
    created: int
    """Seconds since 1970."""
    model: str
    choices: list[TextChoice]
    usage: Usage


class TextChunkChoice(Reply):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class TextChunk(Reply):
    """One event. With `stream_options.include_usage`, one without choices and with `usage` comes last; with
    `continuous_usage_stats`, all have it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChunkChoice]
    usage: Usage | None = None


class OutputText(Reply):
    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputItem(Reply):
    """A message and thinking have `content`, a call has `call_id`, `name` and `arguments`."""

    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] | None = None
    content: list[OutputText] | None = None
    summary: list[Any] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


class InputDetails(Reply):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(Reply):
    reasoning_tokens: int


class AnswerUsage(Reply):
    """Tokens."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class CutOff(Reply):
    reason: str


class AnswerError(Reply):
    code: str
    message: str


class Answered(Reply):
    """Besides these fields an answer has those of its request, with what leaving them out meant."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    """Seconds since 1970."""
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[OutputItem]
    usage: AnswerUsage | None
    incomplete_details: CutOff | None
    error: AnswerError | None


class AnswerEvent(Reply):
    """One event. The last one's `response` is what a plain answer would be."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int
    response: Answered | None = None
    item: OutputItem | None = None
    delta: str | None = None


class Tokenized(Reply):
    tokens: list[int]
    count: int
    max_model_len: int
    """Most tokens of prompt and answer together."""
    token_strs: list[str] | None = None
    """The text of each token, if it was asked for."""


class Detokenized(Reply):
    prompt: str


class Model(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None = None
    """Most tokens of prompt and answer together; left out while the model loads."""
    context_length: int | None = None
    """The prompt length to trim to, in tokens: below the window by what the answer and a margin need."""


class ModelList(Reply):
    object: Literal["list"]
    data: list[Model]


class Health(Reply):
    state: State


class DefaultSampling(Reply):
    temperature: float
    top_p: float
    top_k: int
    """0: no limit."""
    min_p: float
    repetition_penalty: float


class Version(Reply):
    version: str
    sampling: DefaultSampling | None
    """What a request gets that leaves its sampling open; null while the model loads."""
