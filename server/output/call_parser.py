"""What parsers of tool calls share: text that may be a call is held back until that is decided, and JSON that is still
coming is followed to its end. Event loop only."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO
from itertools import groupby
from typing import Any

import orjson

from server.output.tool_calls import CallArguments, CallEnded, CallStarted, Content, ToolEvent, new_call_id

NO_ARGUMENTS = "{}"
MAX_HELD = 2**16  # characters of a possible call that are held back; beyond that it is content
MAX_SPACE = 256  # white space held back because a call may follow
SPACE = re.compile(r"[ \t\r\n]*")
IN_STRING = re.compile(r'["\\]')
SIGNS = re.compile(r'["{}\[\]]')
SIGNS_OR_TAG = re.compile(r'["{}\[\]<]')


class CallParser(ABC):
    """A `ToolParser` as a state machine, which examines every character a bounded number of times.

    A state is a method that takes the text and a position, and returns the position up to which it has consumed the
    text. `_held` is the text held back, at most `_max_held` characters of it.
    """

    def __init__(self, new_id: Callable[[], str] = new_call_id) -> None:
        self._new_id = new_id
        self._call = -1  # index of the latest call
        self._out: list[ToolEvent] = []
        self._held = StringIO()
        self._max_held = MAX_HELD
        self._announced = False  # the current call
        self._extent: JsonExtent  # of the value that is coming
        self._value_start: int  # where that begins in what is held back
        self._state: Callable[[str, int], int]

    @property
    def held(self) -> int:
        return len(self._held.getvalue().encode())

    def push(self, text: str) -> tuple[ToolEvent, ...]:
        """The events completed by this piece of text."""
        at = 0
        while at < len(text):
            at = self._state(text, at)
        return self._events()

    def _events(self) -> tuple[ToolEvent, ...]:
        out, self._out = self._out, []
        return joined(out)

    @abstractmethod
    def _not_a_call(self, at: int) -> int:
        """Release the held-back text as content, and go on from `at`."""

    def _limit(self, text: str, at: int) -> int:
        """The furthest that text from `at` on can be held back."""
        return max(at, min(len(text), at + self._max_held - self._held.tell()))

    def _hold(self, pattern: re.Pattern[str], text: str, at: int) -> tuple[int, int]:
        """Hold back what matches. Returns where the match ends and the furthest it was allowed to go."""
        end = self._limit(text, at)
        to = pattern.match(text, at, end).end()  # type: ignore[union-attr]  # always matches, if only the empty string
        self._held.write(text[at:to])
        return to, end

    def _more(self, text: str, at: int) -> int:
        """The match stopped: at the end of the text more may follow, elsewhere it is malformed or too long."""
        return at if at == len(text) else self._not_a_call(at)

    def _hold_value(self, text: str, at: int) -> int:
        """Hold back as much of the value that is coming as there is and may be held back. Returns where that ends."""
        to = self._extent.scan(text, at, self._limit(text, at))
        self._held.write(text[at:to])
        return to

    def _value(self) -> tuple[Any, str]:
        """The value that is held back, and its JSON. Raises `orjson.JSONDecodeError`."""
        self._held.seek(self._value_start)
        source = self._held.read()
        return orjson.loads(source), source

    def _in_arguments(self, text: str, at: int) -> int:
        """Inside the arguments of an announced call, which are not held back."""
        to = self._extent.scan(text, at, len(text))
        self._argue(text[at:to])
        if self._extent.ended:
            self._end()
        return to

    def _call_whole(self, name: str, arguments: str) -> None:
        self._announce(name)
        self._argue(arguments)
        self._end()

    def _announce(self, name: str) -> None:
        self._announced = True
        self._state = self._in_arguments
        self._call += 1
        self._out.append(CallStarted(self._call, self._new_id(), name))

    def _argue(self, text: str) -> None:
        if text:
            self._out.append(CallArguments(self._call, text))

    def _end(self) -> None:
        self._out.append(CallEnded(self._call))


def joined(events: Sequence[ToolEvent]) -> tuple[ToolEvent, ...]:
    """The events with adjacent text merged. Adjacent fragments always belong to the same call."""
    return tuple(_as_one(list(group)) for _, group in groupby(events, type))


def _as_one(events: list[ToolEvent]) -> ToolEvent:
    first = events[0]
    if len(events) == 1 or not isinstance(first, Content | CallArguments):
        return first
    return replace(first, text="".join(event.text for event in events if isinstance(event, type(first))))


class JsonExtent:
    """Finds the end of a JSON string, object or array by its quotes and brackets alone."""

    def __init__(self, outside: re.Pattern[str] = SIGNS) -> None:
        """`outside`: where else to stop outside strings, besides a value's own quotes and brackets (`SIGNS`)."""
        self.ended = False
        self._outside = outside
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def scan(self, text: str, at: int, end: int) -> int:
        """The position after the value, of the match it stops at, or `end`. Examines every character once."""
        while at < end and not self.ended:
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            match = (IN_STRING if self._in_string else self._outside).search(text, at, end)
            if match is None:
                return end
            if match[0] == "<":
                return match.start()
            at = match.end()
            self._pass(match[0])
        return at

    def _pass(self, char: str) -> None:
        if char == "\\":
            self._escaped = True
            return
        if char == '"':
            self._in_string = not self._in_string
        else:
            self._depth += 1 if char in "{[" else -1
        self.ended = self._depth == 0 and not self._in_string
