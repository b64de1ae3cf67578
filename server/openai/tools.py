"""Tools: what a client may offer, demand, and tell of calls that were made. Types that check it.

Nothing here reads a definition's meaning beyond what must hold for it to be shown to the model; a grammar made from it
is somebody else's work.
"""

import json
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from server.fields import Body, Flag, Schema
from server.grammar.json_schema import MAX_DEPTH, bound, values
from server.grammar.rewrite import tidied
from server.output.tool_calls import NAME, ShownArguments, ShownCall, ShownFunction, ShownTool, TurnExtras

MAX_TOOLS = 128  # as in OpenAI's API
MAX_CALLS = 4096  # in one turn of the history; more than an answer can make

Name = Annotated[str, Field(strict=True, pattern=NAME)]
CallId = Annotated[str, Field(strict=True)]


def _tools(tools: object) -> object:
    """Bounded before anything looks at them in detail, which takes longer."""
    listed = tools if isinstance(tools, list) else []
    bound([tool.model_dump() if isinstance(tool, BaseModel) else tool for tool in listed])
    return tools


def _parameters(schema: Schema) -> Schema:
    """A schema of an object, with the types that JSON has where the author used other names."""
    bound(schema)
    read = tidied(schema)
    kind = read.get("type", "object")
    if "object" not in (kind if isinstance(kind, list) else [kind]):
        raise ValueError("a tool's parameters must be of type object")
    return read if kind == "object" else read | {"type": "object"}


class Function(Body):
    """What a tool is called, does and takes. `strict` asks for calls that always fit `parameters`."""

    name: Name
    description: Annotated[str, Field(strict=True)] | None = None
    parameters: Annotated[Schema, AfterValidator(_parameters)] | None = None
    strict: Flag | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: Function

    def for_template(self) -> ShownTool:
        """What the model is shown."""
        shown: ShownFunction = {"name": self.function.name}
        if self.function.description is not None:
            shown["description"] = self.function.description
        if self.function.parameters is not None:
            shown["parameters"] = self.function.parameters
        return {"type": "function", "function": shown}


class OtherTool(Body):
    """One that is no function, such as a web search, which a service would have to do itself. The model is not told."""

    type: Annotated[str, Field(strict=True, json_schema_extra={"not": {"const": "function"}})]


def is_other(tool: object) -> bool:
    kind = tool.get("type") if isinstance(tool, dict) else None
    return isinstance(kind, str) and kind != "function"


def _tool(value: object) -> object:
    """By its type and no other sign, so that what is wrong with a function is told as such."""
    return (OtherTool if is_other(value) else Tool).model_validate(value)


AnyTool = Annotated[Tool | OtherTool, PlainValidator(_tool, json_schema_input_type=Tool | OtherTool)]


class ChosenFunction(Body):
    name: Name


class NamedChoice(Body):
    """`tool_choice` as an object: this very function must be called."""

    type: Literal["function"] = "function"
    function: ChosenFunction


def _functions(tools: object) -> object:
    return [tool for tool in tools if not is_other(tool)] if isinstance(tools, list) else tools


class AllowedTools(Body):
    mode: Literal["auto", "required"] = "auto"
    tools: Annotated[list[NamedChoice], Field(max_length=MAX_TOOLS, fail_fast=True), BeforeValidator(_functions)]


class AllowedChoice(Body):
    """`tool_choice` as an object: as if there were no tools but these."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice(value: object, check: ValidatorFunctionWrapHandler) -> object:
    try:
        return check(value)
    except ValidationError:
        raise ValueError('must be "none", "auto", "required", or an object that names functions') from None


Choice = Literal["none", "auto", "required"] | NamedChoice | AllowedChoice
ToolChoice = Annotated[Choice, WrapValidator(_choice)]


Tools = Annotated[list[AnyTool], Field(max_length=MAX_TOOLS, fail_fast=True), BeforeValidator(_tools)]
Functions = Annotated[list[Function], Field(max_length=MAX_TOOLS, fail_fast=True), BeforeValidator(_tools)]


class ToolUse(Body):
    """The fields of a request that offer tools: the request's own type inherits from this one.

    `tools: []` means no tools whatever the choice is, because clients send both by default.
    """

    tools: Tools | None = None
    """Those that are no functions are not offered to the model."""
    tool_choice: ToolChoice | None = None
    functions: Functions | None = None
    """`tools` in an older form, which is answered in its own: at most one call, as `function_call`."""
    function_call: Literal["none", "auto"] | ChosenFunction | None = None
    """`tool_choice` in that form."""
    parallel_tool_calls: Flag | None = None

    @model_validator(mode="after")
    def _choice_can_be_met(self) -> Self:
        if self.tools and self.functions:
            raise ValueError("tools and functions are the same in a newer and an older form, so send only one of them")
        if self.tools is None and not self.is_legacy and self._must_call:
            raise ValueError("the field tool_choice asks for a call, but there is no field tools")
        if self.functions is None and isinstance(self.function_call, ChosenFunction):
            raise ValueError("the field function_call asks for a call, but there is no field functions")
        if self._all and not self._mentioned <= {tool.function.name for tool in self._all}:
            field = "function_call" if self.is_legacy else "tool_choice"
            raise ValueError(f"the field {field} names a function that is not defined")
        if self.tools and self._must_call and not self.offered:
            raise ValueError("the field tool_choice asks for a call, but there is no function that may be called")
        return self

    @property
    def is_legacy(self) -> bool:
        """Whether the request has `functions`, so that a call is answered as `function_call`."""
        return bool(self.functions) and not self.tools

    @property
    def one_call(self) -> bool:
        """Whether an answer ends with its first call."""
        return self.is_legacy or self.parallel_tool_calls is False

    @property
    def skipped_tools(self) -> tuple[str, ...]:
        """The types of the tools that are no functions, as they are told to the client."""
        return tuple(dict.fromkeys(f"tools.{tool.type}" for tool in self.tools or () if isinstance(tool, OtherTool)))

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that the model is shown and may call."""
        match self._choice:
            case "none":
                return ()
            case AllowedChoice():
                return tuple(tool for tool in self._all if tool.function.name in self._mentioned)
            case _:
                return self._all

    @property
    def demanded(self) -> tuple[Tool, ...]:
        """The tools one of which must be called; none if the model is free to answer in words."""
        if not self._must_call:
            return ()
        return tuple(tool for tool in self.offered if self.named in (None, tool.function.name))

    @property
    def named(self) -> str | None:
        """The one function that must be called, once, if the choice is of one."""
        return self._choice.function.name if isinstance(self._choice, NamedChoice) else None

    @property
    def _mentioned(self) -> set[str]:
        """The functions that the choice names."""
        match self._choice:
            case NamedChoice(function=function):
                return {function.name}
            case AllowedChoice(allowed_tools=allowed):
                return {tool.function.name for tool in allowed.tools}
            case _:
                return set()

    @property
    def _must_call(self) -> bool:
        match self._choice:
            case "required" | NamedChoice():
                return True
            case AllowedChoice(allowed_tools=allowed):
                return allowed.mode == "required"
            case _:
                return False

    @property
    def _all(self) -> tuple[Tool, ...]:
        if self.is_legacy:
            return tuple(Tool(function=function) for function in self.functions or ())
        return tuple(tool for tool in self.tools or () if isinstance(tool, Tool))

    @property
    def _choice(self) -> Choice | None:
        if not self.is_legacy:
            return self.tool_choice
        named = self.function_call
        return NamedChoice(function=named) if isinstance(named, ChosenFunction) else named


def _arguments_text(value: object) -> object:
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

    def for_template(self) -> ShownCall:
        """The call with its arguments as the object that templates want, or as they are if they are no such text."""
        function: ShownArguments = {"name": self.function.name, "arguments": _arguments(self.function.arguments)}
        return {"id": self.id, "type": "function", "function": function}


def _arguments(text: str) -> object:
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
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_call_id: CallId | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only a message of the role assistant may have tool_calls")
        return self

    def tool_fields(self) -> TurnExtras:
        """What the template is given besides role and content."""
        fields: TurnExtras = {}
        if self.tool_calls:
            fields["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.role == "tool" and self.tool_call_id is not None:
            fields["tool_call_id"] = self.tool_call_id
        return fields
