"""Log probabilities in the two formats of OpenAI's APIs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar, cast

import orjson

from batching.types import PromptLogprob, TokenLogprob
from server import replies
from server.model.text import Text

LEAST = -9999.0
"""Stands for the logarithm of zero, which JSON cannot express."""

JOINED = 256
"""Parts of a list that are joined, so that the last step, which copies all of them, has few."""

Piece = TypeVar("Piece", bound=Mapping[str, object])


def chat_logprobs(text: Text, entries: Sequence[TokenLogprob], *, as_ids: bool = False) -> replies.ChatLogprobs | None:
    """`logprobs` of a chat choice or chunk; None if there are no entries. `as_ids`: tokens are named by their ids."""
    if not entries:
        return None
    name = _id if as_ids else _decoded
    content: list[replies.ChosenToken] = [
        {
            **_token(text, entry.token, entry.logprob, name),
            "top_logprobs": [_token(text, *other, name) for other in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


class EncodedLists(Generic[Piece]):
    """The lists of a whole answer's `logprobs`, encoded as they grow, because they can reach megabytes."""

    def __init__(self) -> None:
        self._lists: dict[str, list[orjson.Fragment]] = {}  # each of several elements, and commas between them
        self._newest: dict[str, list[bytes]] = {}  # what is to become the next of those
        self._rest: dict[str, object] = {}

    def add(self, piece: Piece | None) -> None:
        """Append the lists of the next `chat_logprobs` or `CompletionLogprobs.push`, none of which is empty."""
        for key, value in piece.items() if piece else ():
            if isinstance(value, list):
                newest = self._newest.setdefault(key, [])
                newest.append(orjson.dumps(value)[1:-1])
                if len(newest) == JOINED:
                    self._join(key)
            else:
                self._rest[key] = value

    def whole(self) -> Piece | None:
        """Everything as one piece for orjson; its lists are already JSON. None if nothing was added."""
        if not (self._lists or self._newest):
            return None
        for key in [*self._newest]:
            self._join(key)
        return cast(Piece, self._lists | self._rest)

    def _join(self, key: str) -> None:
        self._lists.setdefault(key, []).append(orjson.Fragment(b",".join(self._newest.pop(key))))


class CompletionLogprobs:
    """`logprobs` of one completion, whole or piece by piece. Its text starts at character `offset`, after these tokens.

    `as_ids`: tokens are named by their ids.
    """

    def __init__(self, text: Text, offset: int, after: Sequence[int], *, as_ids: bool = False) -> None:
        self._text = text
        self._as_ids = as_ids
        self._offset = offset
        self._detokenizer = text.detokenizer(after=after)

    def push(self, entries: Sequence[TokenLogprob]) -> replies.TextLogprobs | None:
        """The next tokens; None if there are no entries."""
        if not entries:
            return None
        tokens = [entry.token for entry in entries]
        starts = [self._start(token) for token in tokens]
        return completion_logprobs(self._text, tokens, entries, starts, as_ids=self._as_ids)

    def _start(self, token: int) -> int:
        """Where the token's text starts; tokens that share a character all start where it does."""
        start = self._offset
        self._offset += len(self._detokenizer.push([token]))
        return start


def completion_logprobs(
    text: Text,
    tokens: Sequence[int],
    entries: Sequence[TokenLogprob | None],
    starts: Sequence[int],
    top: int | None = None,
    *,
    as_ids: bool = False,
) -> replies.TextLogprobs:
    """`logprobs` of these tokens, whose texts start at `starts`, with the `top` likeliest or all there are."""
    name = _id if as_ids else _word
    return {
        "tokens": [name(text, token) for token in tokens],
        "token_logprobs": [None if entry is None else max(entry.logprob, LEAST) for entry in entries],
        "top_logprobs": [None if entry is None else _likely(text, entry, top, name) for entry in entries],
        "text_offset": list(starts),
    }


def _likely(text: Text, entry: TokenLogprob, top: int | None, name: Callable[[Text, int], str]) -> dict[str, float]:
    """The `top` likeliest tokens, or all there are, and as in OpenAI's API the entry's own where it is none of them."""
    likeliest = {name(text, token): max(value, LEAST) for token, value in entry.top[:top]}
    return likeliest | {name(text, entry.token): max(entry.logprob, LEAST)}


def prompt_logprobs(text: Text, entries: Sequence[PromptLogprob | None], top: int | None = None) -> replies.OfPrompt:
    """vLLM's `prompt_logprobs`: at each position the prompt's token and the `top` likeliest (or all), by id."""
    return {"prompt_logprobs": [None if entry is None else _ranked(text, entry, top) for entry in entries]}


def _ranked(text: Text, entry: PromptLogprob, top: int | None) -> dict[str, replies.RankedToken]:
    likeliest = [(token, value, rank) for rank, (token, value) in enumerate(entry.top[:top], 1)]
    return {
        str(token): {"logprob": max(value, LEAST), "rank": rank, "decoded_token": _decoded(text, token)}
        for token, value, rank in [(entry.token, entry.logprob, entry.rank), *likeliest]
    }


def _word(text: Text, token: int) -> str:
    """A token's text or, if it is not whole characters, its bytes as in OpenAI's API, to tell such tokens apart."""
    word = _decoded(text, token)
    if "\ufffd" not in word:
        return word
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text.vocabulary.bytes_of(token))


def _id(text: Text, token: int) -> str:
    return f"token_id:{token}"


def _token(text: Text, token: int, logprob: float, name: Callable[[Text, int], str]) -> replies.LikelyToken:
    data = list(text.vocabulary.bytes_of(token))
    return {"token": name(text, token), "logprob": max(logprob, LEAST), "bytes": data}


def _decoded(text: Text, token: int) -> str:
    return text.vocabulary.bytes_of(token).decode(errors="replace")
