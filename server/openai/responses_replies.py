"""What `/v1/responses` answers, whole and as events: types of the dicts that are sent, as in `server/replies.py`."""

from typing import Annotated, Literal, NotRequired, TypeAlias

import orjson
from pydantic import WithJsonSchema
from typing_extensions import TypedDict  # pydantic takes that of `typing` only from Python 3.12 on

from server.replies import PromptTokens, Seconds, Sent

Logprobs: TypeAlias = Annotated[list[orjson.Fragment], WithJsonSchema({"type": "array", "items": {"type": "object"}})]
"""Of `ChosenToken`, each already encoded; empty if not requested."""


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[None]
    """Always empty."""
    logprobs: Logprobs


class ReasoningText(TypedDict):
    type: Literal["reasoning_text"]
    text: str


class SummaryText(TypedDict):
    type: Literal["summary_text"]
    text: str


class Item(TypedDict):
    id: str
    status: Literal["in_progress", "completed", "incomplete"]


class OutputMessage(Item):
    type: Literal["message"]
    role: Literal["assistant"]
    content: list[OutputText]


class OutputReasoning(Item):
    """The model's reasoning, in `summary` if the request asks for one, else in `content`."""

    type: Literal["reasoning"]
    summary: list[SummaryText]
    content: list[ReasoningText]
    encrypted_content: NotRequired[str]
    """The reasoning for clients to send back, though not encrypted. Only if the request includes it."""


class OutputCall(Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    namespace: NotRequired[str]
    """Only of a function in one."""
    arguments: str
    """JSON text, as the model wrote it."""


OutputItem: TypeAlias = OutputMessage | OutputReasoning | OutputCall


class InputDetails(PromptTokens):
    cache_write_tokens: int


class OutputDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Tokens."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class CutOff(TypedDict):
    reason: Literal["max_output_tokens"]


class ResponseError(TypedDict):
    code: str
    message: str


class Effort(TypedDict):
    effort: str | None
    summary: str | None


class FunctionName(TypedDict):
    type: Literal["function"]
    name: str


class AllowedFunctions(TypedDict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FunctionName]


ToolChoice: TypeAlias = Literal["none", "auto", "required"] | FunctionName | AllowedFunctions


class Response(TypedDict):
    """From `instructions` on, the fields of the request, with defaults filled in."""

    id: str
    object: Literal["response"]
    created_at: Seconds
    completed_at: Seconds | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None
    incomplete_details: CutOff | None
    error: ResponseError | None
    instructions: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    tools: list[Sent]
    """Only the functions, alone or in namespaces."""
    tool_choice: ToolChoice
    parallel_tool_calls: bool
    text: Sent
    reasoning: Effort
    metadata: Sent
    user: Sent
    safety_identifier: Sent
    prompt_cache_key: Sent
    max_tool_calls: Sent
    previous_response_id: str | None
    top_logprobs: int
    truncation: Literal["disabled"]
    background: Literal[False]
    store: bool
    service_tier: Literal["default"]


class InputTokens(TypedDict):
    object: Literal["response.input_tokens"]
    input_tokens: int


class Deleted(TypedDict):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class Event(TypedDict):
    sequence_number: int


class ResponseChanged(Event):
    """A stream starts with two of these and ends with one, whose `response` is what a plain answer would be."""

    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    response: Response


class ItemChanged(Event):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class OfItem(Event):
    item_id: str
    output_index: int


class ArgumentsDelta(OfItem):
    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDone(OfItem):
    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


class OfPart(OfItem):
    content_index: int


class PartChanged(OfPart):
    type: Literal["response.content_part.added", "response.content_part.done"]
    part: OutputText | ReasoningText


class TextDelta(OfPart):
    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: Logprobs


class TextDone(OfPart):
    type: Literal["response.output_text.done"]
    text: str
    logprobs: Logprobs


class ReasoningDelta(OfPart):
    type: Literal["response.reasoning_text.delta"]
    delta: str


class ReasoningDone(OfPart):
    type: Literal["response.reasoning_text.done"]
    text: str


class OfSummary(OfItem):
    summary_index: int


class SummaryPartChanged(OfSummary):
    type: Literal["response.reasoning_summary_part.added", "response.reasoning_summary_part.done"]
    part: SummaryText


class SummaryDelta(OfSummary):
    type: Literal["response.reasoning_summary_text.delta"]
    delta: str


class SummaryDone(OfSummary):
    type: Literal["response.reasoning_summary_text.done"]
    text: str


ResponseEvent: TypeAlias = (
    ResponseChanged
    | ItemChanged
    | PartChanged
    | TextDelta
    | TextDone
    | ReasoningDelta
    | ReasoningDone
    | SummaryPartChanged
    | SummaryDelta
    | SummaryDone
    | ArgumentsDelta
    | ArgumentsDone
)
