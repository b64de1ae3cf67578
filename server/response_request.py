"""What `POST /v1/responses` takes, and how chat completions would say it."""

from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, ValidationError, model_validator

from server.errors import ApiError
from server.fields import Body, Flag, Number, RequestBody, Tokens
from server.messages import MAX_MESSAGES, Content
from server.response_events import Json
from server.schema import ChatRequest, JsonSchema, ResponseFormat, explain
from server.tools import MAX_TOOLS, CallId, ChosenFunction, Function, Name, Tool, ToolChoice

CHAT_FIELDS = {"messages": "input", "response_format": "text.format"}
"""What the fields of a chat request are called here."""


def only(*allowed: Any) -> BeforeValidator:
    """A field that has one meaning here, so that only the values that ask for it are taken."""

    def check(value: Any) -> Any:
        if value not in allowed:
            raise ValueError("stored state is not kept here, and the field input must hold the whole conversation")
        return value

    return BeforeValidator(check)


Unstored = Annotated[None, only(None)]


def _parts(content: Any) -> Any:
    """Parts under the names that chat completions give them."""
    if not isinstance(content, list):
        return content
    return [{"type": "text", "text": part.get("text")} if _is_text(part) else part for part in content]


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("input_text", "output_text")


Parts = Annotated[Content, BeforeValidator(_parts, json_schema_input_type=str | list[dict[str, Any]])]


class Item(Body):
    """What every item may have. Clients send items of an answer back as they got them."""

    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class MessageItem(Item):
    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(Item):
    type: Literal["function_call"]
    call_id: CallId
    name: Name
    arguments: Annotated[str, Field(strict=True)]


class CallOutputItem(Item):
    type: Literal["function_call_output"]
    call_id: CallId
    output: Parts


class ReasoningItem(Item):
    """Accepted and dropped: models are not shown what they thought in earlier turns."""

    type: Literal["reasoning"]
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: str | None = None


def _typed(value: Any) -> Any:
    """Checked here because pydantic's own sentence repeats a type that is not a string."""
    if isinstance(value, dict) and not isinstance(value.get("type"), str):
        raise ValueError("the field type must be a string")
    return value


AnyItem = Annotated[
    MessageItem | CallItem | CallOutputItem | ReasoningItem,
    Discriminator(
        "type",
        custom_error_type="item_type",
        custom_error_message="must be a message, function_call, function_call_output or reasoning",
    ),
    BeforeValidator(_typed),
]


def _items(value: Any) -> Any:
    """A list of items, each with its type and without nulls, which SDKs add to what they send back."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    return [_item(item) if isinstance(item, dict) else item for item in value] if isinstance(value, list) else value


def _item(item: Json) -> Json:
    kept = {key: value for key, value in item.items() if value is not None}
    kind = kept.setdefault("type", "message" if "role" in kept else "item_reference")
    if kind == "item_reference":
        raise ValueError("an item_reference names an item that was stored, but stored state is not kept here")
    return kept


# One less than the messages of a chat: the instructions are one, too.
Items = Annotated[list[AnyItem], Field(min_length=1, max_length=MAX_MESSAGES - 1)]


class FlatTool(Function):
    type: Literal["function"]


class FlatChoice(ChosenFunction):
    type: Literal["function"]


class FlatAllowed(Body):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"] = "auto"
    tools: list[FlatChoice]


def _choice(value: Any) -> Any:
    """A choice of functions as chat completions write it."""
    if not isinstance(value, dict):
        return value
    if value.get("type") == "allowed_tools" and isinstance(value.get("tools"), list):
        return {"type": "allowed_tools", "allowed_tools": value | {"tools": [_choice(tool) for tool in value["tools"]]}}
    return {"type": value.get("type"), "function": {key: value[key] for key in value if key != "type"}}


class PlainFormat(Body):
    type: Literal["text", "json_object"]


class SchemaFormat(JsonSchema):
    type: Literal["json_schema"]


Format = Annotated[
    PlainFormat | SchemaFormat,
    Discriminator(
        "type", custom_error_type="format_type", custom_error_message="must be of type text, json_object or json_schema"
    ),
    BeforeValidator(_typed),
]


class TextConfig(Body):
    format: Format = PlainFormat(type="text")
    verbosity: Literal["medium"] | None = None


class ReasoningConfig(Body):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """"none" and "minimal" turn thinking off, the others on."""
    summary: Literal["auto"] | None = None
    """Accepted and without effect: thinking is shown as it is."""


class ResponseRequest(RequestBody):
    """`POST /v1/responses`."""

    model: str | None = None
    input: Annotated[Items, BeforeValidator(_items, json_schema_input_type=str | Items)]
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    stream: Flag | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: (
        Annotated[
            ToolChoice,
            BeforeValidator(
                _choice, json_schema_input_type=Literal["none", "auto", "required"] | FlatChoice | FlatAllowed
            ),
        ]
        | None
    ) = None
    parallel_tool_calls: Flag | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=0)] | None = None
    truncation: Annotated[Literal["disabled"] | None, only("disabled", None)] = None
    background: Annotated[Flag | None, only(False, None)] = None
    include: Annotated[list[str] | None, only([], None)] = None
    previous_response_id: Unstored = None
    conversation: Unstored = None
    prompt: Unstored = None
    metadata: dict[str, str] | None = None
    """Accepted and told in the answer, like the rest below."""
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    store: Flag | None = None
    """Accepted, but nothing is stored, and the answer says false."""

    @property
    def form(self) -> PlainFormat | SchemaFormat:
        return PlainFormat(type="text") if self.text is None else self.text.format

    @model_validator(mode="after")
    def _form_is_one(self) -> Self:
        demanded = bool(self.tools) and self.tool_choice not in (None, "none", "auto")
        if demanded and self.form.type != "text":
            raise ValueError("an answer cannot be a demanded tool call and of a text.format at once")
        return self


class ResponseChat(ChatRequest):
    """What `as_chat` makes of a request. Agents use this API, and go wrong with half an answer."""

    @property
    def useless_if_cut(self) -> bool:
        return True


def as_chat(asked: ResponseRequest) -> ChatRequest:
    """The same request to chat completions. Raises `ApiError` 400 in that one's words."""
    schema = asked.form if isinstance(asked.form, SchemaFormat) else None
    tools = None if asked.tools is None else [Tool(type="function", function=tool) for tool in asked.tools]
    fields: Json = {
        "messages": turns(asked),
        "max_completion_tokens": asked.max_output_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "tools": tools,
        "tool_choice": asked.tool_choice,
        "parallel_tool_calls": asked.parallel_tool_calls,
        "response_format": ResponseFormat(type=asked.form.type, json_schema=schema),
        "reasoning_effort": asked.reasoning and asked.reasoning.effort,
    }
    try:
        return ResponseChat(**fields)
    except ValidationError as error:
        raise explain(error) from None


def turns(asked: ResponseRequest) -> list[Json]:
    """The messages of a chat. Calls are part of the assistant's turn before them."""
    found: list[Json] = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    for item in asked.input:
        match item:
            case MessageItem():
                found.append({"role": item.role, "content": item.content})
            case CallItem():
                if not found or found[-1]["role"] != "assistant":
                    found.append({"role": "assistant"})
                call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
                found[-1].setdefault("tool_calls", []).append(call)
            case CallOutputItem():
                found.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
    return found


def renamed(error: ApiError) -> ApiError:
    """An error about a chat request, with the field at fault as it is called here."""
    name = (error.param or "").split(".")[0]
    return replace(error, param=CHAT_FIELDS.get(name, error.param))
