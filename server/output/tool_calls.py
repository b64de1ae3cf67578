"""The events of an answer with tool calls, and the interface of a model family's tool call format."""

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, Protocol, TypeAlias, TypedDict

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
