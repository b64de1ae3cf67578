"""Text to token ids and back: chat template, tokenizer, incremental decoding, stop strings.

`Text.render` and `Text.encode` take milliseconds and run on a helper thread; the rest is called a token at a time on
the event loop.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel, DecodeStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from server.grammar import Grammars


def _byte_alphabet() -> dict[str, int]:
    """Which character stands for which byte in a byte-level vocabulary (GPT-2's: printable ones for themselves)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_alphabet()
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece's vocabularies name the token of a byte, for characters that they have no token for."""


class TemplateError(Exception):
    """The model's chat template refuses these messages; the message is its own sentence."""


class Text:
    """The served model's tokenizer and chat template. Safe to use from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._chat = tokenizer
        self._tokenizer: Tokenizer = tokenizer.backend_tokenizer
        # A tokenizer's file may ask for both, and what a client sends is to be read whole and as it is.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        stop = tokenizer.eos_token_id
        self.stop_token_ids: frozenset[int] = frozenset() if stop is None else frozenset([stop])

    @classmethod
    def load(cls, checkpoint: str, *, trust_remote_code: bool = False) -> Text:
        """The tokenizer in a model's folder. Raises `ModelError` if there is none, or one without a chat template."""
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        from batching.errors import ModelError

        try:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"no usable tokenizer in {checkpoint}: {_first_line(error)}") from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ModelError(f"the tokenizer in {checkpoint} has no fast form (tokenizer.json), which streaming needs")
        if not tokenizer.chat_template:
            raise ModelError(f"the tokenizer in {checkpoint} has no chat template, so it cannot serve chats")
        return cls(tokenizer)

    def render(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
        """The text of a conversation up to where the assistant's answer starts.

        `options` are variables for the template; the caller allows only harmless names. Raises `TemplateError`.
        """
        from jinja2 import TemplateError as JinjaError

        try:
            return str(self._chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))
        except (JinjaError, TypeError, ValueError) as error:
            raise TemplateError(_first_line(error)) from error

    @property
    def template(self) -> str:
        """The source of the chat template."""
        return str(self._chat.chat_template)

    def encode(self, text: str, *, special: bool = False) -> tuple[int, ...]:
        """The ids of a text. `special` puts the tokens around it that the model has for where a text begins or ends."""
        # Of its methods those for batches alone let go of the interpreter, which the worker and the event loop need.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)
        return tuple(encoding.ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def grammars(self) -> Grammars:
        """A compiler of grammars over this vocabulary. Takes seconds for a large one: not on the event loop."""
        from server.grammar import Grammars

        return Grammars(self._chat)

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self._tokenizer)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, which may be a part of a character."""
        piece = self._tokenizer.id_to_token(token) or ""
        if isinstance(self._tokenizer.decoder, ByteLevel) and all(char in BYTES for char in piece):
            return bytes(BYTES[char] for char in piece)
        alone = self.decode([token])
        if (byte := BYTE_TOKEN.fullmatch(piece)) and alone != piece:
            return bytes([int(byte[1], 16)])
        # After another token, because some decoders drop the space that a text begins with.
        return self.decode([token, token]).removeprefix(alone).encode()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class Detokenizer:
    """Turns one row's tokens into text as they come; holds back the bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream([], skip_special_tokens=True)

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete, often a word, sometimes nothing."""
        text = ""
        for token in tokens:
            text += self._stream.step(self._tokenizer, token) or ""
        return text


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
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back for a stop string that never came."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
