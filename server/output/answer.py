"""The text of one row's answer as it arrives, for streamed and plain responses alike."""

from bisect import bisect_left
from collections.abc import Collection, Sequence

from batching.stream import Stream
from batching.types import Delta, Finish
from server.output.detokenize import Detokenizer
from server.output.reasoning import ReasoningSplitter
from server.replies import Ending

ENDINGS: dict[Finish | None, Ending] = {Finish.STOP: "stop", Finish.LENGTH: "length"}
"""The endings that a client sees. A row with any other ending is not read to its end."""


class StopScanner:
    """Finds the first stop string in text that arrives in pieces, and holds back anything that may begin one."""

    def __init__(self, stops: Sequence[str], *, inclusive: bool = False) -> None:
        self._stops = sorted(filter(None, stops))
        self._firsts = {stop[0] for stop in self._stops}
        self._longest = max(map(len, self._stops), default=0)
        self._inclusive = inclusive
        self._held = ""
        self.found: str | None = None  # the stop string that ended the text
        self.is_idle = not self._stops
        """Whether there is nothing to find."""

    @property
    def held(self) -> int:
        """Bytes of text held back: what may begin a stop string, or the one that ended the text and what follows it."""
        return len(self._held.encode())

    def push(self, piece: str) -> tuple[str, bool]:
        """Text that is safe to send, and whether a stop string was found. The text then ends before the stop string, or
        after it if `inclusive`."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        # The match that is complete first, so that the result does not depend on how the text was split.
        matches = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            end, start, self.found = min(matches)
            safe = end if self._inclusive else start
            self._held = text[safe:]
            return text[:safe], True
        safe = self._begun(text)
        self._held = text[safe:]
        return text[:safe], False

    def _begun(self, text: str) -> int:
        """Where the first stop string starts that `text` may be the beginning of; its length if there is none.

        What cannot begin one is released for good, so no character is ruled out twice, however the text is split.
        """
        for at in range(max(0, len(text) + 1 - self._longest), len(text)):
            if text[at] in self._firsts:
                end = text[at:]
                # In alphabetical order, those that begin with `end` are the first that do not come before it.
                next_one = bisect_left(self._stops, end)
                if next_one < len(self._stops) and self._stops[next_one].startswith(end):
                    return at
        return len(text)

    def flush(self) -> str:
        """The text held back for a stop string that never came."""
        text, self._held = self._held, ""
        return text


class ContentScanner(StopScanner):
    """Finds the first stop string after a thought, as `splitter` tells the two apart: a thought often has what the
    client wants to end the answer with, such as an empty line."""

    def __init__(self, stops: Sequence[str], splitter: ReasoningSplitter, *, inclusive: bool = False) -> None:
        super().__init__(stops, inclusive=inclusive)
        self._splitter = splitter
        self._undecided = ""  # text that may begin a thought or be content
        self._in_content = False

    @property
    def held(self) -> int:
        return super().held + len(self._undecided.encode())

    def push(self, piece: str) -> tuple[str, bool]:
        if self._in_content:
            return super().push(piece)
        text, self._undecided = self._undecided + piece, ""
        content = "".join(said for kind, said in self._splitter.push(piece) if kind == "content")
        if content:
            self._in_content = True
            safe, found = super().push(content)
            return text.removesuffix(content) + safe, found
        if self._splitter.undecided:
            text, self._undecided = "", text
        return text, False

    def flush(self) -> str:
        text, self._undecided = self._undecided, ""
        return text + super().flush()


class AnswerReader:
    """Turns a stream's tokens into text. A stop string ends the answer and its row.

    `stop_reason`: the stop string that ended it, or the one of `stop_tokens` that did. `latest`: what was pushed last,
    without tokens after a stop string.
    """

    def __init__(
        self, stream: Stream, detokenizer: Detokenizer, scanner: StopScanner, stop_tokens: Collection[int]
    ) -> None:
        self.stop_reason: str | int | None = None
        self.latest = Delta(())
        self._stop_tokens = stop_tokens
        self._stream = stream
        self._detokenizer = detokenizer
        self._scanner = scanner

    @property
    def held(self) -> int:
        """Bytes of the tokens so far that are in no text yet."""
        return self._detokenizer.held + self._scanner.held

    def push(self, arrived: Delta) -> tuple[str, Ending | None]:
        """The text that these tokens complete, possibly empty, and the answer's ending if it has ended."""
        self.latest = arrived
        tokens = arrived.tokens if arrived.finish is None else _visible(arrived)
        text, read = (self._detokenizer.push(tokens), 0) if self._scanner.is_idle else self._read(tokens)
        if self._scanner.found is not None:
            self.stop_reason = self._scanner.found
            self.latest = first_of(arrived, read)
            self._stream.stop(unread=len(arrived.tokens) - read)
            return text, "stop"
        if arrived.finish is None:
            return text, None
        text += self._scanner.flush()
        if arrived.finish is Finish.STOP and arrived.tokens[-1] in self._stop_tokens:
            self.stop_reason = arrived.tokens[-1]
        return text, ENDINGS.get(arrived.finish)

    def _read(self, tokens: Sequence[int]) -> tuple[str, int]:
        """The text of the tokens up to a stop string, and how many they are. One at a time, because those that arrive
        together after a stop string are no part of the answer."""
        texts = []
        for count, token in enumerate(tokens, 1):
            text, stopped = self._scanner.push(self._detokenizer.push((token,)))
            texts.append(text)
            if stopped:
                return "".join(texts), count
        return "".join(texts), len(tokens)


def one_by_one(arrived: Delta) -> list[Delta]:
    """The same tokens, at least one, each in a delta of its own."""
    last = len(arrived.tokens) - 1
    return [
        Delta((token,), arrived.finish if n == last else None, arrived.logprobs[n : n + 1])
        for n, token in enumerate(arrived.tokens)
    ]


def first_of(arrived: Delta, count: int) -> Delta:
    """The delta with only its first tokens."""
    return arrived._replace(tokens=arrived.tokens[:count], logprobs=arrived.logprobs[:count])


def _visible(arrived: Delta) -> tuple[int, ...]:
    """The tokens without the stop token, which is not part of the answer even if it decodes to text."""
    return arrived.tokens[:-1] if arrived.finish is Finish.STOP else arrived.tokens
