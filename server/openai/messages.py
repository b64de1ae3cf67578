"""The turns of a conversation as clients send them and as chat templates read them, and how its prompt ends.

Clients send back earlier answers, from this service or another, often with fields of their own.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from server.fields import Body, Flag, Tokens
from server.grammar.json_schema import MAX_DEPTH, values
from server.model.text import Text
from server.openai.tools import Name, Tool, ToolUse
from server.output.tool_calls import ShownArguments, ShownCall, Turn, quotable

MAX_MESSAGES = 2048
MAX_CALLS = 4096  # in one turn; more than an answer can make
THOUGHTS = frozenset(["thinking", "redacted_thinking", "reasoning"])
"""Part types that hold reasoning, which is not content."""


def _text(content: object) -> object:
    """Content as one string: text parts are joined, missing content is empty, other part types are refused."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return content
    return "".join(map(text_of, content))


def text_of(part: object) -> str:
    """The text of a part. Raises ValueError if it is of another type."""
    if isinstance(part, str):
        return part
    fields = part if isinstance(part, dict) else {}
    kind = fields.get("type")
    if kind in ("text", "input_text", "output_text"):
        return _string(fields, "text")
    if kind == "refusal":
        return _string(fields, "refusal")
    if isinstance(kind, str) and kind in THOUGHTS:
        return ""
    known = kind if isinstance(kind, str) and re.fullmatch(r"[a-z_]{1,30}", kind) else "other"
    raise ValueError(f"this model only reads text, but the message has a part of type {known}")


def _string(part: dict[str, object], key: str) -> str:
    if not isinstance(part.get(key), str):
        raise ValueError(f"a part of type {part['type']} needs a string in its field {key}")
    return str(part[key])


class TextPart(BaseModel):
    """A part's required fields, for /openapi.json; its other keys are ignored."""

    type: Literal["text"]
    text: str


def _string_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


Content = Annotated[str, BeforeValidator(_text, json_schema_input_type=str | list[str | TextPart] | None)]
Thought = Annotated[str | None, BeforeValidator(_string_or_none, json_schema_input_type=object)]
"""Other servers put objects here, which no template reads; they count as null."""


CallId = Annotated[str, Field(strict=True)]


def _arguments_text(value: object) -> object:
    """Arguments as JSON text; some clients send the object itself."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


class CalledFunction(Body):
    """A function and its arguments as JSON text, or whatever text the model wrote instead."""

    name: Name
    arguments: Annotated[str, Field(strict=True), BeforeValidator(_arguments_text)] = ""


class ToolCall(Body):
    """A call from an earlier answer. Older clients send no id."""

    id: CallId = ""
    type: Literal["function"] = "function"
    function: CalledFunction

    @classmethod
    def _prepared(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Accept a call of a tool of another service that takes free text."""
        match fields:
            case {"type": "custom", "custom": {"name": name, "input": text}, **rest}:
                return rest | {"function": {"name": name, "arguments": {"input": text}}}
        return fields

    def for_template(self, shown: Callable[[str], str]) -> ShownCall:
        """The call with its arguments parsed into an object for the template, or as they are if that fails."""
        called: ShownArguments = {
            "name": shown(self.function.name),
            "arguments": _arguments(self.function.arguments),
        }
        return {"id": self.id, "type": "function", "function": called}


def _arguments(text: str) -> object:
    if not text.strip():
        return {}
    try:
        value = json.loads(text, parse_constant=_refuse)
        # Lone surrogates and numbers beyond the range of floats cannot be shown to a model.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return text
    # Deeper nesting could overflow the template's JSON encoder.
    shown = isinstance(value, dict) and all(depth <= MAX_DEPTH for depth, _, _ in values(value))
    return value if shown else text


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not valid JSON")


class Message(Body):
    """One turn. Templates may use `name`."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_call_id: CallId | None = None
    content: Content = ""
    name: str | None = None
    reasoning_content: Thought = None

    @classmethod
    def _prepared(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Accepts other spellings of a turn: `reasoning`, a refusal in place of content, `function_call`."""
        if "reasoning_content" not in fields and (thought := thought_of(fields)) is not None:
            fields["reasoning_content"] = thought
        if not fields.get("content") and isinstance(fields.get("refusal"), str):
            fields["content"] = fields["refusal"]
        if isinstance(call := fields.get("function_call"), dict) and not fields.get("tool_calls"):
            fields["tool_calls"] = [{"function": call}]
        return fields

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only a message with the role assistant may have tool_calls")
        return self

    @property
    def functions(self) -> list[str]:
        """The functions that the turn calls, or the one whose result it holds."""
        result_of = [self.name] if self.role in ("tool", "function") and self.name else []
        return [call.function.name for call in self.tool_calls or ()] + result_of

    def for_template(self, shown: Callable[[str], str]) -> Turn:
        """The turn as the chat template gets it, with the names of functions as they are `shown`."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        message: Turn = {"role": role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [call.for_template(shown) for call in self.tool_calls]
        if self.role == "tool" and self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.name:
            message["name"] = shown(self.name) if role == "tool" else self.name
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        return message


def thought_of(turn: dict[str, object]) -> str | None:
    """An assistant turn's reasoning: the text of `reasoning`, or parts of its content."""
    if isinstance(turn.get("reasoning"), str):
        return str(turn["reasoning"])
    parts = turn.get("content")
    if not isinstance(parts, list):
        return None
    texts = [part.get("thinking") for part in parts if isinstance(part, dict) and part.get("type") == "thinking"]
    return "".join(text for text in texts if isinstance(text, str)) or None


class TemplateOptions(Body):
    """The chat template variables that a request may set; `thinking` is an alias of `enable_thinking`."""

    enable_thinking: Flag | None = None
    thinking: Flag | None = None

    @classmethod
    def _prepared(cls, fields: dict[str, Any]) -> dict[str, Any]:
        if "chat_template" in fields or "tokenize" in fields:
            raise ValueError("the model's chat template cannot be replaced")
        return fields

    @property
    def thinks(self) -> bool | None:
        return self.thinking if self.enable_thinking is None else self.enable_thinking


class Thinking(Body):
    """As in Anthropic's API and the Go rewrite of RAGFlow. `budget_tokens` ends the thinking after that many."""

    type: Literal["enabled", "disabled", "adaptive", "auto"]
    budget_tokens: Tokens | None = None

    @property
    def thinks(self) -> bool | None:
        return {"enabled": True, "disabled": False}.get(self.type)


class ThinkingChoice(Body):
    """The fields that turn thinking on or off; request types inherit from this one."""

    enable_thinking: Flag | None = None
    chat_template_kwargs: TemplateOptions | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """"none" and "minimal" turn thinking off, other values on."""

    @property
    def thinks(self) -> bool | None:
        """Whether the request turns thinking on or off, whichever field says so; None if none does."""
        if self.enable_thinking is not None:
            return self.enable_thinking
        for spelled in (self.chat_template_kwargs, self.thinking):
            if spelled is not None and spelled.thinks is not None:
                return spelled.thinks
        return None if self.reasoning_effort is None else self.reasoning_effort not in ("none", "minimal")


class PromptEnd(Body):
    """The fields about how the prompt of a conversation ends; request types inherit from this one."""

    add_generation_prompt: Flag | None = None
    """False: the prompt ends with the last message, and the model continues from there with whatever comes."""
    continue_final_message: Flag | None = None
    """Continue the last message, the assistant's, in place of a new answer. Without this, a new answer follows it."""

    @model_validator(mode="after")
    def _continues_or_begins(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("the fields continue_final_message and add_generation_prompt may not both be true")
        return self


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class Dialogue(ThinkingChoice, ToolUse, PromptEnd):
    """The fields of a conversation beside its messages; request types inherit from this one."""


MAX_STEM = 48  # characters kept of a name that has to be replaced


class ToolNames:
    """The function names of one request and the names that the model sees.

    They are equal where prompts and calls can have the name as it is (`quotable`), otherwise similar. The mapping is
    one-to-one, and the same names in the same order always map to the same names.
    """

    def __init__(self, names: Iterable[str]) -> None:
        given = dict.fromkeys(names)
        numbers = defaultdict[str, Iterator[int]](lambda: count(1))  # for names with the same stem
        self._shown = {name: name for name in given if quotable(name)}
        self._meant = dict(self._shown)
        for name in given:
            if name not in self._shown:
                stem = "".join(char if quotable(char) else "_" for char in name[:MAX_STEM])
                shown = next(other for n in numbers[stem] if (other := f"{stem}_{n}") not in self._meant)
                self._shown[name] = shown
                self._meant[shown] = name

    def shown(self, name: str) -> str:
        """The name that the model sees for this function; one that the request does not mention is left as it is."""
        return self._shown.get(name, name)

    def meant(self, name: str) -> str:
        """The function that the model means; a name that it made up is left as it is."""
        return self._meant.get(name, name)


def names_in(messages: Sequence[Message], offered: Sequence[Tool]) -> ToolNames:
    """The names of all functions that a conversation mentions."""
    called = [name for message in messages for name in message.functions]
    return ToolNames([*(tool.function.name for tool in offered), *called])


def render(
    text: Text,
    messages: Sequence[Message],
    body: Dialogue,
    names: ToolNames,
    thinking: bool,
    continued: str | None = None,
) -> str:
    """The rendered text of a conversation, as `Text.render` says; `thinking` is the default. Raises `ApiError` 400."""
    return text.render(
        [message.for_template(names.shown) for message in messages],
        [tool.for_template(names.shown) for tool in body.offered],
        thinks=thinking if body.thinks is None else body.thinks,
        opens_answer=body.add_generation_prompt is not False,
        continued=continued,
    )
