"""The events that an answer with tool calls is made of, and what a family of models must say of how it writes them."""

import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count, groupby
from typing import Literal, NotRequired, Protocol, TypeAlias, TypedDict, TypeVar

from server.fields import Schema

NAME = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,128}$"
"""What may be a function's name, whether a client has defined it or a model has made it up."""

UNQUOTABLE = re.compile(r'["\\<>\[\]{}|]')


# A conversation as chat templates read it


class ShownFunction(TypedDict):
    name: str
    description: NotRequired[str]
    parameters: NotRequired[Schema]


class ShownTool(TypedDict):
    type: Literal["function"]
    function: ShownFunction


class ShownArguments(TypedDict):
    name: str
    arguments: object
    """An object, or the text that came in its place."""


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
    """A call, the `index`-th of the answer from 0. It is never taken back.

    Whether there is a function of that name is for the client to say.
    """

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A fragment of a call's arguments; together they are the JSON text of one object, as the model wrote it."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The call's arguments are complete. A call without this event was cut off or broken."""

    index: int


ToolEvent: TypeAlias = Content | CallStarted | CallArguments | CallEnded


class ToolParser(Protocol):
    """Reads one answer. What it returns does not depend on how the text was cut, but for the size of fragments."""

    def push(self, text: str) -> tuple[ToolEvent, ...]: ...
    def flush(self) -> tuple[ToolEvent, ...]: ...


class ToolFormat(Protocol):
    """How one family of models writes its calls. Another family's is a file of its own and an entry in `FORMATS`."""

    @property
    def separator(self) -> str:
        """What stands between two calls of one answer."""
        ...

    @property
    def tags(self) -> frozenset[str]:
        """Tokens around parts of a turn, which data inside of such a part must not hold."""
        ...

    def fits(self, template: str) -> bool:
        """Whether a chat template tells its model to write calls this way."""
        ...

    def carries(self, name: str) -> bool:
        """Whether prompts and calls can hold this name of a function as it is.

        If it is true of each character, it is true of their names of up to 64, with digits at the end.
        """
        ...

    def parser(self) -> ToolParser:
        """A parser for one answer that may have calls."""
        ...

    def around(self, name: str) -> tuple[str, str]:
        """What a call of a name that it carries has before and after its arguments' JSON: what a grammar enforces."""
        ...

    def turns(self, messages: Sequence[Turn]) -> list[Turn]:
        """The conversation in turns that a template of this format takes."""
        ...


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def quotable(name: str) -> bool:
    """Whether a name stands in a JSON string as it is, and cannot be part of one of a model's own tokens."""
    return not UNQUOTABLE.search(name)


def joined(events: Sequence[ToolEvent]) -> tuple[ToolEvent, ...]:
    """The events with those of adjacent text as one. No two adjacent fragments are of different calls."""
    return tuple(_as_one(list(group)) for _, group in groupby(events, type))


def _as_one(events: list[ToolEvent]) -> ToolEvent:
    first = events[0]
    if len(events) == 1 or not isinstance(first, Content | CallArguments):
        return first
    return replace(first, text="".join(event.text for event in events if isinstance(event, type(first))))


MAX_STEM = 48  # characters kept of a name that has to be another one

Named = TypeVar("Named", ShownTool, ShownCall)


class ToolNames:
    """The names of one request, each with the one that its model knows the function by.

    That is the same name wherever the model's format carries it (`ToolFormat.carries`), else one like it. No two names
    are known as one, and the same names in the same order are always known by the same ones.
    """

    def __init__(self, names: Iterable[str], carries: Callable[[str], bool]) -> None:
        given = dict.fromkeys(names)
        self._shown = {name: name for name in given if carries(name)}
        self._meant = dict(self._shown)
        for name in given:
            if name not in self._shown:
                self._shown[name] = shown = self._like(name, carries)
                self._meant[shown] = name

    def _like(self, name: str, carries: Callable[[str], bool]) -> str:
        stem = "".join(char if carries(char) else "_" for char in name[:MAX_STEM])
        return next(other for n in count(1) if (other := f"{stem}_{n}") not in self._meant)

    def shown(self, name: str) -> str:
        """What the model is shown for one of the names."""
        return self._shown[name]

    def meant(self, name: str) -> str:
        """Which function the model means; a name that it made up is left as it is."""
        return self._meant.get(name, name)

    def in_tool(self, tool: Named) -> Named:
        """A definition for a template, with the name that the model is shown."""
        renamed = tool.copy()
        renamed["function"] = tool["function"].copy()
        renamed["function"]["name"] = self._known(tool["function"]["name"])
        return renamed

    def in_turn(self, turn: Turn) -> Turn:
        """A message for a template, with the names that the model is shown in its calls, or of the call it answers."""
        if "tool_calls" in turn:
            return {**turn, "tool_calls": [self.in_tool(call) for call in turn["tool_calls"]]}
        if turn["role"] == "tool" and "name" in turn:
            return {**turn, "name": self._known(turn["name"])}
        return turn

    def _known(self, name: str) -> str:
        return self._shown.get(name, name)
