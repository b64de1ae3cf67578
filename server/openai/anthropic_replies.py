"""What `/v1/messages` answers, whole and as events: types of the dicts that are sent, as in `server/replies.py`."""

from typing import Literal, NotRequired, TypeAlias

from typing_extensions import TypedDict  # pydantic takes that of `typing` only from Python 3.12 on

from server.replies import Sent


class TextOutput(TypedDict):
    type: Literal["text"]
    text: str


class ThinkingOutput(TypedDict):
    type: Literal["thinking"]
    thinking: str
    signature: str
    """Always the same; it is not checked when the thought is sent back."""


class ToolUseOutput(TypedDict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: Sent
    """The arguments, an object; as far as they can be read if the answer was cut off in them."""


Block: TypeAlias = TextOutput | ThinkingOutput | ToolUseOutput
StopReason: TypeAlias = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageUsage(TypedDict):
    """Tokens."""

    input_tokens: int
    """Tokens of the prompt that were computed for this request."""
    cache_creation_input_tokens: int
    """Always 0."""
    cache_read_input_tokens: int
    """Tokens of the prompt whose KV was already cached from an earlier request."""
    output_tokens: int


class End(TypedDict):
    stop_reason: StopReason | None
    """Null until the end."""
    stop_sequence: str | None
    """The string of `stop_sequences` that ended the answer."""


class AnthropicMessage(End):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    usage: MessageUsage


class Counted(TypedDict):
    input_tokens: int


# Errors


class Unthreaded(TypedDict):
    """The request refers to a conversation that the service would have to keep."""

    error_code: Literal["thread_unsupported_request"]
    unsupported: list[Literal["thread"]]


class AnthropicErrorDetails(TypedDict):
    type: str
    """The kind of error, by Anthropic's names."""
    message: str
    """One sentence for humans."""
    details: NotRequired[Unthreaded]


class AnthropicError(TypedDict):
    type: Literal["error"]
    error: AnthropicErrorDetails
    request_id: str


# Events


class MessageStart(TypedDict):
    type: Literal["message_start"]
    message: AnthropicMessage


class Ping(TypedDict):
    type: Literal["ping"]


class BlockStart(TypedDict):
    type: Literal["content_block_start"]
    index: int
    content_block: Block


class SaidDelta(TypedDict):
    type: Literal["text_delta"]
    text: str


class ThinkingDelta(TypedDict):
    type: Literal["thinking_delta"]
    thinking: str


class SignatureDelta(TypedDict):
    type: Literal["signature_delta"]
    signature: str


class InputDelta(TypedDict):
    type: Literal["input_json_delta"]
    partial_json: str


Delta: TypeAlias = SaidDelta | ThinkingDelta | SignatureDelta | InputDelta


class BlockDelta(TypedDict):
    type: Literal["content_block_delta"]
    index: int
    delta: Delta


class BlockStop(TypedDict):
    type: Literal["content_block_stop"]
    index: int


class MessageDelta(TypedDict):
    type: Literal["message_delta"]
    delta: End
    usage: MessageUsage


class MessageStop(TypedDict):
    type: Literal["message_stop"]


BlockEvent: TypeAlias = BlockStart | BlockDelta | BlockStop
MessageEvent: TypeAlias = MessageStart | Ping | BlockEvent | MessageDelta | MessageStop | AnthropicError
