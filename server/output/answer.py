"""The text of one row's answer as it arrives, for streamed and plain responses alike."""

from collections.abc import Collection, Sequence
from functools import lru_cache

from batching.stream import Stream
from batching.types import Delta, Finish
from server.output.detokenize import Detokenizer
from server.replies import Ending

ENDINGS: dict[Finish | None, Ending] = {Finish.STOP: "stop", Finish.LENGTH: "length"}
"""The endings that a client sees. A row with any other ending is not read to its end."""


@lru_cache(maxsize=256)
def failures(stop: str) -> tuple[int, ...]:
    """For each prefix of `stop`, by its last character: the length of the longest shorter one that it ends with (the
    failure function of Knuth, Morris and Pratt 1977)."""
    found, length = [0] * len(stop), 0
    for at in range(1, len(stop)):
        length = found[at] = advanced(stop, found, length, stop[at])
    return tuple(found)


def advanced(stop: str, fails: Sequence[int], length: int, text: str) -> int:
    """The length of the longest prefix of `stop` that a text ends with, once `text` is added to it: it was `length`
    before. Takes time in proportion to `text`, which must not complete the stop string."""
    if len(text) >= len(stop):
        length, text = 0, text[len(text) - len(stop) + 1 :]
    if not length and stop[0] not in text:
        return 0
    for char in text:
        while length and stop[length] != char:
            length = fails[length - 1]
        length += stop[length] == char
    return length


class StopScanner:
    """Finds the first stop string in text that arrives in pieces, and holds back anything that may begin one."""

    def __init__(self, stops: Sequence[str], *, inclusive: bool = False) -> None:
        self._begun = dict.fromkeys((stop for stop in stops if stop), 0)  # how much of each the text ends with
        self._inclusive = inclusive
        self._held = ""
        self.found: str | None = None  # the stop string that ended the text

    def push(self, piece: str) -> tuple[str, bool]:
        """Text that is safe to send, and whether a stop string was found. The text then ends before the stop string, or
        after it if `inclusive`."""
        if not self._begun:
            return piece, False
        text = self._held + piece
        # The match that is complete first, so that the result does not depend on how the text was split.
        matches = [(at + len(stop), at, stop) for stop in self._begun if (at := text.find(stop)) >= 0]
        if matches:
            self._held, self._begun = "", dict.fromkeys(self._begun, 0)
            end, start, self.found = min(matches)
            return text[: end if self._inclusive else start], True
        for stop, length in self._begun.items():
            self._begun[stop] = advanced(stop, failures(stop), length, piece)
        keep = max(self._begun.values())
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The text held back for a stop string that never came."""
        text, self._held = self._held, ""
        return text


class AnswerReader:
    """Turns a stream's tokens into text. A stop string ends the answer and its row.

    `stop_reason`: the stop string that ended it, or the one of `stop_tokens` that did.
    """

    def __init__(
        self, stream: Stream, detokenizer: Detokenizer, scanner: StopScanner, stop_tokens: Collection[int]
    ) -> None:
        self.stop_reason: str | int | None = None
        self._stop_tokens = stop_tokens
        self._stream = stream
        self._detokenizer = detokenizer
        self._scanner = scanner

    def push(self, arrived: Delta) -> tuple[str, Ending | None]:
        """The text that these tokens complete, possibly empty, and the answer's ending if it has ended."""
        tokens = arrived.tokens if arrived.finish is None else _visible(arrived)
        text, stopped = self._scanner.push(self._detokenizer.push(tokens))
        if stopped:
            self.stop_reason = self._scanner.found
            self._stream.stop()
            return text, "stop"
        if arrived.finish is None:
            return text, None
        text += self._scanner.flush()
        if arrived.finish is Finish.STOP and arrived.tokens[-1] in self._stop_tokens:
            self.stop_reason = arrived.tokens[-1]
        return text, ENDINGS.get(arrived.finish)


def _visible(arrived: Delta) -> tuple[int, ...]:
    """The tokens without the stop token, which is not part of the answer even if it decodes to text."""
    return arrived.tokens[:-1] if arrived.finish is Finish.STOP else arrived.tokens
