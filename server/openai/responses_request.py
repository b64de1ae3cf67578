"""The body of `POST /v1/responses`, and its translation into a chat completion request."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Annotated, Any, Literal, TypeAlias

import orjson
from orjson import Fragment
from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PlainValidator,
    PrivateAttr,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import to_json

from server.fields import Body, Flag, Integral, NoEffect, Tokens
from server.http.errors import ApiError, bad_request
from server.openai import responses_replies as replies
from server.openai.constraints import JsonSchema, ResponseFormat
from server.openai.messages import MAX_MESSAGES, CalledFunction, CallId, Message, TextPart, ThinkingChoice, text_of
from server.openai.requests import MAX_TOP_LOGPROBS, UNSUPPORTED, ChatRequest, Generation, TokenReports, chat_of
from server.openai.tools import (
    MAX_TOOLS,
    WRONG_CHOICE,
    ChosenFunction,
    Function,
    Name,
    OtherTool,
    ToolChoice,
    is_other,
)

Fields: TypeAlias = dict[str, Any]
"""A JSON object that has not been checked yet."""

CHAT_FIELDS = {"messages": "input", "response_format": "text.format", "reasoning_effort": "reasoning.effort"}
"""Chat request fields and their names in this API."""

TOKEN_REPORTS = TokenReports.model_fields.keys() | {"logprob_token_ids", "prompt_logprobs"}
"""Fields about choices, of which a response has none."""

RESPONSE = "resp_"
"""How the id of a response begins."""

ABOUT_THE_ITEM = frozenset(["type", "id", "call_id", "name", "status"])
UNREADABLE = frozenset(["compaction", "compaction_summary", "context_compaction"])
"""Items that replace part of the conversation, encrypted by the service that made them."""

TOKEN_LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"
UNENCRYPTED = "unencrypted:"
"""How the `encrypted_content` of this service's own reasoning begins, which is that reasoning as it is."""


Keep: TypeAlias = Callable[[bytes, replies.Response], None]
"""Keeps a response; the bytes are the items before its own, as JSON."""

NOT_KEPT = "stored state is not kept here, so the field input must hold the whole conversation"
NOT_LATER = "no answer is made in the background here, so leave the field out and wait for it, or let it stream"


def as_json(value: object) -> Fragment:
    """A value that a client sent, encoded by pydantic, which can write integers of any size."""
    return Fragment(to_json(value, by_alias=True, inf_nan_mode="null"))


def only(*allowed: object, otherwise: str = NOT_KEPT) -> BeforeValidator:
    """For a field about stored state: accepts only the values that ask for none."""

    def check(value: object) -> object:
        if value not in allowed:
            raise ValueError(otherwise)
        return value

    return BeforeValidator(check)


Unstored = Annotated[None, only(None)]


class MessageItem(Message):
    type: Literal["message"] = "message"


class CallItem(CalledFunction):
    type: Literal["function_call"]
    call_id: CallId
    namespace: Name | None = None


class UnseenPart(Body):
    """What a tool returned and this model cannot read. It is told so, because every later turn has it, too."""

    type: Literal["input_image", "input_file"]

    @property
    def text(self) -> str:
        return f"[Here was {'an image' if self.type == 'input_image' else 'a file'}, which this model cannot see.]"


def _output_part(part: object) -> str | UnseenPart:
    unseen = isinstance(part, dict) and part.get("type") in ("input_image", "input_file")
    return UnseenPart.model_validate(part) if unseen else text_of(part)


def _output(value: object) -> list[object]:
    """A text or a list of parts; anything else becomes JSON text."""
    parts = value if isinstance(value, list) else [value]
    if all(isinstance(part, str) or (isinstance(part, dict) and "type" in part) for part in parts):
        return parts
    return [json.dumps(value, ensure_ascii=False)]


OutputPart = Annotated[
    str | UnseenPart, PlainValidator(_output_part, json_schema_input_type=str | TextPart | UnseenPart)
]
Output = Annotated[list[OutputPart], BeforeValidator(_output, json_schema_input_type=str | list[OutputPart] | Any)]


class CallOutputItem(Body):
    type: Literal["function_call_output"]
    call_id: CallId
    output: Annotated[Output, Field(default_factory=list)]

    @property
    def text(self) -> str:
        return "".join(part.text if isinstance(part, UnseenPart) else part for part in self.output)

    @property
    def unseen(self) -> list[str]:
        return [f"{self.type}.{part.type}" for part in self.output if isinstance(part, UnseenPart)]


class ReasoningItem(Body):
    """Reasoning. Clients that read only summaries send back nothing else; here, they are the reasoning itself. What is
    encrypted is skipped with its summary, which another service wrote; what this one says it is, is not."""

    type: Literal["reasoning"]
    content: object = None
    summary: object = None
    encrypted_content: object = None

    @property
    def text(self) -> str:
        sealed = self.encrypted_content
        if isinstance(sealed, str) and sealed.startswith(UNENCRYPTED):
            return sealed.removeprefix(UNENCRYPTED)
        return _joined(self.content) or ("" if sealed else _joined(self.summary))


def _joined(parts: object) -> str:
    """The texts of what may be a list of parts."""
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return "".join(text for text in texts if isinstance(text, str))


class ReferenceItem(Body):
    """An item of a stored response of the same API key."""

    type: Literal["item_reference"]
    id: Annotated[str, Field(strict=True, max_length=256)]

    @property
    def response(self) -> str:
        """The id of its response."""
        return RESPONSE + "".join(self.id.split("_")[1:-1])


ITEMS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")


class OtherItem(Body):
    """An action that another service took by itself, such as a search. Skipped."""

    type: Annotated[str, Field(json_schema_extra={"not": {"enum": [*ITEMS]}})]


def _kind(item: object) -> str:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) and kind in ITEMS else "other"


AnyItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ReferenceItem, Tag("item_reference")]
    | Annotated[OtherItem, Tag("other")],
    Discriminator(_kind),
]


def _checked(value: object) -> Fields:
    """The item with its type and without nulls. Raises ValueError if it is not supported."""
    if not isinstance(value, dict):
        raise ValueError("an item must be an object")
    item = {key: part for key, part in value.items() if part is not None}
    kind = item.setdefault("type", "message" if "role" in item else "item_reference")
    if not isinstance(kind, str):
        raise ValueError("the field type must be a string")
    if kind in UNREADABLE:
        raise ValueError(f"an item of type {kind} can be read only by the service that made it")
    return item


def _item(value: object) -> Fields:
    """The item, converted to a supported type if it belongs to the conversation."""
    item = _checked(value)
    kind: str = item["type"]
    if kind.endswith("_call_output"):
        return item | {"type": "function_call_output"} | _call_of(item)
    if kind in ITEMS:
        return item
    if "role" in item:
        return item | {"type": "message"}
    return _function_call(item) if kind.endswith("_call") and "call_id" in item else item


def _function_call(item: Fields) -> Fields:
    """A call of a non-function tool, as a function call whose arguments are the item's other fields."""
    name = item.get("name", item["type"].removesuffix("_call"))
    arguments = {key: value for key, value in item.items() if key not in ABOUT_THE_ITEM}
    return {"type": "function_call", "call_id": item["call_id"], "name": name, "arguments": arguments}


def _call_of(output: Fields) -> Fields:
    """The id of the call that an output answers. A local shell output has it as its own id."""
    return {"call_id": output["id"]} if "call_id" not in output and "id" in output else {}


def _input(value: object) -> object:
    return [{"type": "message", "role": "user", "content": value}] if isinstance(value, str) else value


Item = Annotated[AnyItem, BeforeValidator(_item)]
# One less than the messages of a chat, because the instructions become one, too.
Items = Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES - 1, fail_fast=True)]


class FlatTool(Function):
    type: Literal["function"] = "function"


def _inner_tool(value: object) -> FlatTool | OtherTool:
    """Decides by the type alone, so that errors in a function are reported as errors in a function."""
    return (OtherTool if is_other(value) else FlatTool).model_validate(value)


InnerTool = Annotated[FlatTool | OtherTool, PlainValidator(_inner_tool, json_schema_input_type=FlatTool | OtherTool)]


class Namespace(Body):
    """A group of functions, as Codex offers those of an MCP server. The model sees each by its `full_name`."""

    type: Literal["namespace"]
    name: Name
    description: Annotated[str, Field(strict=True)] | None = None
    tools: Annotated[list[InnerTool], Field(max_length=MAX_TOOLS, fail_fast=True)]


def flat(tools: Iterable[FlatTool | Namespace | OtherTool] | None) -> Iterator[tuple[str | None, FlatTool | OtherTool]]:
    """All tools, each with its namespace if it has one."""
    for tool in tools or ():
        if isinstance(tool, Namespace):
            yield from ((tool.name, inner) for inner in tool.tools)
        else:
            yield None, tool


def full_name(namespace: str | None, name: str) -> str:
    return name if namespace is None else f"{namespace}__{name}"


def _tool(value: object) -> object:
    grouped = isinstance(value, dict) and value.get("type") == "namespace"
    return Namespace.model_validate(value) if grouped else _inner_tool(value)


AnyTool = Annotated[
    FlatTool | Namespace | OtherTool, PlainValidator(_tool, json_schema_input_type=FlatTool | Namespace | OtherTool)
]


class FlatChoice(ChosenFunction):
    type: Literal["function"] = "function"
    namespace: Name | None = None


class FlatAllowed(Body):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"] = "auto"
    tools: list[FlatChoice | OtherTool]


def _choice(value: object, info: ValidationInfo) -> object:
    """The tool choice in the format of chat completions."""
    if not isinstance(value, dict):
        return value
    meant = _in_namespaces(info.data.get("tools"))
    if value.get("type") == "allowed_tools" and isinstance(value.get("tools"), list):
        allowed = (one for tool in value["tools"] for one in _named(tool, meant))
        return {"type": "allowed_tools", "allowed_tools": value | {"tools": [*islice(allowed, MAX_TOOLS + 1)]}}
    named = _named(value, meant)
    return named[0] if len(named) == 1 else {"function": {"name": _said(value)}}


def _in_namespaces(tools: Iterable[FlatTool | Namespace | OtherTool] | None) -> dict[tuple[object, ...], list[str]]:
    """The full names of functions in namespaces, by the type, name and namespace that a choice may say of them: as a
    call does, or without the namespace if no function outside of one has that name, or all of a namespace."""
    functions = ((namespace, tool.name) for namespace, tool in flat(tools) if isinstance(tool, FlatTool))
    listed = list(islice(functions, MAX_TOOLS))
    alone = {name for namespace, name in listed if namespace is None}
    meant = defaultdict[tuple[object, ...], list[str]](list)
    for namespace, name in listed:
        if namespace is not None:
            meant["namespace", namespace, None].append(full_name(namespace, name))
            meant["function", name, namespace].append(full_name(namespace, name))
            if name not in alone:
                meant["function", name, None].append(full_name(namespace, name))
    return meant


def _named(value: object, meant: Mapping[tuple[object, ...], list[str]]) -> list[object]:
    """What an object of a choice names. Raises ValueError."""
    if not isinstance(value, dict):
        return [value]
    said = value.get("type", "function"), value.get("name"), value.get("namespace")
    names = meant.get(said) if all(isinstance(part, str | None) for part in said) else None
    if names is None:
        return [value if is_other(value) else {"function": {"name": _said(value)}}]
    return [{"function": {"name": name}} for name in names]


def _said(choice: Fields) -> str:
    """The full name that a choice of a function gives it. Raises ValueError."""
    try:
        chosen = FlatChoice.model_validate(choice)
    except ValidationError:
        raise ValueError(WRONG_CHOICE) from None
    return full_name(chosen.namespace, chosen.name)


FlatToolChoice = Literal["none", "auto", "required"] | FlatChoice | FlatAllowed


class PlainFormat(Body):
    type: Literal["text", "json_object"]


class SchemaFormat(JsonSchema):
    type: Literal["json_schema"]


def _format(value: object) -> PlainFormat | SchemaFormat:
    """Decides by the type alone, so that errors name the fields of that type."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise ValueError("must be of type text, json_object or json_schema")
    return (SchemaFormat if kind == "json_schema" else PlainFormat).model_validate(value)


Format = Annotated[
    PlainFormat | SchemaFormat, PlainValidator(_format, json_schema_input_type=PlainFormat | SchemaFormat)
]


class TextConfig(Body):
    format: Format = PlainFormat(type="text")
    verbosity: NoEffect = None


class ReasoningConfig(Body):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """"none" and "minimal" turn thinking off, other values on."""
    summary: Literal["auto", "concise", "detailed"] | None = None
    """With any of them, reasoning is sent as its own summary."""


class ResponseRequest(Generation, ThinkingChoice):
    """`POST /v1/responses`. Takes the sampling and thinking fields of chat completions, too."""

    unsupported = UNSUPPORTED | {"messages", "functions", "response_format", "continue_final_message"} | TOKEN_REPORTS

    input: Annotated[Items, BeforeValidator(_input, json_schema_input_type=str | Items)]
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=1), Integral] | None = None
    tools: Annotated[list[AnyTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """Tools other than functions, alone or in a namespace, are not offered to the model."""
    tool_choice: Annotated[ToolChoice, BeforeValidator(_choice, json_schema_input_type=FlatToolChoice)] | None = None
    parallel_tool_calls: Flag | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    thinking_budget: Tokens | None = None
    thinking_token_budget: Tokens | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_TOP_LOGPROBS), Integral] | None = None
    background: Annotated[Flag | None, only(False, None, otherwise=NOT_LATER)] = None
    previous_response_id: Annotated[str, Field(strict=True, max_length=256)] | None = None
    """A stored response of the same API key, whose conversation the input continues."""
    store: Annotated[object, Field(description="False: do not store the response where responses are stored.")] = None
    conversation: Unstored = None
    prompt: Unstored = None
    include: list[str] | None = None
    """`message.output_text.logprobs`; `reasoning.encrypted_content`, for clients that send back no other reasoning."""
    _before: bytes = PrivateAttr(b"")
    _referred: list[bytes] = PrivateAttr(default_factory=list)
    _items: bytes = PrivateAttr(b"")
    _tools: list[Fragment] = PrivateAttr(default_factory=list)
    _keep: Keep | None = PrivateAttr(None)
    truncation: NoEffect = None
    max_tool_calls: NoEffect = None
    client_metadata: NoEffect = None

    @property
    def shown_tools(self) -> list[Fragment]:
        """The functions, alone or in namespaces, as JSON. Empty until `remember` has encoded them."""
        return self._tools

    @property
    def namespaced(self) -> dict[str, tuple[str, str]]:
        """The namespace and the name of each function in one, by its full name."""
        return {
            full_name(namespace, tool.name): (namespace, tool.name)
            for namespace, tool in flat(self.tools)
            if namespace is not None and isinstance(tool, FlatTool)
        }

    @property
    def skipped(self) -> tuple[str, ...]:
        tools = [f"tools.{tool.type}" for _, tool in flat(self.tools) if isinstance(tool, OtherTool)]
        items = [f"input.{item.type}" for item in self.input if isinstance(item, OtherItem)]
        unseen = [name for item in self.input if isinstance(item, CallOutputItem) for name in item.unseen]
        return tuple(dict.fromkeys(tools + items + unseen))

    @property
    def wants_logprobs(self) -> bool:
        return TOKEN_LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    @property
    def conversation_items(self) -> list[AnyItem]:
        """Those of the response that this one continues, and the input, in which items stand in place of references.
        Takes milliseconds for long ones. Raises `ApiError` 400."""
        known = {item["id"]: item for output in self._referred for item in orjson.loads(output)}
        before = ITEM_LIST.validate_json(self._before) if self._before else ()
        return [*before, *(_meant(item, known) for item in self.input)]

    def place(self, before: bytes, referred: list[bytes], keep: Keep | None) -> None:
        """Take the items of the response before, the items of responses that the input refers to, each response's as
        JSON, and what keeps this one, if anything does."""
        self._before, self._referred, self._keep = before, referred, keep

    def remember(self) -> None:
        """Encode `shown_tools` and what `keep` needs. Takes milliseconds for many tools and long conversations."""
        self._tools = [as_json(tool) for tool in self.tools or () if not isinstance(tool, OtherTool)]
        if self._keep:
            self._items = to_json(self.conversation_items, by_alias=True, exclude_none=True)

    @property
    def keep(self) -> Callable[[replies.Response], None] | None:
        """What to call with the response once it has ended."""
        return self._keep and partial(self._keep, self._items)


ITEM_LIST: TypeAdapter[list[AnyItem]] = TypeAdapter(list[Item])
ITEM: TypeAdapter[AnyItem] = TypeAdapter(Item)


def _meant(item: AnyItem, known: dict[str, Fields]) -> AnyItem:
    """What a reference refers to, once: each takes its item away. Raises `ApiError` 400."""
    if not isinstance(item, ReferenceItem):
        return item
    if (found := known.pop(item.id, None)) is None:
        raise bad_request(
            "The input refers to an item that is not stored here, or no longer, or to one twice; send the item itself, "
            "as clients do with store: false.",
            "input",
        )
    return ITEM.validate_python(found)


class ResponseChat(ChatRequest):
    """The result of `as_chat`. Agents use this API and cannot use a truncated answer."""

    @property
    def useless_if_cut(self) -> bool:
        return True


def as_chat(request: ResponseRequest) -> ChatRequest:
    """The same request to chat completions. Raises `ApiError` 400 with that API's field names."""
    wanted = PlainFormat(type="text") if request.text is None else request.text.format
    schema = wanted if isinstance(wanted, SchemaFormat) else None
    fields: Fields = {
        "messages": turns(request),
        "logprobs": request.wants_logprobs,
        "top_logprobs": request.top_logprobs,
        "max_completion_tokens": request.max_output_tokens,
        "tools": None if request.tools is None else [_chat_tool(*tool) for tool in flat(request.tools)],
        "response_format": ResponseFormat(type=wanted.type, json_schema=schema),
        "reasoning_effort": (request.reasoning and request.reasoning.effort) or request.reasoning_effort,
    }
    return chat_of(request, fields, ResponseChat)


def _chat_tool(namespace: str | None, tool: FlatTool | OtherTool) -> Fields:
    if isinstance(tool, OtherTool):
        return {"type": tool.type}
    return {"function": tool.model_copy(update={"name": full_name(namespace, tool.name)})}


def turns(request: ResponseRequest) -> list[Fields]:
    """The messages of a chat. Reasoning joins the assistant turn after it, calls join the one before them."""
    messages: list[Fields] = [{"role": "system", "content": request.instructions}] if request.instructions else []
    for item in request.conversation_items:
        last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
        match item:
            case MessageItem():
                turn = item.model_dump(exclude={"type"}, exclude_none=True)
                if item.role == "assistant" and last is not None and last.keys() == {"role", "reasoning_content"}:
                    messages[-1] = last | turn
                else:
                    messages.append(turn)
            case ReasoningItem() if item.text:
                messages.append({"role": "assistant", "reasoning_content": item.text})
            case CallItem():
                if last is None:
                    messages.append({"role": "assistant"})
                name = full_name(item.namespace, item.name)
                call = {"id": item.call_id, "function": {"name": name, "arguments": item.arguments}}
                messages[-1].setdefault("tool_calls", []).append(call)
            case CallOutputItem():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.text})
    return messages


def renamed(error: ApiError) -> ApiError:
    """An error about a chat request, with the field's name in this API."""
    name = (error.param or "").split(".")[0]
    message = error.message.replace("response_format", CHAT_FIELDS["response_format"])
    message = re.sub(r"^messages(?=[.:])", CHAT_FIELDS["messages"], message)
    return replace(error, message=message, param=CHAT_FIELDS.get(name, error.param))
