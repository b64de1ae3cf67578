"""A prompt at the beginning of its answer, with the log probabilities of its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from batching.types import PromptLogprob
from server.logprobs import completion_logprobs
from server.replies import TextLogprobs
from server.text import Text


@dataclass(frozen=True)
class Echoed:
    """A prompt's tokens, and what of it is told again: its text, and where the text of each token starts in that."""

    tokens: tuple[int, ...]
    text: str = ""
    starts: Sequence[int] = ()


class Echo:
    """Tells a prompt again: with `top` likeliest tokens at each place, or its text alone if that is None."""

    def __init__(self, text: Text, prompt: Echoed, top: int | None) -> None:
        self._text = text
        self._prompt = prompt
        self._top = top
        self._told = 0  # tokens

    def push(self, entries: Sequence[PromptLogprob | None]) -> tuple[str, TextLogprobs | None]:
        """What of the prompt can be told with these log probabilities of its next tokens, and its `logprobs`."""
        begin, self._told = self._told, self._told + len(entries)
        if self._top is None:
            self._told = len(self._prompt.tokens)
            return self._prompt.text if begin == 0 else "", None
        if not entries:
            return "", None
        starts = [*self._prompt.starts[begin : self._told + 1], len(self._prompt.text)]
        tokens = self._prompt.tokens[begin : self._told]
        here = self._prompt.text[starts[0] : starts[len(tokens)]]
        return here, completion_logprobs(self._text, tokens, entries, starts[: len(tokens)], self._top)


def starts_of(text: Text, tokens: Sequence[int], told: str) -> list[int]:
    """Where each token's text starts in `told`, the text that the tokens were made of or that they make.

    The tokens of one character all start where it does. What the tokenizer puts before a text is not in it, so those
    tokens start where it does.
    """
    detokenizer = text.detokenizer(special=True)
    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + len(detokenizer.push([token])))
    decoded = text.decode(tokens)
    before = len(decoded) - len(told) if decoded.endswith(told) else 0
    return [min(max(start - before, 0), len(told)) for start in ends[:-1]]
