"""Tool calls as Llama 3.1, 3.2 and 3.3 write them: an answer of JSON objects and nothing else, parsed in linear time.

A small state machine that runs on the event loop.
"""

import re
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from io import StringIO
from typing import Literal

import orjson

from server.output.call_parser import MAX_HELD, MAX_SPACE, NO_ARGUMENTS, SPACE, CallParser, JsonExtent
from server.output.tool_calls import NAME, Content, ToolEvent, ToolParser, Turn, new_call_id

TAG = "<|python_tag|>"
"""May precede a call. Tokenizers that flag it as special leave it out of the text."""

KEYS = {'"name"': "name", '"parameters"': "arguments", '"arguments"': "arguments", '"type"': "type"}
EMPTY = ("null", '""')
MAX_NAME = 2 + 12 * 130  # characters of JSON for a name; an escaped surrogate pair takes twelve
CONTROL = re.compile(r"[\x00-\x1f]")  # must be escaped in JSON strings


class LlamaParser(CallParser):
    """Finds Llama's calls, `{"name": ..., "parameters": {...}}`, separated by semicolons or white space, in an answer.

    Nothing marks them, so they are only looked for at the start of the answer and after another call, and an object is
    a call only if it has a name, `parameters` or `arguments`, optionally `"type": "function"`, and no other member. At
    the first character that rules this out, the text is content, byte for byte, up to the end of the answer. A name,
    and arguments that come before it, are only checked as JSON once they are complete.

    A call is announced once its name and the opening brace of its arguments have arrived; from then on the arguments
    are streamed up to the matching brace. Null and an empty string mean an empty object; an object without arguments
    is not a call.

    An announced call is never retracted, and its arguments are not checked. If the answer ends within them, there is no
    `CallEnded`. After complete arguments, closing brackets, one semicolon and white space are dropped before another
    call and at the end of the answer.

    Every character is examined a bounded number of times. At most `MAX_HELD` characters of a possible call, or
    `MAX_SPACE` of white space, are held back.
    """

    def __init__(self, new_id: Callable[[], str] = new_call_id) -> None:
        super().__init__(new_id)
        self._max_held = MAX_SPACE
        self._separators = ""  # seen since the last call
        self._literals: tuple[str, ...] = ()
        self._tagged = False
        self._state = self._before_call

    def flush(self) -> tuple[ToolEvent, ...]:
        """The events for held-back text at the end of the answer."""
        is_rest = self._announced or (self._call >= 0 and self._state == self._before_call)
        if not is_rest:
            self._not_a_call(0)
        return self._events()

    def _in_content(self, text: str, at: int) -> int:
        self._out.append(Content(text[at:]))
        return len(text)

    def _before_call(self, text: str, at: int) -> int:
        to, end = self._hold(SPACE, text, at)
        if to == end:
            return self._more(text, to)
        char = text[to]
        if char == "{":
            self._begin()
        elif char == TAG[0] and not self._tagged:
            self._tagged = True
            return self._expect((TAG,), to)
        elif char not in self._separators:
            return self._not_a_call(to)
        if char == ";":
            self._separators = ""
        elif char in "}]":
            return to + 1  # the end of an announced call
        self._held.write(char)
        return to + 1

    def _begin(self) -> None:
        self._max_held = MAX_HELD
        self._next: Literal["key", ":", "value", ","] = "key"
        self._key = ""
        self._seen = set[str]()
        self._name: str | None = None
        self._arguments: str | None = None
        self._state = self._in_frame

    def _in_frame(self, text: str, at: int) -> int:
        """Between keys and values of the call's outer object."""
        to, end = self._hold(SPACE, text, at)
        if to == end:
            return self._more(text, to)
        char = text[to]
        match self._next, char:
            case "key", '"':
                return self._expect(tuple(KEYS), to)
            case "value", _:
                return self._at_value(char, to)
            case ":", ":":
                self._next = "value"
            case ",", ",":
                self._next = "key"
            case ",", _ if self._announced:
                return self._after_call(to)
            case _:
                return self._not_a_call(to)
        self._held.write(char)
        return to + 1

    def _at_value(self, char: str, at: int) -> int:
        match self._key, char:
            case "type", '"':
                return self._expect(('"function"',), at)
            case "arguments", '"' | "n":
                return self._expect(EMPTY, at)
            case "arguments", "{" if self._name:
                self._announce(self._name)
            case ("arguments", "{") | ("name", '"'):
                self._extent = JsonExtent()
                self._value_start = self._held.tell()
                self._max_held = self._value_start + MAX_NAME if self._key == "name" else MAX_HELD
                self._state = self._in_value
            case _:
                return self._not_a_call(at)
        return at

    def _expect(self, literals: tuple[str, ...], at: int) -> int:
        """One of these must come next."""
        self._literals, self._literal = literals, ""
        self._state = self._in_literal
        return at

    def _in_literal(self, text: str, at: int) -> int:
        self._literal += text[at]
        if not any(literal.startswith(self._literal) for literal in self._literals):
            return self._not_a_call(at)
        self._held.write(text[at])
        if self._literal in self._literals:
            return self._after_literal(at + 1)
        return at + 1

    def _after_literal(self, at: int) -> int:
        self._state = self._in_frame
        if self._literal == TAG:
            self._state = self._before_call
        elif self._next == "key":
            self._key, self._next = KEYS[self._literal], ":"
            if self._key in self._seen:
                return self._not_a_call(at)
            self._seen.add(self._key)
        else:
            self._learn(NO_ARGUMENTS if self._key == "arguments" else None)
        return at

    def _in_value(self, text: str, at: int) -> int:
        """Inside a name, or inside arguments that come before it."""
        to = self._hold_value(text, at)
        if self._key == "name" and CONTROL.search(text, at, to):
            return self._not_a_call(to)
        if not self._extent.ended:
            return self._more(text, to)
        self._max_held = MAX_HELD
        self._state = self._in_frame
        try:
            value, source = self._value()
        except orjson.JSONDecodeError:
            return self._not_a_call(to)
        if self._key == "name":
            if not re.fullmatch(NAME, value):
                return self._not_a_call(to)
            self._name = value
        self._learn(source if self._key == "arguments" else None)
        return to

    def _learn(self, arguments: str | None) -> None:
        """Record a member. With a name and complete arguments the call is complete, too."""
        self._next = ","
        self._arguments = self._arguments or arguments
        if self._announced:
            self._forget()
        elif self._name and self._arguments:
            self._call_whole(self._name, self._arguments)

    def _after_call(self, at: int) -> int:
        self._forget()
        self._announced = self._tagged = False
        self._max_held, self._separators = MAX_SPACE, "}];"
        self._state = self._before_call
        return at

    def _not_a_call(self, at: int) -> int:
        if held := self._held.getvalue():
            self._out.append(Content(held))
        self._forget()
        self._announced = False
        self._state = self._in_content
        return at

    def _forget(self) -> None:
        """Drop the held-back text."""
        self._held = StringIO()

    def _announce(self, name: str) -> None:
        self._forget()
        self._extent = JsonExtent()
        super()._announce(name)

    def _end(self) -> None:
        super()._end()
        self._next, self._state = ",", self._in_frame


class LlamaFormat:
    """Llama 3.1 to 3.3: JSON that is the whole answer. Their templates take one call per turn and render results as
    `ipython` turns."""

    separator = "; "
    tags = frozenset[str]()

    def fits(self, template: str) -> bool:
        return "ipython" in template and '"parameters": ' in template and "<function=" not in template

    def parser(self) -> ToolParser:
        return LlamaParser()

    def around(self, name: str) -> tuple[str, str]:
        return f'{{"name": "{name}", "parameters": ', "}"

    def turns(self, messages: Sequence[Turn]) -> list[Turn]:
        """Each call in a turn of its own, after the text that came with it and before its result."""
        turns: list[Turn] = []
        at = 0
        while at < len(messages):
            message, at = messages[at], at + 1
            if "tool_calls" not in message:
                turns.append(message)
                continue
            results = defaultdict[str, deque[Turn]](deque)
            while at < len(messages) and messages[at]["role"] == "tool":
                results[messages[at].get("tool_call_id", "")].append(messages[at])
                at += 1
            turns += _one_call_each(message, results)
            turns += [result for left in results.values() for result in left]
        return turns


def _one_call_each(message: Turn, results: defaultdict[str, deque[Turn]]) -> list[Turn]:
    """The turns of a message with calls. Consumes the results of its calls."""
    said = message.copy()
    calls = said.pop("tool_calls")
    turns = [said] if said["content"] else []
    for call in calls:
        turns.append({**message, "content": "", "tool_calls": [call]})
        if results[call["id"]]:
            turns.append(results[call["id"]].popleft())
    return turns
