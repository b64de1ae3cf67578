"""The text of one row's answer as it comes: what streamed and plain responses both read."""

from collections.abc import Sequence

from batching.stream import Stream
from batching.types import Delta, Finish
from server.output.detokenize import Detokenizer
from server.output.reasoning import overlap
from server.replies import Ending

ENDINGS: dict[Finish | None, Ending] = {Finish.STOP: "stop", Finish.LENGTH: "length"}
"""What a client is told. Of a row that ended in another way there is no more to read."""


class StopScanner:
    """Finds the first of some stop strings in text that comes in pieces, and never lets the start of one out."""

    def __init__(self, stops: Sequence[str], *, inclusive: bool = False) -> None:
        self._stops = [stop for stop in stops if stop]
        self._inclusive = inclusive
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Text that is safe to send, and whether a stop string was found: it ends before that one, or if `inclusive`
        with it."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        # The one that is complete first, so that nothing depends on how the text was cut into pieces.
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            end, start = min(found)
            return text[: end if self._inclusive else start], True
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back for a stop string that never came."""
        text, self._held = self._held, ""
        return text


class AnswerReader:
    """Makes text of a stream's tokens. A stop string ends the answer and its row."""

    def __init__(self, stream: Stream, detokenizer: Detokenizer, scanner: StopScanner) -> None:
        self._stream = stream
        self._detokenizer = detokenizer
        self._scanner = scanner

    def push(self, arrived: Delta) -> tuple[str, Ending | None]:
        """The text that these tokens complete, possibly none, and why the answer is over if it is."""
        text, stopped = self._scanner.push(self._detokenizer.push(_visible(arrived)))
        if stopped:
            self._stream.stop()
            return text, "stop"
        if arrived.finish is not None:
            text += self._scanner.flush()
        return text, ENDINGS.get(arrived.finish)


def _visible(arrived: Delta) -> tuple[int, ...]:
    """The tokens without the stop token, which is not part of the answer even where it has a text."""
    return arrived.tokens[:-1] if arrived.finish is Finish.STOP else arrived.tokens
