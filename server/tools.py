"""Tools: what a client may offer, demand, and tell of calls that were made. Types that check it.

Nothing here reads a definition's meaning beyond what must hold for it to be shown to the model; a grammar made from it
is somebody else's work.
"""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from server.fields import Body, Flag
from server.tool_format import NAME

MAX_TOOLS = 128  # as in OpenAI's API
MAX_CALLS = 4096  # in one turn of the history; more than an answer can make
MAX_TOOLS_LENGTH = 2**18  # characters of JSON; more than most context windows can hold
MAX_SCHEMA_LENGTH = 2**16  # of one tool's parameters
MAX_SCHEMA_DEPTH = 32  # nested objects and arrays; OpenAI allows ten levels of properties, two of these each
SCHEMA_TYPES = frozenset(["string", "number", "integer", "boolean", "object", "array", "null"])
# The keywords of JSON Schema 2020-12 and draft 7 that hold schemas: by name, or alone or in a list.
SCHEMAS_BY_NAME = frozenset(["properties", "patternProperties", "dependentSchemas", "$defs", "definitions"])
SCHEMAS = (
    frozenset(["items", "prefixItems", "contains", "additionalItems", "unevaluatedItems"])
    | frozenset(["additionalProperties", "unevaluatedProperties", "propertyNames"])
    | frozenset(["allOf", "anyOf", "oneOf", "not", "if", "then", "else"])
)

Name = Annotated[str, Field(strict=True, pattern=NAME)]
CallId = Annotated[str, Field(strict=True)]


def _depth(value: Any) -> int:
    """How deeply objects and arrays are nested, 0 for anything else. A level at a time, so that nothing is too deep."""
    depth = 0
    level = [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def _check_keywords(schema: dict[str, Any]) -> None:
    """Raises ValueError where this schema, or one in it, has a type or pattern that cannot be."""
    schemas = [schema]
    while schemas:
        for keyword, value in schemas.pop().items():
            if keyword in SCHEMAS_BY_NAME and isinstance(value, dict):
                schemas += [inner for inner in value.values() if isinstance(inner, dict)]
            elif keyword in SCHEMAS:
                listed = value if isinstance(value, list) else [value]
                schemas += [inner for inner in listed if isinstance(inner, dict)]
            elif keyword == "type":
                kinds = value if isinstance(value, list) else [value]
                if not all(isinstance(kind, str) and kind in SCHEMA_TYPES for kind in kinds):
                    raise ValueError("a schema names a type that JSON Schema does not have")
            elif keyword == "pattern" and not isinstance(value, str):
                # Whether it is a valid expression is for those to find who compile it, with a time limit.
                raise ValueError("a schema's pattern must be a string")


def _length(value: Any) -> int:
    """Characters of a value, or of types like those here, as JSON. Raises ValueError if it cannot be written so."""
    try:
        return len(json.dumps(value, ensure_ascii=False, allow_nan=False, default=dict))
    except ValueError:
        raise ValueError("a definition may hold only numbers that JSON has a form for") from None


def _tools(tools: Any) -> Any:
    """Bounded before anything looks at them in detail, which takes longer."""
    if _length(tools) > MAX_TOOLS_LENGTH:
        raise ValueError(f"all definitions together may be at most {MAX_TOOLS_LENGTH // 1024} KiB long")
    return tools


def _parameters(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema that is bounded, can be written as JSON, and describes an object of known types."""
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise ValueError(f"a schema may be nested at most {MAX_SCHEMA_DEPTH} levels deep")
    if _length(schema) > MAX_SCHEMA_LENGTH:
        raise ValueError(f"a schema may be at most {MAX_SCHEMA_LENGTH // 1024} KiB long")
    if schema.get("type", "object") != "object":
        raise ValueError("a tool's parameters must be of type object")
    _check_keywords(schema)
    return schema


class Function(Body):
    """What a tool is called, does and takes. `strict` asks for calls that always fit `parameters`."""

    name: Name
    description: Annotated[str, Field(strict=True)] | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_parameters)] | None = None
    strict: Flag | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: Function

    def for_template(self) -> dict[str, Any]:
        """What the model is shown."""
        function = self.function
        shown = {"name": function.name, "description": function.description, "parameters": function.parameters}
        return {"type": "function", "function": {key: value for key, value in shown.items() if value is not None}}


class OtherTool(Body):
    """One that is no function, such as a web search, which a service would have to do itself. The model is not told."""

    type: Annotated[str, Field(strict=True, json_schema_extra={"not": {"const": "function"}})]


def is_other(tool: Any) -> bool:
    kind = tool.get("type") if isinstance(tool, dict) else None
    return isinstance(kind, str) and kind != "function"


def _tool(value: Any) -> Any:
    """By its type and no other sign, so that what is wrong with a function is told as such."""
    return (OtherTool if is_other(value) else Tool).model_validate(value)


AnyTool = Annotated[Tool | OtherTool, PlainValidator(_tool, json_schema_input_type=Tool | OtherTool)]


class ChosenFunction(Body):
    name: Name


class NamedChoice(Body):
    """`tool_choice` as an object: this very function must be called."""

    type: Literal["function"] = "function"
    function: ChosenFunction


def _functions(tools: Any) -> Any:
    return [tool for tool in tools if not is_other(tool)] if isinstance(tools, list) else tools


class AllowedTools(Body):
    mode: Literal["auto", "required"] = "auto"
    tools: Annotated[list[NamedChoice], Field(max_length=MAX_TOOLS, fail_fast=True), BeforeValidator(_functions)]


class AllowedChoice(Body):
    """`tool_choice` as an object: as if there were no tools but these."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
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
    return value if isinstance(value, dict) and _depth(value) <= MAX_SCHEMA_DEPTH else text


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

    def tool_fields(self) -> dict[str, Any]:
        """What the template is given besides role and content."""
        fields: dict[str, Any] = {}
        if self.tool_calls:
            fields["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.role == "tool" and self.tool_call_id is not None:
            fields["tool_call_id"] = self.tool_call_id
        return fields
