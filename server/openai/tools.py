"""Types for tools: those a client offers, and which of them it requires.

Definitions are only checked as far as needed to show them to the model; `server/grammar` decides what is enforced.
"""

from collections.abc import Callable
from functools import cached_property
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

from server.fields import Body, Flag
from server.grammar.json_schema import Schema, bound
from server.grammar.rewrite import tidied
from server.output.tool_calls import NAME, ShownFunction, ShownTool

MAX_TOOLS = 512  # OpenAI allows 128, but agents offer all tools of several MCP servers
MAX_TOOLS_LENGTH = 2**20  # characters of all tools; those of which a call is demanded must fit a grammar, too

Name = Annotated[str, Field(strict=True, pattern=NAME)]


def _tools(tools: object) -> object:
    """Bounds the number before each is checked in detail, which takes longer."""
    listed = tools if isinstance(tools, list) else []
    bound([tool.model_dump() if isinstance(tool, BaseModel) else tool for tool in listed], length=MAX_TOOLS_LENGTH)
    return tools


def _parameters(schema: Schema) -> Schema:
    """A schema of an object; type names from other languages become JSON's."""
    bound(schema)
    read = tidied(schema)
    kind = read.get("type", "object")
    if "object" not in (kind if isinstance(kind, list) else [kind]):
        raise ValueError("a tool's parameters must be of type object")
    return read if kind == "object" else read | {"type": "object"}


Parameters = Annotated[Schema, AfterValidator(_parameters)]


class Function(Body):
    """A function's name, description and parameters. `strict` makes no difference: a call that is demanded matches
    `parameters` as far as a grammar can say it, and any other is left to the model."""

    name: Name
    description: Annotated[str, Field(strict=True)] | None = None
    parameters: Parameters | None = None
    strict: Flag | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: Function

    def for_template(self, shown: Callable[[str], str]) -> ShownTool:
        """The definition as the chat template gets it, with the function's name as it is `shown`."""
        function: ShownFunction = {"name": shown(self.function.name)}
        if self.function.description is not None:
            function["description"] = self.function.description
        if self.function.parameters is not None:
            function["parameters"] = self.function.parameters
        return {"type": "function", "function": function}


class OtherTool(Body):
    """A tool other than a function, such as web search, which the service would have to run. Hidden from the model."""

    type: Annotated[str, Field(strict=True, json_schema_extra={"not": {"const": "function"}})]


def is_other(tool: object) -> bool:
    kind = tool.get("type") if isinstance(tool, dict) else None
    return isinstance(kind, str) and kind != "function"


def _tool(value: object) -> object:
    """Decides by the type alone, so that errors in a function are reported as errors in a function."""
    return (OtherTool if is_other(value) else Tool).model_validate(value)


AnyTool = Annotated[Tool | OtherTool, PlainValidator(_tool, json_schema_input_type=Tool | OtherTool)]


class ChosenFunction(Body):
    name: Name


class NamedChoice(Body):
    """`tool_choice` as an object: this function must be called."""

    type: Literal["function"] = "function"
    function: ChosenFunction


def _functions(tools: object) -> object:
    return [tool for tool in tools if not is_other(tool)] if isinstance(tools, list) else tools


class AllowedTools(Body):
    mode: Literal["auto", "required"] = "auto"
    tools: Annotated[
        list[NamedChoice],
        Field(max_length=MAX_TOOLS, fail_fast=True),
        BeforeValidator(_functions, json_schema_input_type=list[NamedChoice | OtherTool]),
    ]


class AllowedChoice(Body):
    """`tool_choice` as an object: only these tools may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


WRONG_CHOICE = 'must be "none", "auto", "required" or an object that names functions'


def _choice(value: object, check: ValidatorFunctionWrapHandler) -> object:
    try:
        return check(value)
    except ValidationError:
        raise ValueError(WRONG_CHOICE) from None


Choice = Literal["none", "auto", "required"] | NamedChoice | AllowedChoice
ToolChoice = Annotated[Choice, WrapValidator(_choice)]


Tools = Annotated[list[AnyTool], Field(max_length=MAX_TOOLS, fail_fast=True), BeforeValidator(_tools)]
Functions = Annotated[list[Function], Field(max_length=MAX_TOOLS, fail_fast=True), BeforeValidator(_tools)]


class ToolUse(Body):
    """The fields of a request about tools; request types inherit from this one.

    `tools: []` means no tools whatever `tool_choice` says, because clients send both by default.
    """

    tools: Tools | None = None
    """Tools other than functions are not offered to the model."""
    tool_choice: ToolChoice | None = None
    functions: Functions | None = None
    """The older form of `tools`. The answer has at most one call, as `function_call`."""
    function_call: Literal["none", "auto"] | ChosenFunction | None = None
    """The older form of `tool_choice`."""
    parallel_tool_calls: Flag | None = None

    @model_validator(mode="after")
    def _choice_can_be_met(self) -> Self:
        if self.tools and self.functions:
            raise ValueError("functions is the older form of tools, so send only one of the two")
        (must_call, mentioned), offered = self._rule, self.offered
        if self.tools is None and not self.is_legacy and must_call:
            raise ValueError("the field tool_choice requires a call, but there is no field tools")
        if self.functions is None and isinstance(self.function_call, ChosenFunction):
            raise ValueError("the field function_call requires a call, but there is no field functions")
        if self._all and not mentioned <= {tool.function.name for tool in self._all}:
            field = "function_call" if self.is_legacy else "tool_choice"
            raise ValueError(f"the field {field} names a function that is not defined")
        if self.tools and must_call and not offered:
            raise ValueError("the field tool_choice requires a call, but no function may be called")
        return self

    @property
    def is_legacy(self) -> bool:
        """Whether the request uses `functions`, so that a call is returned as `function_call`."""
        return bool(self.functions) and not self.tools

    @property
    def one_call(self) -> bool:
        """Whether an answer ends after its first call."""
        return self.is_legacy or self.parallel_tool_calls is False

    @property
    def skipped(self) -> tuple[str, ...]:
        """The types of tools that are not offered to the model."""
        return tuple(dict.fromkeys(f"tools.{tool.type}" for tool in self.tools or () if isinstance(tool, OtherTool)))

    @cached_property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that are shown to the model and may be called."""
        if isinstance(self._choice, AllowedChoice):
            _, mentioned = self._rule
            return tuple(tool for tool in self._all if tool.function.name in mentioned)
        return () if self._choice == "none" else self._all

    @cached_property
    def demanded(self) -> tuple[Tool, ...]:
        """The tools of which one must be called; empty if a call is optional."""
        must_call, _ = self._rule
        return tuple(tool for tool in self.offered if self.named in (None, tool.function.name)) if must_call else ()

    @property
    def named(self) -> str | None:
        """The function that must be called, once, if the choice names one."""
        return self._choice.function.name if isinstance(self._choice, NamedChoice) else None

    @property
    def _rule(self) -> tuple[bool, set[str]]:
        """Whether the choice requires a call, and the functions that it names."""
        match self._choice:
            case NamedChoice(function=function):
                return True, {function.name}
            case AllowedChoice(allowed_tools=allowed):
                return allowed.mode == "required", {tool.function.name for tool in allowed.tools}
            case choice:
                return choice == "required", set()

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
