"""Tool calls as Qwen 2.5 and 3 write them: JSON between tags, parsed from an answer as it streams, in linear time.

A small state machine that runs on the event loop.
"""

import re
from collections.abc import Callable, Sequence
from io import StringIO
from typing import Literal

import orjson

from server.output.call_parser import MAX_SPACE, NO_ARGUMENTS, SIGNS_OR_TAG, SPACE, CallParser, JsonExtent
from server.output.tool_calls import NAME, Content, ToolEvent, ToolParser, Turn, new_call_id

OPEN, CLOSE = "<tool_call>", "</tool_call>"
CLOSERS = re.compile(r"[ \t\r\n}\]]*")
SCALAR = re.compile(r"[-+.\w]*", re.ASCII)


class QwenParser(CallParser):
    """Finds Qwen's calls, `<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>`, in an answer.

    A call is announced once its name and the opening brace of its arguments have arrived in valid JSON; from then on
    the arguments are streamed up to the matching brace. Arguments that come before the name, or as a JSON string that
    holds an object, are held back and checked as a whole instead. Missing arguments, null and an empty string mean an
    empty object. Until the announcement the text may turn out not to be a call (malformed JSON, an impossible name,
    the end of the answer, more than `MAX_HELD` characters), and is then content, byte for byte.

    An announced call is never retracted, and its arguments are not checked. If they break off, at the answer's end or
    at a closing tag outside their strings, they stay as they are and there is no `CallEnded`. After complete arguments
    the rest of the frame is dropped, including extra or missing closing brackets; anything else is content again.

    White space between calls and at the answer's end is dropped, because RAGFlow ignores the calls of an answer with
    any content. Content after a call keeps the white space before it.

    Every character is examined a bounded number of times. At most `MAX_HELD` characters of a possible call,
    `MAX_SPACE` of white space, or part of a tag are held back.
    """

    def __init__(self, new_id: Callable[[], str] = new_call_id) -> None:
        super().__init__(new_id)
        self._carry = ""  # a partial tag at the end of the text so far
        self._space = ""
        self._after_call = False  # only white space since the last call
        self._state = self._in_content
        self._reset()

    def _reset(self) -> None:
        """Forget the current call."""
        self._held = StringIO()
        self._next: Literal["{", "key", ":", "value", ","] = "{"
        self._key: str | None = None
        self._name: str | None = None
        self._arguments: str | None = None
        self._announced = False

    @property
    def held(self) -> int:
        return super().held + len((self._space + self._carry).encode())

    def push(self, text: str) -> tuple[ToolEvent, ...]:
        """The events completed by this piece of text."""
        text, self._carry = self._carry + text, ""
        return super().push(text)

    def flush(self) -> tuple[ToolEvent, ...]:
        """The events for held-back text at the end of the answer."""
        carry, self._carry = self._carry, ""
        if self._state == self._in_arguments:
            self._argue(carry)
        elif self._state != self._after_arguments:
            self._not_a_call(0)
            self._say(carry)
        if self._space and not self._after_call:
            self._out.append(Content(self._space))
        self._space = ""
        return self._events()

    def _in_content(self, text: str, at: int) -> int:
        start = text.find(OPEN, at)
        if start < 0:
            cut = _start_of_tag(text, at)
            self._say(text[at:cut])
            self._carry = text[cut:]
            return len(text)
        self._say(text[at:start])
        self._reset()
        self._held.write(OPEN)
        self._state = self._in_frame
        return start + len(OPEN)

    def _in_frame(self, text: str, at: int) -> int:
        """Between keys and values of the call's outer object."""
        to, end = self._hold(SPACE, text, at)
        if to == end:
            return self._more(text, to)
        char = text[to]
        match self._next, char:
            case "value", _:
                return self._at_value(char, to)
            case "key", '"':
                self._key = None  # until the string has been read, like any other
                return self._at_value(char, to)
            case "{", "{":
                self._next = "key"
            case ":", ":":
                self._next = "value"
            case ",", ",":
                self._next = "key"
            case ",", "}" if self._announced:
                self._reset()
                self._state = self._after_arguments
                return to + 1
            case ",", "}" if self._name:
                self._call_whole(self._name, NO_ARGUMENTS)
                return to + 1
            case _:
                return self._not_a_call(to)
        self._held.write(char)
        return to + 1

    def _at_value(self, char: str, at: int) -> int:
        self._extent = JsonExtent(SIGNS_OR_TAG)
        self._value_start = self._held.tell()
        if char == "{" and self._key == "arguments" and self._name and not self._arguments and not self._announced:
            self._announce(self._name)
        else:
            self._state = self._in_value if char in '"{[' else self._in_scalar
        return at

    def _in_value(self, text: str, at: int) -> int:
        """Inside a key, or inside a value that is held back."""
        to = self._hold_value(text, at)
        return self._after_value(to) if self._extent.ended else self._more(text, to)

    def _in_scalar(self, text: str, at: int) -> int:
        to, end = self._hold(SCALAR, text, at)
        return self._after_value(to) if to < end else self._more(text, to)

    def _after_value(self, at: int) -> int:
        try:
            value, source = self._value()
        except orjson.JSONDecodeError:
            return self._not_a_call(at)
        self._state = self._in_frame
        if self._key is None:
            self._key, self._next = value, ":"
        elif self._announced or self._learn(value, source):
            self._next = ","
        else:
            return self._not_a_call(at)
        return at

    def _learn(self, value: object, source: str) -> bool:
        """Record a member of the outer object. Returns False if this cannot be a call."""
        if self._key == "name":
            if self._name is not None or not (isinstance(value, str) and re.fullmatch(NAME, value)):
                return False
            self._name = value
        elif self._key == "arguments":
            if self._arguments is not None or not (text := _object_text(value, source)):
                return False
            self._arguments = text
        if self._name and self._arguments:
            self._call_whole(self._name, self._arguments)
        return True

    def _in_arguments(self, text: str, at: int) -> int:
        to = super()._in_arguments(text, at)
        if self._extent.ended:
            return to
        if (after := self._past_close(text, to)) is not None:
            return after
        self._argue(text[to])
        return to + 1

    def _after_arguments(self, text: str, at: int) -> int:
        to = CLOSERS.match(text, at).end()  # type: ignore[union-attr]  # always matches, if only the empty string
        if (after := self._past_close(text, to)) is not None:
            return after
        if text[to] != ",":
            self._state = self._in_content
            return to
        self._reset()
        self._announced, self._next, self._state = True, "key", self._in_frame
        self._held.write(",")
        return to + 1

    def _past_close(self, text: str, at: int) -> int | None:
        """The position after a closing tag, or after what may be one at the text's end; None if neither is here."""
        tag = text[at : at + len(CLOSE)]
        if tag == CLOSE:
            self._state = self._in_content
        elif CLOSE.startswith(tag):
            self._carry = tag
        else:
            return None
        return at + len(tag)

    def _not_a_call(self, at: int) -> int:
        held = self._held.getvalue()
        self._reset()
        self._state = self._in_content
        self._say(held)
        return at

    def _announce(self, name: str) -> None:
        self._reset()
        self._after_call, self._space = True, ""
        super()._announce(name)

    def _end(self) -> None:
        super()._end()
        self._state = self._after_arguments

    def _say(self, text: str) -> None:
        """Emit content, holding back trailing white space, which may precede a call."""
        text = self._space + text
        keep = (len(text) - len(text.rstrip())) % MAX_SPACE
        said, self._space = text[: len(text) - keep], text[len(text) - keep :]
        if said:
            self._out.append(Content(said))
            self._after_call = False


def _start_of_tag(text: str, at: int) -> int:
    """Position from which the text, after `at`, ends in a partial opening tag, or its length."""
    start = text.rfind(OPEN[0], max(at, len(text) - len(OPEN) + 1))
    return start if start >= 0 and OPEN.startswith(text[start:]) else len(text)


def _object_text(value: object, source: str) -> str | None:
    """The JSON text of an object given as an object, in a string, or as an empty value; None for anything else."""
    if isinstance(value, dict):
        return source
    if value is None or (isinstance(value, str) and not value.strip()):
        return NO_ARGUMENTS
    try:
        return value.strip() if isinstance(value, str) and isinstance(orjson.loads(value), dict) else None
    except orjson.JSONDecodeError:
        return None


class QwenFormat:
    """Qwen 2.5 and 3, and Hermes, where the format began: JSON between tags."""

    separator = "\n"
    tags = frozenset([OPEN, CLOSE, "<tool_response>", "</tool_response>"])

    def fits(self, template: str) -> bool:
        return OPEN in template and "<function=" not in template  # Qwen3-Coder writes XML between the same tags

    def parser(self) -> ToolParser:
        return QwenParser()

    def around(self, name: str) -> tuple[str, str]:
        return f'{OPEN}\n{{"name": "{name}", "arguments": ', f"}}\n{CLOSE}"

    def turns(self, messages: Sequence[Turn]) -> list[Turn]:
        return list(messages)
