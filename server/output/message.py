"""Parses an answer's text into an OpenAI message: reasoning, content and tool calls. Runs on the event loop."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

from server import replies
from server.output.reasoning import Part, ReasoningSplitter
from server.output.tool_calls import CallArguments, CallEnded, CallStarted, Content, ToolEvent, ToolParser


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the model's reasoning; never empty."""

    text: str


Event: TypeAlias = Reasoning | ToolEvent
Said = TypeVar("Said", replies.ChatMessage, replies.Delta)


class MessageReader:
    """Parses one answer's text as it arrives. Without a splitter and a parser, all of it is content.

    The folded events of an answer do not depend on how its text was split. Calls are only parsed in content: a call
    inside a think block is reasoning. `meant` maps the names that the model uses to the client's functions.
    """

    def __init__(
        self,
        reasoning: ReasoningSplitter | None = None,
        tools: ToolParser | None = None,
        meant: Callable[[str], str] = str,
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._name_meant = meant

    @property
    def thinking(self) -> bool:
        """Whether the next text may be reasoning."""
        return self._reasoning is not None and not self._reasoning.over

    @property
    def thought(self) -> bool:
        """Whether there was any reasoning."""
        return self._reasoning is not None and self._reasoning.thought

    @property
    def held(self) -> int:
        """Bytes of text that are held back."""
        return sum(part.held for part in (self._reasoning, self._tools) if part is not None)

    def push(self, text: str) -> list[Event]:
        """The events completed by this piece of text, often one, sometimes none."""
        return self._read([("content", text)] if self._reasoning is None else self._reasoning.push(text))

    def flush(self) -> list[Event]:
        """The events that are only certain at the end of the answer."""
        events = self._read([] if self._reasoning is None else self._reasoning.flush())
        return events if self._tools is None else events + list(map(self._meant, self._tools.flush()))

    def _read(self, parts: Iterable[Part]) -> list[Event]:
        events: list[Event] = []
        for kind, text in parts:
            if kind == "reasoning":
                events.append(Reasoning(text))
            elif self._tools is not None:
                events += map(self._meant, self._tools.push(text))
            elif text:
                events.append(Content(text))
        return events

    def _meant(self, event: ToolEvent) -> ToolEvent:
        return replace(event, name=self._name_meant(event.name)) if isinstance(event, CallStarted) else event


def fold(events: Iterable[Event]) -> replies.ChatMessage:
    """The whole message. Its content is a string, or null if there are calls and no content.

    RAGFlow fails on null without calls, and on calls without the `index` that OpenAI only sends in streams.
    """
    reasoning: list[str] = []
    content: list[str] = []
    calls: list[tuple[CallStarted, list[str]]] = []
    for event in events:
        match event:
            case Reasoning():
                reasoning.append(event.text)
            case Content():
                content.append(event.text)
            case CallStarted():
                calls.append((event, []))
            case CallArguments():
                calls[event.index][1].append(event.text)
    said = "".join(content) if content or not calls else None
    message: replies.ChatMessage = {"role": "assistant", "content": said, "refusal": None}
    if reasoning:
        message["reasoning_content"] = "".join(reasoning)
    if calls:
        message["tool_calls"] = [_call(started, "".join(arguments)) for started, arguments in calls]
    return message


def delta(event: Event) -> replies.Delta | None:
    """The delta of an event in a streamed chunk; None for events that are not shown."""
    match event:
        case Content():
            return {"content": event.text}
        case Reasoning():
            return {"reasoning_content": event.text}
        case CallStarted():
            return {"tool_calls": [_call(event, "")]}
        case CallArguments():
            return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
        case CallEnded():
            return None


def complete_call(events: Iterable[Event]) -> bool:
    """Whether a call is complete among these."""
    return any(isinstance(event, CallEnded) for event in events)


def end_of_first_call(events: Sequence[Event]) -> int | None:
    """Number of events up to the end of the first call, complete or broken off by another; None if it has not ended."""
    for place, event in enumerate(events):
        if isinstance(event, CallEnded):
            return place + 1
        if isinstance(event, CallStarted) and event.index:
            return place
    return None


def as_legacy(said: Said) -> Said:
    """A message or delta with at most one call, in the older form with `function_call`."""
    if "tool_calls" in said:
        said["function_call"] = said.pop("tool_calls")[0]["function"]
    return said


def _call(started: CallStarted, arguments: str) -> replies.MadeCall:
    function: replies.MadeFunction = {"name": started.name, "arguments": arguments}
    return {"index": started.index, "id": started.id, "type": "function", "function": function}
