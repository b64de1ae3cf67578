"""Where a JSON value ends, in text that comes in pieces."""

import re

IN_STRING = re.compile(r'["\\]')
SIGNS = re.compile(r'["{}\[\]]')
SIGNS_OR_TAG = re.compile(r'["{}\[\]<]')


class JsonExtent:
    """Finds where a JSON string, object or array ends, by quotes and brackets alone."""

    def __init__(self, outside: re.Pattern[str] = SIGNS) -> None:
        """`outside`: what to stop at outside of strings, beside a value's own signs (`SIGNS`)."""
        self.ended = False
        self._outside = outside
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def scan(self, text: str, at: int, end: int) -> int:
        """The position after the value, or of what it stops at, or `end`. Looks at nothing twice."""
        while at < end and not self.ended:
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = (IN_STRING if self._in_string else self._outside).search(text, at, end)
            if found is None:
                return end
            if found[0] == "<":
                return found.start()
            at = found.end()
            self._pass(found[0])
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
