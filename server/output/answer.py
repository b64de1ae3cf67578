"""The text of one row's answer as it comes: what streamed and plain responses both read."""

from batching.stream import Stream
from batching.types import Delta, Finish
from server.model.text import StopScanner
from server.output.detokenize import Detokenizer
from server.replies import Ending

ENDINGS: dict[Finish | None, Ending] = {Finish.STOP: "stop", Finish.LENGTH: "length"}
"""What a client is told. Of a row that ended in another way there is no more to read."""


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
