"""Keeps text from clients that looks like the model's special tokens plain text.

A tokenizer turns the text of an added token, such as `<|im_end|>`, into that token wherever it occurs. In a message it
would end the turn, and a retrieved document could continue as another role. So such text is broken up before the chat
template sees it: `BREAK` is inserted after its first character, passes through templates and JSON unchanged, and is
dropped by the tokenizer after it has looked for added tokens. Other text is tokenized as usual.

What is broken up where in a conversation:

- everywhere, the tokens flagged as special and those that the template itself writes: they delimit turns;
- tags of parts of a turn (`model_format.PART_TAGS`) only in tool definitions, calls and results, which are data and
  must not close the part they are in. Elsewhere templates and clients may use them on purpose: a history has thoughts,
  a system message may explain how to call a tool, and models only know these tags as tokens.

Prompts of `/v1/completions` are raw: every token in them counts.
"""

import re
import secrets
from collections.abc import Collection, Iterator
from itertools import groupby
from typing import TypeVar, cast

from tokenizers import Tokenizer, pre_tokenizers

BREAK = "".join(chr(0xF0000 + secrets.randbelow(0xFFFE)) for _ in range(4))
"""Unguessable private-use characters, so that no client's text contains them by chance or on purpose."""

PIECE = 65_536
"""Characters that are searched at a time: about a millisecond."""

Broken = TypeVar("Broken")


class Markers:
    """The texts of some added tokens with at least two characters; a single character cannot be broken up."""

    def __init__(self, texts: Collection[str]) -> None:
        self.texts = frozenset(texts)
        self._starts = {text[:end] for text in texts for end in range(1, len(text))}
        self._longest = max(map(len, self._starts), default=1)
        self._first = {text[0] for text in texts}
        groups = groupby(sorted(texts), key=lambda text: text[0])
        # Matches only the first character, by look-ahead, because one marker may start inside another.
        found = [f"{re.escape(first)}(?={_any_of([text[1:] for text in group])})" for first, group in groups]
        self._pattern = re.compile("|".join(found) or r"(?!)")

    def broken(self, value: Broken) -> Broken:
        """The same text or JSON with a `BREAK` in each marker, and in a partial one at the end of a text, which the
        template might complete."""
        return cast(Broken, self._broken(value))

    def _broken(self, value: object) -> object:
        match value:
            case str():
                return "".join(self._pieces(value)) + (BREAK if self._begins_at_the_end(value) else "")
            case list():
                return [self._broken(item) for item in value]
            case dict():
                return {self._broken(key): self._broken(item) for key, item in value.items()}
            case _:
                return value

    def _pieces(self, text: str) -> Iterator[str]:
        """The text with a `BREAK` in each marker. Searched a piece at a time, because a search holds the GIL."""
        for start in range(0, len(text), PIECE):
            end = start + PIECE
            for match in self._pattern.finditer(text, start, end + self._longest):
                if match.start() >= end:
                    break
                yield text[start : match.end()] + BREAK
                start = match.end()
            yield text[start:end]

    def _begins_at_the_end(self, text: str) -> bool:
        tail = text[-self._longest :]
        return not self._first.isdisjoint(tail) and any(tail[at:] in self._starts for at in range(len(tail)))


def _any_of(texts: Collection[str]) -> str:
    """A pattern for any of these texts, as a prefix tree, so that each character is examined once."""
    if "" in texts:
        return ""  # the shortest text is enough
    groups = groupby(sorted(texts), key=lambda text: text[0])
    found = [re.escape(first) + _any_of([text[1:] for text in group]) for first, group in groups]
    return found[0] if len(found) == 1 else f"(?:{'|'.join(found)})"


def drop_breaks(tokenizer: Tokenizer) -> None:
    """Make the tokenizer drop every `BREAK` after it has looked for added tokens."""
    former: pre_tokenizers.PreTokenizer | None = tokenizer.pre_tokenizer
    if BREAK not in repr(former):  # or another `Text` has done it
        dropped = pre_tokenizers.Split(BREAK, "removed")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([dropped, former] if former else [dropped])
