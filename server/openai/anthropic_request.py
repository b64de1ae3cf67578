"""The body of `POST /v1/messages`, and its translation into a chat completion request."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, PlainValidator, Tag, model_validator

from server.fields import Body, Flag, Integral, NoEffect, Tokens
from server.grammar.json_schema import Schema
from server.http.errors import bad_request
from server.openai.messages import MAX_CALLS, MAX_MESSAGES, CallId, Thinking
from server.openai.requests import UNSUPPORTED, ChatRequest, Generation, StopList, chat_of
from server.openai.tools import MAX_TOOLS, Function, Name, OtherTool, Parameters

Fields: TypeAlias = dict[str, Any]
"""A JSON object that has not been checked yet."""

BILLING = "x-anthropic-billing-header:"
"""How Claude Code starts a block of the system prompt that is another one in every request and not for the model."""


class TextBlock(Body):
    type: Literal["text"]
    text: str


class ThinkingBlock(Body):
    """A thought of an earlier answer. Signatures are not checked."""

    type: Literal["thinking"]
    thinking: str


class RedactedBlock(Body):
    """A thought that only the service that made it can read. Skipped."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: CallId
    name: Name
    input: Annotated[Schema, Field(default_factory=dict)]


def _kind(block: object) -> str:
    kind = block.get("type") if isinstance(block, dict) else getattr(block, "type", None)
    return kind if isinstance(kind, str) and re.fullmatch(r"[a-z_]{1,40}", kind) else "other"


def _readable(*kinds: str) -> BeforeValidator:
    """For a block: accepts these types and refuses others in words."""

    def check(block: object) -> object:
        if _tag(block) not in kinds:
            raise ValueError(f"this model only reads text, but there is a block of type {_kind(block)}")
        return block

    return BeforeValidator(check)


def _blocks(content: object) -> object:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Text = Annotated[
    list[Annotated[TextBlock, _readable("text")]],
    Field(fail_fast=True),
    BeforeValidator(_blocks, json_schema_input_type=str | list[TextBlock]),
]


def _as_text(block: object) -> object:
    """A document of plain text or text blocks, or a search result, as a text block that begins with its title."""
    match block:
        case {"type": "document", "source": {"type": "text", "data": content}, **rest}:
            about = rest.get("title"), rest.get("context")
        case {"type": "document", "source": {"type": "content", "content": content}, **rest}:
            about = rest.get("title"), rest.get("context")
        case {"type": "search_result", "content": content, **rest}:
            about = rest.get("title"), rest.get("source")
        case _:
            return block
    parts = _blocks(content)
    if not isinstance(parts, list) or not all(map(_is_text, parts)):
        return block
    texts = [*about, *(part["text"] for part in parts)]
    return {"type": "text", "text": "\n".join(text for text in texts if isinstance(text, str) and text)}


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


class ToolReference(Body):
    """What Claude Code's search for tools finds. The model already has every tool, so all it needs is the name."""

    type: Literal["tool_reference"]
    tool_name: Name

    @property
    def text(self) -> str:
        return f"The tool {self.tool_name} can be called."


class Unseen(Body):
    """What a tool returned and this model cannot read. It is told so, because every later turn has it, too.

    Claude Code writes the pages of a PDF that it has read beside the tool's result.
    """

    type: Literal["image", "document"]

    @property
    def text(self) -> str:
        return f"[Here was {'an image' if self.type == 'image' else 'a document'}, which this model cannot see.]"


AnyResult = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ToolReference, Tag("tool_reference")]
    | Annotated[Unseen, Tag("image")]
    | Annotated[Unseen, Tag("document")],
    Discriminator(_kind),
    _readable("text", "tool_reference", "image", "document"),
    BeforeValidator(_as_text),
]
Result = Annotated[
    list[AnyResult],
    Field(fail_fast=True),
    BeforeValidator(_blocks, json_schema_input_type=str | list[AnyResult]),
]


class ToolResultBlock(Body):
    """What a tool returned. The model reads that of a failed one after the word Error."""

    type: Literal["tool_result"]
    tool_use_id: CallId
    content: Annotated[Result, Field(default_factory=list)]
    is_error: Flag = False

    @property
    def text(self) -> str:
        return ("Error: " if self.is_error else "") + joined(self.content)

    @property
    def unseen(self) -> list[str]:
        return [f"tool_result.{part.type}" for part in self.content if isinstance(part, Unseen)]


SERVED = re.compile(r"[a-z_]+_tool_(use|result)")


class ServedBlock(Body):
    """What a tool that Anthropic ran, such as its search, was asked or returned in an earlier answer. Skipped."""

    type: Annotated[str, Field(pattern=f"^{SERVED.pattern}$")]


def _tag(block: object) -> str:
    return "served" if SERVED.fullmatch(_kind(block)) else _kind(block)


Block: TypeAlias = TextBlock | ThinkingBlock | RedactedBlock | ToolUseBlock | ToolResultBlock | Unseen | ServedBlock
AnyBlock = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[RedactedBlock, Tag("redacted_thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")]
    | Annotated[Unseen, Tag("image")]
    | Annotated[Unseen, Tag("document")]
    | Annotated[ServedBlock, Tag("served")],
    Discriminator(_tag),
    _readable("text", "thinking", "redacted_thinking", "tool_use", "tool_result", "image", "document", "served"),
    BeforeValidator(_as_text),
]


class Turn(Body):
    role: Literal["user", "assistant", "system"]
    content: Annotated[
        list[AnyBlock],
        Field(max_length=MAX_CALLS, fail_fast=True),
        BeforeValidator(_blocks, json_schema_input_type=str | list[AnyBlock]),
    ]

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.role != "assistant" and any(isinstance(block, ToolUseBlock) for block in self.content):
            raise ValueError("only a message with the role assistant may have a block of type tool_use")
        if self.role != "user" and any(isinstance(block, ToolResultBlock) for block in self.content):
            raise ValueError("only a message with the role user may have a block of type tool_result")
        if self.unseen and not any(isinstance(block, ToolResultBlock) for block in self.content):
            raise ValueError(f"this model only reads text, but there is a block of type {self.unseen[0].type}")
        return self

    @property
    def unseen(self) -> list[Unseen]:
        """What a tool returned beside its result."""
        return [block for block in self.content if isinstance(block, Unseen)]

    def as_chat(self) -> list[Fields]:
        return [self._answer()] if self.role == "assistant" else list(self._told())

    def _answer(self) -> Fields:
        """Its texts are one text, because the model wrote them without a break."""
        calls = [
            {"id": block.id, "function": {"name": block.name, "arguments": block.input}}
            for block in self.content
            if isinstance(block, ToolUseBlock)
        ]
        thoughts = [block.thinking for block in self.content if isinstance(block, ThinkingBlock)]
        return {
            "role": "assistant",
            "content": "".join(block.text for block in self.content if isinstance(block, TextBlock)),
            "reasoning_content": "".join(thoughts) or None,
            "tool_calls": calls or None,
        }

    def _told(self) -> Iterator[Fields]:
        """A turn of the user or the system: each tool's result is a message of its own, and so is the text between."""
        texts: list[TextBlock | Unseen] = []
        for block in self.content:
            if isinstance(block, TextBlock | Unseen):
                texts.append(block)
            elif isinstance(block, ToolResultBlock):
                if texts:
                    yield {"role": self.role, "content": joined(texts)}
                    texts = []
                yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.text}
        if texts or not self.content:
            yield {"role": self.role, "content": joined(texts)}


def joined(blocks: Iterable[TextBlock | ToolReference | Unseen]) -> str:
    """Clients write each block as a paragraph of its own."""
    return "\n".join(block.text for block in blocks)


class CustomTool(Function):
    type: Literal["custom"] = "custom"
    parameters: Annotated[Parameters | None, Field(alias="input_schema")] = None


def _tool(value: object) -> object:
    """Decides by the type alone, so that errors in a tool are reported as errors in a tool."""
    kind = value.get("type") if isinstance(value, dict) else None
    other = isinstance(kind, str) and kind not in ("custom", "function")
    return (OtherTool if other else CustomTool).model_validate(value)


AnyTool = Annotated[CustomTool | OtherTool, PlainValidator(_tool, json_schema_input_type=CustomTool | OtherTool)]


class Choice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    """With the type tool: the tool that must be called."""
    disable_parallel_tool_use: Flag = False

    @model_validator(mode="after")
    def _names_a_tool(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("the type tool needs a name, and only that type has one")
        return self

    def as_chat(self) -> str | Fields:
        if self.type == "tool":
            return {"function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class JsonFormat(Body):
    type: Literal["json_schema"]
    schema_: Annotated[Schema, Field(alias="schema")]


class OutputConfig(Body):
    format: JsonFormat | None = None
    effort: NoEffect = None


class MessageThinking(Thinking):
    type: Literal["enabled", "disabled", "adaptive", "auto", "between_tools"]  # type: ignore[assignment]

    def as_chat(self, turns: Sequence[Turn]) -> Thinking:
        """`between_tools`: no thought until a tool has returned something; then as the service does by default."""
        if self.type != "between_tools":
            return self
        news = takewhile(lambda turn: turn.role != "assistant", reversed(turns))
        told = any(isinstance(block, ToolResultBlock) for turn in news for block in turn.content)
        return Thinking(type="adaptive" if told else "disabled")


class CountRequest(Generation):
    """`POST /v1/messages/count_tokens`. Takes the other fields of a message request, too."""

    unsupported = (
        UNSUPPORTED
        | {"functions", "response_format", "prompt_logprobs", "stop", "max_completion_tokens"}
        | {"thread"}  # without what came before, the rest of a conversation would be answered as if it were all
    )

    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES - 1, fail_fast=True)]
    """If the assistant has the last turn, the answer continues its text."""
    system: Text | None = None
    tools: Annotated[list[AnyTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """Tools that Anthropic would run are not offered to the model."""
    tool_choice: Choice | None = None
    thinking: MessageThinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = None
    """The older form of `output_config.format`."""
    stop_sequences: StopList | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=1), Integral] | None = None
    context_management: NoEffect = None
    betas: NoEffect = None

    @model_validator(mode="after")
    def _one_format(self) -> Self:
        if self.output_format and self.output_config and self.output_config.format:
            raise ValueError("output_format is the older form of output_config.format, so send only one of the two")
        return self

    @property
    def wanted_format(self) -> JsonFormat | None:
        return self.output_format or (self.output_config.format if self.output_config else None)

    @property
    def skipped(self) -> tuple[str, ...]:
        tools = [f"tools.{tool.type}" for tool in self.tools or () if isinstance(tool, OtherTool)]
        results = [block for turn in self.messages for block in turn.content if isinstance(block, ToolResultBlock)]
        inside = [name for result in results for name in result.unseen]
        blocks = [block for turn in self.messages for block in turn.content]
        beside = [f"messages.{block.type}" for block in blocks if isinstance(block, Unseen | ServedBlock)]
        return tuple(dict.fromkeys([*tools, *inside, *beside]))

    @property
    def prefill(self) -> str | None:
        """The beginning of the answer, if the client wrote it. Raises `ApiError` 400."""
        last = self.messages[-1]
        if last.role != "assistant":
            return None
        if not all(isinstance(block, TextBlock) for block in last.content):
            raise bad_request("The last message can only be continued if it has nothing but text.", "messages")
        if self.thinking and self.thinking.thinks:
            raise bad_request(
                "With thinking the answer cannot be begun for the model; leave out the last message.", "messages"
            )
        if self.wanted_format:
            raise bad_request(
                "With a format the answer cannot be begun for the model; leave out the last message.", "messages"
            )
        return "".join(block.text for block in last.content if isinstance(block, TextBlock))


class MessageRequest(CountRequest):
    """`POST /v1/messages`. Takes the sampling fields of chat completions, too."""

    max_tokens: Tokens


def as_chat(request: CountRequest) -> ChatRequest:
    """The same request to chat completions. Raises `ApiError` 400."""
    choice, wanted = request.tool_choice, request.wanted_format
    fields: Fields = {
        "messages": turns(request),
        "tools": None if request.tools is None else [_chat_tool(tool) for tool in request.tools],
        "tool_choice": choice and choice.as_chat(),
        "parallel_tool_calls": False if choice and choice.disable_parallel_tool_use else None,
        "response_format": wanted and {"type": "json_schema", "json_schema": {"schema": wanted.schema_}},
        "stop": request.stop_sequences,
    }
    if request.prefill:
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    if request.thinking:
        fields["thinking"] = request.thinking.as_chat(request.messages)
    if request.prefill is not None:
        fields["thinking"] = Thinking(type="disabled")
    return chat_of(request, fields)


def turns(request: CountRequest) -> list[Fields]:
    """The messages of a chat. Raises `ApiError` 400 if there are none."""
    told = [block for block in request.system or () if not block.text.startswith(BILLING)]
    system: list[Fields] = [{"role": "system", "content": joined(told)}] if told else []
    asked = request.messages[:-1] if request.prefill == "" else request.messages
    messages = system + [message for turn in asked for message in turn.as_chat()]
    if not messages:
        raise bad_request("There must be a message before an empty one that is continued.", "messages")
    return messages


def _chat_tool(tool: CustomTool | OtherTool) -> Fields:
    return {"function": tool} if isinstance(tool, CustomTool) else {"type": tool.type}
