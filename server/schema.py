"""What a client may send, as types that check it. A field that is not here is refused by name, never ignored."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from server.errors import ApiError, bad_request

MAX_STOPS = 4
MAX_STOP_LENGTH = 256  # characters; each piece of an answer is searched for each stop string
GREEDY_BELOW = 0.01  # a smaller temperature only adds rounding noise to the choice of the largest logit

Int64 = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
Tokens = Annotated[int, Field(strict=True, ge=1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _text(content: Any) -> Any:
    """Content as one string: text parts are joined, no content is empty, anything else is refused by its type."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return content
    return "".join(map(_part, content))


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else None
        known = kind if isinstance(kind, str) and re.fullmatch(r"[a-z_]{1,30}", kind) else "other"
        raise ValueError(f"this model reads text only, but a part of type {known} was sent")
    if not isinstance(part.get("text"), str):
        raise ValueError("a text part needs a string in its field text")
    return str(part["text"])


Content = Annotated[str, BeforeValidator(_text)]


class Message(Body):
    """One turn. `name` and `tool_calls: []` are accepted because clients send them; templates may use `name`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content = ""
    name: str | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def for_template(self) -> dict[str, str]:
        role = "system" if self.role == "developer" else self.role
        named = {"name": self.name} if self.name else {}
        return {"role": role, "content": self.content, **named}


class StreamOptions(Body):
    include_usage: Flag = False


class TemplateOptions(Body):
    """The only variables of a chat template that a request may set."""

    enable_thinking: Flag | None = None


class Thinking(Body):
    type: Literal["enabled", "disabled"]


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ChatRequest(Body):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=2048)]
    model: str | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(strict=True, ge=-1, lt=2**31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    seed: Int64 | None = None
    stop: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
            BeforeValidator(_stops),
            Field(max_length=MAX_STOPS),
        ]
        | None
    ) = None
    do_sample: Flag | None = None
    ignore_eos: Flag | None = None
    enable_thinking: Flag | None = None
    chat_template_kwargs: TemplateOptions | None = None
    thinking: Thinking | None = None
    user: str | None = None
    # Of these only the value that asks for nothing is supported; clients send it by default.
    n: Annotated[int, Field(strict=True, ge=1, le=1)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    logprobs: Literal[False] | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("the field stream_options may only be set when stream is true")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """The answer's length that was asked for. The newer name wins."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def greedy(self) -> bool:
        low = self.temperature is not None and self.temperature < GREEDY_BELOW
        return low or self.top_p == 0 or self.do_sample is False

    @property
    def thinks(self) -> bool | None:
        """Whether the request turns thinking on or off, in any of the three spellings; None if in none."""
        if self.enable_thinking is not None:
            return self.enable_thinking
        if self.chat_template_kwargs is not None and self.chat_template_kwargs.enable_thinking is not None:
            return self.chat_template_kwargs.enable_thinking
        return self.thinking.type == "enabled" if self.thinking else None


def parse(body: bytes) -> ChatRequest:
    """The request in a body of JSON. Raises `ApiError` 400 that names the first field at fault."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise explain(error) from None


def explain(error: ValidationError) -> ApiError:
    """One sentence about the first thing that is wrong. Never repeats a value that was sent."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        reason = message.removeprefix("Invalid JSON: ").split(" at line")[0]
        return bad_request(f"The body is not valid JSON: {reason}.", code="invalid_json")
    param = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        # The client's own name for a field is repeated only where it is fit for a log and a terminal.
        shown = param if re.fullmatch(r"[\w.]{1,80}", param, re.ASCII) else None
        return bad_request(f"The field {shown or 'of that name'} is not supported.", shown, "unsupported_field")
    if not param:
        return bad_request(f"{message[:1].upper()}{message[1:]}.")
    return bad_request(f"{param}: {message[:1].lower()}{message[1:]}.", param)
