"""The events that an answer with tool calls is made of, and what a family of models must say of how it writes them."""

import secrets
from dataclasses import dataclass
from typing import Protocol, TypeAlias

NAME = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,128}$"
"""What may be a function's name, whether a client has defined it or a model has made it up."""


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


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
