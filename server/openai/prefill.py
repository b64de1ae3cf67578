"""The start of an answer that comes from the client: a last message that the model continues."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from server.http.errors import bad_request
from server.openai.messages import Message
from server.output.message import Event, MessageReader, Reasoning
from server.output.model_format import ModelFormat
from server.output.reasoning import ThoughtState
from server.output.tool_calls import Content

MAX_PREFILL = 2**18
"""Characters of all choices together: each of them parses the prefill."""

MAX_PREFILL_OF_CALLS = 2**15
"""The same with tools: each choice may send the calls that the prefill began, all at once."""

Field: TypeAlias = Literal["content", "reasoning_content"]


@dataclass(frozen=True, slots=True)
class Prefill:
    """The text of the last message, and the field that has it."""

    field: Field
    text: str

    def thought_state(self, format: ModelFormat, rendered: str) -> ThoughtState:
        """The state of the answer's thought after this prefill, with which the `rendered` prompt ends."""
        if format.thinking is None or not self.text.strip():
            return format.thought_after(rendered)
        tags = format.thinking.tags
        opened = self.text.startswith(tags.open) and tags.close not in self.text
        return ThoughtState.OPENED if opened or self.field == "reasoning_content" else ThoughtState.CLOSED


def prefill_of(messages: Sequence[Message], choices: int = 1, *, has_tools: bool = False) -> Prefill:
    """A message that has reasoning and no content yet is continued in its reasoning. Raises `ApiError` 400."""
    last = messages[-1]
    if last.role != "assistant" or last.tool_calls:
        raise bad_request(
            "The field continue_final_message needs a last message of the assistant, without tool_calls.",
            "continue_final_message",
        )
    thinks = last.reasoning_content and not last.content
    prefill = Prefill("reasoning_content", last.reasoning_content or "") if thinks else Prefill("content", last.content)
    most = MAX_PREFILL_OF_CALLS if has_tools else MAX_PREFILL
    if len(prefill.text) * choices > most:
        raise bad_request(
            f"A message to be continued can have at most {most:,} characters, divided by the number of choices; "
            "shorten the last message.",
            "continue_final_message",
        )
    return prefill


class Begun:
    """The start of an answer: `reader` has read the prefill, whose text is removed from the answer's events.

    A call that the prefill began is kept, so that the client gets it as a whole.
    """

    def __init__(self, reader: MessageReader, events: Iterable[Event], known: Iterable[Event]) -> None:
        """`events` are those that the reader has returned; `known` those of the prefill as if it were all."""
        self.reader = reader
        self._events = list(events)
        sent = list(known)
        self._reasoning = sum(len(event.text) for event in sent if isinstance(event, Reasoning))
        self._content = sum(len(event.text) for event in sent if isinstance(event, Content))

    def take(self) -> list[Event]:
        """The events so far, once."""
        events, self._events = self._events, []
        return events

    def rest(self, events: Iterable[Event]) -> list[Event]:
        """The answer's next events without what was sent."""
        return [shown for event in events if (shown := self._rest_of(event)) is not None]

    def _rest_of(self, event: Event) -> Event | None:
        """Text that was held back at the end of the prefill is content unless it begins a call, which ends this."""
        match event:
            case Reasoning(text):
                known, self._reasoning = self._reasoning, max(0, self._reasoning - len(text))
            case Content(text):
                known, self._content = self._content, max(0, self._content - len(text))
            case _:
                self._content = 0
                return event
        return replace(event, text=text[known:]) if known < len(text) else None


def begun(new_reader: Callable[[], MessageReader], prefill: Prefill, *, echo: bool = False) -> Begun:
    """Begin to read an answer; `new_reader` makes its reader. With `echo`, nothing is removed from its events."""
    answer, alone = new_reader(), new_reader()
    known = () if echo else (*alone.push(prefill.text), *alone.flush())
    return Begun(answer, answer.push(prefill.text), known)
