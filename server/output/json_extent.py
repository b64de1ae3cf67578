"""Finds the end of a JSON value in text that arrives in pieces."""

import re

IN_STRING = re.compile(r'["\\]')
SIGNS = re.compile(r'["{}\[\]]')
SIGNS_OR_TAG = re.compile(r'["{}\[\]<]')


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
