"""The text of one row's answer, piece by piece: what streamed and plain responses both read."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

from batching.stream import Stream
from batching.types import Delta, Finish, TokenLogprob
from server.text import Detokenizer, StopScanner


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text, possibly none, and on the last piece why the answer is over: "stop" or "length".

    `logprobs` has an entry for each token of this piece, if the request asked for them.
    """

    text: str
    finish: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


async def pieces(stream: Stream, detokenizer: Detokenizer, scanner: StopScanner) -> AsyncIterator[Piece]:
    """Pieces as soon as they are known; the last one has `finish`. Raises what the stream raises.

    A stop string ends the answer and its row.
    """
    async for delta in stream:
        text, stopped = scanner.push(detokenizer.push(_visible(delta)))
        if stopped:
            stream.stop()
            yield Piece(text, Finish.STOP, delta.logprobs)
            return
        if delta.finish is not None:
            yield Piece(text + scanner.flush(), delta.finish, delta.logprobs)
        elif text or delta.logprobs:
            yield Piece(text, None, delta.logprobs)


def _visible(delta: Delta) -> tuple[int, ...]:
    """The tokens without the stop token, which is not part of the answer even where it has a text."""
    return delta.tokens[:-1] if delta.finish is Finish.STOP else delta.tokens
