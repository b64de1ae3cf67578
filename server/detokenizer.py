"""From one row's tokens to its text, as they come, in time that does not grow with the answer. Event loop only."""

import codecs
from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from server.vocabulary import Vocabulary

MAX_HELD = 8
"""Tokens that may stand for one unfinished character, which has at most four bytes. More are no character, and a
`DecodeStream` decodes all that it holds again at every token."""


class Detokenizer:
    """Turns one row's tokens into text; holds back the bytes of an unfinished character. Special tokens have a text
    if `special`."""

    def __init__(self, vocabulary: Vocabulary, *, special: bool = False) -> None:
        self._vocabulary = vocabulary
        self._special = special
        self._hidden = frozenset[int]() if special else vocabulary.special
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._stream = DecodeStream([], skip_special_tokens=not special)
        self._held: list[int] = []
        self._last: list[int] = []

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete, often a word, sometimes nothing."""
        visible = [token for token in tokens if token not in self._hidden]
        if self._vocabulary.byte_level:
            return self._bytes.decode(b"".join(map(self._vocabulary.bytes_of, visible)))
        return "".join(map(self._step, visible))

    def _step(self, token: int) -> str:
        """For vocabularies whose tokens' texts depend on their neighbours."""
        self._held.append(token)
        text = self._stream.step(self._vocabulary.tokenizer, token)
        if text is None and len(self._held) >= MAX_HELD:
            text = self._vocabulary.decode(self._held, special=self._special)
            self._stream = DecodeStream(self._last, skip_special_tokens=not self._special)
        elif text:
            self._last = [token]
        if text is not None:
            self._held.clear()
        return text or ""
