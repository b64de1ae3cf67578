"""Incremental detokenization, at a cost per token that does not grow with the answer. Event loop only."""

import codecs
import re
from collections.abc import Callable, Collection, Sequence
from functools import cache

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel, DecodeStream


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's mapping of characters to bytes in byte-level vocabularies (printable characters stand for themselves)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_alphabet()
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""SentencePiece's name for a byte token, used for characters outside the vocabulary."""


class Vocabulary:
    """The tokens of one tokenizer. Thread-safe.

    `byte_level`: a text is the concatenation of its tokens' bytes. `special`: ids that are not part of a text; the
    `tags` of thoughts and calls are, because some tokenizers flag them, too.
    """

    def __init__(self, tokenizer: Tokenizer, tags: Collection[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.byte_level = isinstance(tokenizer.decoder, ByteLevel)
        added = tokenizer.get_added_tokens_decoder()
        self.special = frozenset(token for token, one in added.items() if one.special and one.content not in tags)
        self.bytes_of: Callable[[int], bytes] = cache(self._bytes_of)  # at most one entry a token
        """A token's bytes, which may be part of a character."""

    def spelling(self, token: int) -> str:
        """The token as the vocabulary has it, such as `Ġthe`; empty for ids that it lacks."""
        return self.tokenizer.id_to_token(token) or ""

    def _bytes_of(self, token: int) -> bytes:
        piece = self.spelling(token)
        if self.byte_level and all(char in BYTES for char in piece):
            return bytes(BYTES[char] for char in piece)
        alone = self.decode([token])
        if (byte := BYTE_TOKEN.fullmatch(piece)) and alone != piece:
            return bytes([int(byte[1], 16)])
        # Decoded after another token, because some decoders drop a text's leading space.
        return self.decode([token, token]).removeprefix(alone).encode()

    def decode(self, tokens: list[int]) -> str:
        """The text of ids, special tokens included."""
        # Only methods for batches release the GIL.
        [text] = self.tokenizer.decode_batch([tokens], skip_special_tokens=False)
        return str(text)


MAX_HELD = 8
"""Tokens that can form one unfinished character, which has at most four bytes. Beyond that they are no character, and
a `DecodeStream` decodes everything it holds again at every token."""


class Detokenizer:
    """Turns one row's tokens into text, holding back the bytes of an unfinished character. Special tokens are included
    if `special`. Some vocabularies leave out a text's leading space, unless it continues that of the tokens `after`, of
    which no more than the last character matter."""

    def __init__(self, vocabulary: Vocabulary, *, special: bool = False, after: Sequence[int] = ()) -> None:
        self._vocabulary = vocabulary
        self._hidden = frozenset[int]() if special else vocabulary.special
        self._rest = b""  # of an unfinished character
        self._last = [] if vocabulary.byte_level else self._end_of(after)
        self._stream = DecodeStream(self._last, skip_special_tokens=False)
        self._held: list[int] = []

    def _end_of(self, tokens: Sequence[int]) -> list[int]:
        """The last of them that are whole characters; none if they end within one, or with a token that is no text."""
        if tokens and tokens[-1] in self._hidden:
            return []
        ends = (list(tokens[-count:]) for count in range(1, min(MAX_HELD, len(tokens) + 1)))
        return next((end for end in ends if "\ufffd" not in self._vocabulary.decode(end)), [])

    @property
    def held(self) -> int:
        """Bytes of the unfinished character."""
        return len(self._rest) + sum(len(self._vocabulary.bytes_of(token)) for token in self._held)

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete, often a word, sometimes empty."""
        visible = [token for token in tokens if token not in self._hidden]
        if not self._vocabulary.byte_level:
            return "".join(map(self._step, visible))
        data = b"".join([self._rest, *map(self._vocabulary.bytes_of, visible)])
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._rest = data[used:]
        return text

    def _step(self, token: int) -> str:
        """For vocabularies where a token's text depends on its neighbours."""
        self._held.append(token)
        try:
            text = self._stream.step(self._vocabulary.tokenizer, token)
        except Exception:  # bytes that form no character have changed how a byte before them is read, which was let out
            text = b"".join(map(self._vocabulary.bytes_of, self._held)).decode(errors="replace")
            self._stream = DecodeStream([token], skip_special_tokens=False)
        if text is None and len(self._held) >= MAX_HELD:
            text = self._vocabulary.decode(self._held)
            self._stream = DecodeStream(self._last, skip_special_tokens=False)
        elif text:
            self._last = [token]
        if text is not None:
            self._held.clear()
        return text or ""
