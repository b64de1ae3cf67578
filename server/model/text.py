"""Text to token ids and back: chat template, tokenizer, incremental decoding.

`Text.render` and `Text.encode` take milliseconds and run on a helper thread; the rest is called once per token on the
event loop.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from tokenizers import Encoding, Tokenizer, normalizers, pre_tokenizers

from batching.errors import ModelError, explained, first_line
from server.http.errors import bad_request, thousands
from server.output.detokenize import Detokenizer, Vocabulary
from server.output.model_format import PART_TAGS, format_of
from server.output.prefix_tree import any_of
from server.output.tool_calls import ShownTool, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from server.grammar.compiler import Grammars


logger = logging.getLogger(__name__)

MAX_TOKENS = 2**20
"""Tokens of a text, as many as the longest context windows have. Their list is made in one call that holds the GIL for
about 30 ms."""


BREAK = "".join(chr(0xF0000 + secrets.randbelow(0xFFFE)) for _ in range(4))
"""Unguessable private-use characters, so that no client's text contains them by chance or on purpose."""

PIECE = 65_536
"""Characters that are searched at a time: about a millisecond."""

PART = 1_024
"""Characters of a text that a thread tokenizes at least: half a millisecond."""

TOGETHER = 64
"""Parts that are tokenized in one call, a few for each core: the library's threads take no part of another text before
they have done all of these."""

CUT = re.compile(r"(?= \w)(?<=\S)|\n(?<=\S\n)(?=\w)")
"""Ends where a text can be cut: before a lone space with a word after it, or between a word and a lone line break."""

WORDS = frozenset(
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{words}+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for words in (
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]",  # Qwen 2 to 3
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]",  # Qwen 3.5
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]",  # Llama 3
    )
)
"""Patterns of words, each of which ends at every `CUT` and is found without looking beyond it. GPT-2's is another."""

Broken = TypeVar("Broken")


class Markers:
    """Keeps text from clients that looks like the model's special tokens plain text.

    A tokenizer turns the text of an added token, such as `<|im_end|>`, into that token wherever it occurs. In a message
    it would end the turn, and a retrieved document could continue as another role. So such text is broken up before the
    chat template sees it: `BREAK` is inserted after its first character, passes through templates and JSON unchanged,
    and is dropped by the tokenizer after it has looked for added tokens. Other text is tokenized as usual.

    What is broken up where in a conversation:

    - everywhere, the tokens flagged as special and those that the template itself writes: they delimit turns;
    - tags of parts of a turn (`model_format.PART_TAGS`) only in tool definitions, calls and results, which are data and
      must not close the part they are in. Elsewhere templates and clients may use them on purpose: a history has
      thoughts, a system message may explain how to call a tool, and models only know these tags as tokens.

    Prompts of `/v1/completions` are raw: every token in them counts.

    `texts`: those of some added tokens with at least two characters; a single character cannot be broken up.
    """

    def __init__(self, texts: Collection[str]) -> None:
        self.texts = frozenset(texts)
        self._starts = {text[:end] for text in texts for end in range(1, len(text))}
        self._longest = max(map(len, self._starts), default=1)
        self._first = {text[0] for text in texts}
        groups = groupby(sorted(texts), key=lambda text: text[0])
        # Matches only the first character, by look-ahead, because one marker may start inside another.
        found = [f"{re.escape(first)}(?={any_of([text[1:] for text in group])})" for first, group in groups]
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


def drop_breaks(tokenizer: Tokenizer) -> None:
    """Make the tokenizer drop every `BREAK` after it has looked for added tokens."""
    former: pre_tokenizers.PreTokenizer | None = tokenizer.pre_tokenizer
    if BREAK not in repr(former):  # or another `Text` has done it
        dropped = pre_tokenizers.Split(BREAK, "removed")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([dropped, former] if former else [dropped])


def can_be_cut(tokenizer: Tokenizer) -> bool:
    """Whether the tokens of any text are those of its parts if it is cut at any `CUT`: no word and no added token, nor
    white space that belongs to one, reaches across."""
    tokens = tokenizer.get_added_tokens_decoder().values()
    return (
        _state(tokenizer.normalizer) in (None, {"type": "NFC"})
        and bool(_ends_words(_state(tokenizer.pre_tokenizer)))
        and not any(
            CUT.search("x" + "\n" * token.lstrip + token.content + " " * token.rstrip + "x") for token in tokens
        )
    )


def _state(part: normalizers.Normalizer | pre_tokenizers.PreTokenizer | None) -> Any:
    """As in the tokenizer's file."""
    with suppress(Exception):  # a model's own code may bring a part that has no such form
        return part and json.loads(part.__getstate__())
    return "unknown"


def _ends_words(splitter: object) -> bool | None:
    """Whether a pre-tokenizer ends a word at each `CUT`; None if it splits only what others leave, without looking
    around."""
    match splitter:
        case {"type": "Sequence", "pretokenizers": [*splitters]}:
            found = set(map(_ends_words, splitters))
            return False not in found and (True in found or None)
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return pattern in WORDS
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": by_words}:
            return by_words or None
        case {"type": "Split", "pattern": {"String": text}, "behavior": "Removed"} if text == BREAK:
            return None
        case {"type": "Digits"}:
            return None
    return False


def parts_of(text: str) -> list[str]:
    """The text, cut once in `PART` characters where there is a `CUT` among them."""
    found = (CUT.search(text, start, start + PART) for start in range(PART, len(text), PART))
    return [text[start:end] for start, end in pairwise([0, *(cut.end() for cut in found if cut), len(text)])]


class Text:
    """The served model's tokenizer and chat template. Thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._chat = tokenizer
        self._tokenizer: Tokenizer = tokenizer.backend_tokenizer
        # A tokenizer file may enable both, but clients' text must be encoded completely and unchanged.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocabulary = Vocabulary(self._tokenizer, PART_TAGS)
        drop_breaks(self._tokenizer)
        self._can_be_cut = can_be_cut(self._tokenizer)
        added = self._tokenizer.get_added_tokens_decoder().values()
        self.format = format_of(
            str(tokenizer.chat_template), added, self.encode, renders_system=_renders_system(tokenizer)
        )
        self._turn_markers = Markers(self.format.turn_tokens)
        self._all_markers = Markers(self.format.turn_tokens | PART_TAGS.intersection(token.content for token in added))
        stop = tokenizer.eos_token_id
        self.stop_token_ids: frozenset[int] = frozenset() if stop is None else frozenset([stop])

    @classmethod
    def load(cls, checkpoint: str, *, trust_remote_code: bool = False) -> Text:
        """Load the tokenizer in a model's folder. Raises `ModelError` if there is none or it has no chat template."""
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        with explained(f"no usable tokenizer in {checkpoint}"):
            if not trust_remote_code:  # a tokenizer's own code may read any file
                _check_for_tokenizer(Path(checkpoint))
            try:
                tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
            except Exception:
                _check_for_sentencepiece(Path(checkpoint))
                raise
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ModelError(f"the tokenizer in {checkpoint} has no fast form (tokenizer.json), which streaming needs")
        if not tokenizer.chat_template:
            raise ModelError(f"the tokenizer in {checkpoint} has no chat template, so it cannot serve chats")
        _check_template(tokenizer, checkpoint)
        return cls(tokenizer)

    def render(
        self,
        messages: Sequence[Turn],
        tools: Sequence[ShownTool] = (),
        *,
        thinks: bool = False,
        opens_answer: bool = True,
        continued: str | None = None,
    ) -> str:
        """The rendered conversation, in which no text of a client becomes a special token (`Markers`).

        It ends where the assistant's answer starts if it `opens_answer`, or with `continued`, after that field of the
        last message. Raises `ApiError` 400 with the template's own message if it refuses the conversation.
        """
        from jinja2 import TemplateError

        turns, options = self.format.conversation(
            [self._as_text(message) for message in messages], self._all_markers.broken([*tools])
        )
        try:
            rendered = self._chat.apply_chat_template(
                cast("list[dict[str, str]]", turns),  # the type that transformers declares
                tokenize=False,
                add_generation_prompt=opens_answer and continued is None,
                continue_final_message=continued or False,
                enable_thinking=thinks,
                **options,
            )
        except (TemplateError, TypeError, ValueError) as error:
            message = f"The model's chat template refuses the messages: {first_line(error)}."
            raise bad_request(message, "messages") from None
        return str(rendered)

    def _as_text(self, message: Turn) -> Turn:
        markers = self._all_markers if message["role"] == "tool" else self._turn_markers
        kept = {key: markers.broken(value) for key, value in message.items() if key not in ("role", "tool_calls")}
        calls = {"tool_calls": self._all_markers.broken(message["tool_calls"])} if "tool_calls" in message else {}
        return cast(Turn, {"role": message["role"]} | kept | calls)

    def encode(self, text: str, *, special: bool = False) -> tuple[int, ...]:
        """The token ids of a text. `special` adds the model's beginning and end tokens. Raises `ApiError` 400 for more
        than `MAX_TOKENS`."""
        whole = not self._can_be_cut or (special and self._tokenizer.num_special_tokens_to_add(is_pair=False))
        encodings = list(self._encodings([text] if whole else parts_of(text), special))
        count = sum(map(len, encodings))
        if count > MAX_TOKENS:
            del encodings  # freed here, because the error takes this frame to the event loop
            raise bad_request(
                f"The text has {thousands(count)} tokens, but at most {thousands(MAX_TOKENS)} can be read; shorten it.",
                code="context_length_exceeded",
            )
        return tuple(chain.from_iterable(encoding.ids for encoding in encodings))

    def _encodings(self, parts: Sequence[str], special: bool) -> Iterator[Encoding]:
        # Only the batch methods release the GIL, which the worker and the event loop need, and use several threads.
        for start in range(0, len(parts), TOGETHER):
            yield from self._tokenizer.encode_batch_fast(parts[start : start + TOGETHER], add_special_tokens=special)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.vocabulary.decode(list(tokens))

    def grammars(self) -> Grammars:
        """A grammar compiler for this vocabulary. Takes seconds for a large one, so not on the event loop. Raises
        `ModelError` for a kind of tokenizer that it cannot read."""
        from server.grammar.compiler import Grammars

        with explained("this tokenizer cannot be used for structured output"):
            return Grammars(self._chat, self.format.thinking.tags if self.format.thinking else None)

    def detokenizer(self, *, special: bool = False, after: Sequence[int] = ()) -> Detokenizer:
        """A detokenizer for one row, whose text continues that of the tokens `after`, or of none; special tokens appear
        in the text if `special`."""
        return Detokenizer(self.vocabulary, special=special, after=after)


def _check_for_tokenizer(folder: Path) -> None:
    """Raises `ModelError` if a local folder has no file of any kind of tokenizer: for Qwen, GPT-2 and Gemma the library
    would make one without words."""
    kinds = ("tokenizer.*", "tekken.json", "vocab.*", "*.model")
    if folder.is_dir() and not any(any(folder.glob(kind)) for kind in kinds):
        raise ModelError(f"there is no tokenizer (tokenizer.json) in {folder}")


def _check_for_sentencepiece(folder: Path) -> None:
    """Raises `ModelError` if the folder's tokenizer is in that format alone and the package is missing, without which
    the library takes it for another."""
    if find_spec("sentencepiece") is None and any(folder.glob("*.model")) and not (folder / "tokenizer.json").exists():
        raise ModelError(f"the tokenizer in {folder} needs two more packages: pip install sentencepiece protobuf")


def _renders_system(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the chat template shows a system message: some refuse it, and some leave it out."""
    turns = [{"role": "system", "content": BREAK}, {"role": "user", "content": "Hi"}]
    try:
        return BREAK in str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:
        return False


def _check_template(tokenizer: PreTrainedTokenizerFast, checkpoint: str) -> None:
    """Raises `ModelError` if the chat template is malformed. A refusal is fine: it may require other messages."""
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    except TemplateSyntaxError as error:
        place = f"has a syntax error in line {error.lineno}"
        raise ModelError(f"the chat template in {checkpoint} {place}: {error.message}") from error
    except Exception as error:
        logger.debug("the chat template rejects a single user message: %s", error)
