"""Tools: what a client may offer, demand, and tell of calls that were made. Types that check it.

Nothing here reads a definition's meaning beyond what must hold for it to be shown to the model; a grammar made from it
is somebody else's work.
"""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from server.fields import Body, Flag
from server.schema_check import MAX_DEPTH, bound
from server.schema_rewrite import tidied
from server.schema_walk import values

NAME = "^[a-zA-Z0-9_-]{1,64}$"
MAX_TOOLS = 128  # as in OpenAI's API; also the most calls one turn of the history may hold
Name = Annotated[str, Field(strict=True, pattern=NAME)]
CallId = Annotated[str, Field(strict=True)]


def _tools(tools: Any) -> Any:
    """Bounded before anything looks at them in detail, which takes longer."""
    listed = tools if isinstance(tools, list) else []
    bound([tool.model_dump() if isinstance(tool, BaseModel) else tool for tool in listed])
    return tools


def _parameters(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema of an object, with the types that JSON has where the author used other names."""
    bound(schema)
    read: dict[str, Any] = tidied(schema)
    kind = read.get("type", "object")
    if "object" not in (kind if isinstance(kind, list) else [kind]):
        raise ValueError("a tool's parameters must be of type object")
    return read if kind == "object" else read | {"type": "object"}


class Function(Body):
    """What a tool is called, does and takes. `strict` asks for calls that always fit `parameters`."""

    name: Name
    description: Annotated[str, Field(strict=True)] | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_parameters)] | None = None
    strict: Flag | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """What the model is shown."""
        function = self.function
        shown = {"name": function.name, "description": function.description, "parameters": function.parameters}
        return {"type": "function", "function": {key: value for key, value in shown.items() if value is not None}}


class ChosenFunction(Body):
    name: Name


class NamedChoice(Body):
    """`tool_choice` as an object: this very function must be called."""

    type: Literal["function"]
    function: ChosenFunction


def _choice(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError:
        raise ValueError('must be "none", "auto", "required", or an object that names one function') from None


ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedChoice, WrapValidator(_choice)]


class ToolUse(Body):
    """The fields of a request that offer tools: the request's own type inherits from this one.

    `tools: []` means no tools whatever the choice is, because clients send both by default.
    """

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True), BeforeValidator(_tools)] | None = None
    tool_choice: ToolChoice | None = None

    @model_validator(mode="after")
    def _choice_can_be_met(self) -> Self:
        if self.tools is None and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("the field tool_choice asks for a call, but there is no field tools")
        if self.tools and isinstance(self.tool_choice, NamedChoice):
            name = self.tool_choice.function.name
            if all(tool.function.name != name for tool in self.tools):
                raise ValueError(f"the field tool_choice names {name}, which is not one of the tools")
        return self

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that the model is shown and may call."""
        return () if self.tool_choice == "none" else tuple(self.tools or ())

    @property
    def demanded(self) -> tuple[Tool, ...]:
        """The tools one of which must be called; none if the model is free to answer in words."""
        match self.tool_choice:
            case NamedChoice():
                return tuple(tool for tool in self.offered if tool.function.name == self.tool_choice.function.name)
            case "required":
                return self.offered
            case _:
                return ()


def _arguments_text(value: Any) -> Any:
    """Arguments as JSON text; some clients send the object itself."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


class CalledFunction(Body):
    """A function and its arguments as JSON text, or as whatever the model wrote in their place."""

    name: Name
    arguments: Annotated[str, Field(strict=True), BeforeValidator(_arguments_text)] = ""


class ToolCall(Body):
    """A call that an earlier answer made. Older clients give it no id."""

    id: CallId = ""
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """The call with its arguments as the object that templates want, or as they are if they are no such text."""
        function = {"name": self.function.name, "arguments": _arguments(self.function.arguments)}
        return {"id": self.id, "type": "function", "function": function}


def _arguments(text: str) -> dict[str, Any] | str:
    if not text.strip():
        return {}
    try:
        value = json.loads(text, parse_constant=_refuse)
        # Neither a lone surrogate nor a number beyond all floats can be shown to a model.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return text
    # What is nested deeper could be too deep for the template's own encoder.
    shown = isinstance(value, dict) and all(depth <= MAX_DEPTH for depth, _, _ in values(value))
    return value if shown else text


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


class ToolTurn(Body):
    """The fields of a message about tools: the message's own type inherits from this one."""

    role: str
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_call_id: CallId | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only a message of the role assistant may have tool_calls")
        return self

    def tool_fields(self) -> dict[str, Any]:
        """What the template is given besides role and content."""
        fields: dict[str, Any] = {}
        if self.tool_calls:
            fields["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.role == "tool" and self.tool_call_id is not None:
            fields["tool_call_id"] = self.tool_call_id
        return fields
