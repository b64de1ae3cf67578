"""The events of an answer with tool calls, and the interface of a model family's tool call format."""

import re
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, NotRequired, Protocol, TypeAlias, TypedDict, TypeVar

NAME = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,130}$"
"""Valid function names, whether defined by a client or made up by a model: two of the longest that OpenAI allows, 64
characters, and what joins them."""

UNQUOTABLE = re.compile(r'["\\<>\[\]{}|]')


# A conversation as chat templates read it


class ShownFunction(TypedDict):
    name: str
    description: NotRequired[str]
    parameters: NotRequired[dict[str, Any]]


class ShownTool(TypedDict):
    type: Literal["function"]
    function: ShownFunction


class ShownArguments(TypedDict):
    name: str
    arguments: object
    """An object, or the text that came instead of one."""


class ShownCall(TypedDict):
    id: str
    type: Literal["function"]
    function: ShownArguments


class TurnExtras(TypedDict, total=False):
    name: str
    reasoning_content: str
    tool_calls: list[ShownCall]
    tool_call_id: str


class Turn(TurnExtras):
    role: str
    content: str


# An answer with calls


@dataclass(frozen=True, slots=True)
class Content:
    """Text that is not part of a call; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """The start of the call with this `index` (from 0) in the answer. It is never retracted.

    The client decides whether a function of that name exists.
    """

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A fragment of a call's arguments; all fragments together are one object's JSON text, as the model wrote it."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The call's arguments are complete. A call without this event was cut off or is malformed."""

    index: int


ToolEvent: TypeAlias = Content | CallStarted | CallArguments | CallEnded


class ToolParser(Protocol):
    """Parses one answer. Apart from the size of fragments, the result does not depend on how the text was split."""

    @property
    def held(self) -> int:
        """Bytes of text held back, of which nothing may be an event yet."""
        ...

    def push(self, text: str) -> tuple[ToolEvent, ...]: ...
    def flush(self) -> tuple[ToolEvent, ...]: ...


class ToolFormat(Protocol):
    """How one family of models writes its calls. To add a family, add a file and an entry in `FORMATS`."""

    @property
    def separator(self) -> str:
        """The text between two calls of one answer."""
        ...

    @property
    def tags(self) -> frozenset[str]:
        """Tokens around parts of a turn, which the data inside such a part must not contain."""
        ...

    def fits(self, template: str) -> bool:
        """Whether a chat template instructs its model to write calls this way."""
        ...

    def carries(self, name: str) -> bool:
        """Whether prompts and calls can contain this function name verbatim.

        If this holds for each character, it must hold for names of up to 64 of them with digits at the end.
        """
        ...

    def parser(self) -> ToolParser:
        """A new parser for one answer that may have calls."""
        ...

    def around(self, name: str) -> tuple[str, str]:
        """The text before and after the arguments' JSON in a call of this name, as a grammar enforces it."""
        ...

    def turns(self, messages: Sequence[Turn]) -> list[Turn]:
        """The conversation as turns that a template of this format accepts."""
        ...


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def quotable(name: str) -> bool:
    """Whether a name needs no escaping in a JSON string and cannot be part of one of a model's special tokens."""
    return not UNQUOTABLE.search(name)


MAX_STEM = 48  # characters kept of a name that has to be replaced

Named = TypeVar("Named", ShownTool, ShownCall)


class ToolNames:
    """The function names of one request and the names that the model sees.

    They are equal where the model's format can carry the name (`ToolFormat.carries`), otherwise similar. The mapping is
    one-to-one, and the same names in the same order always map to the same names.
    """

    def __init__(self, names: Iterable[str], carries: Callable[[str], bool]) -> None:
        given = dict.fromkeys(names)
        numbers = defaultdict[str, Iterator[int]](lambda: count(1))  # for names with the same stem
        self._shown = {name: name for name in given if carries(name)}
        self._meant = dict(self._shown)
        for name in given:
            if name not in self._shown:
                stem = "".join(char if carries(char) else "_" for char in name[:MAX_STEM])
                shown = next(other for n in numbers[stem] if (other := f"{stem}_{n}") not in self._meant)
                self._shown[name] = shown
                self._meant[shown] = name

    def shown(self, name: str) -> str:
        """The name that the model sees for this function; one that the request does not mention is left as it is."""
        return self._shown.get(name, name)

    def meant(self, name: str) -> str:
        """The function that the model means; a name that it made up is left as it is."""
        return self._meant.get(name, name)

    def in_tool(self, tool: Named) -> Named:
        """A definition for a template, with the name that the model sees."""
        renamed = tool.copy()
        renamed["function"] = tool["function"].copy()
        renamed["function"]["name"] = self.shown(tool["function"]["name"])
        return renamed

    def in_turn(self, turn: Turn) -> Turn:
        """A message for a template, with the names that the model sees in its calls or its tool result."""
        if "tool_calls" in turn:
            return {**turn, "tool_calls": [self.in_tool(call) for call in turn["tool_calls"]]}
        if turn["role"] == "tool" and "name" in turn:
            return {**turn, "name": self.shown(turn["name"])}
        return turn
