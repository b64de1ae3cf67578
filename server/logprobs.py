"""Log probabilities in the two shapes that OpenAI's APIs give them."""

from collections.abc import Sequence
from typing import Any

from batching.types import TokenLogprob
from server.text import Text

LEAST = -9999.0
"""What stands for a probability of zero, whose logarithm JSON has no number for."""


def chat_logprobs(text: Text, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    """`logprobs` of a chat choice or chunk; None if there are no entries."""
    if not entries:
        return None
    content = [
        _token(text, entry.token, entry.logprob) | {"top_logprobs": [_token(text, *other) for other in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(text: Text, entries: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
    """`logprobs` of a completion's choice or chunk whose text starts at character `offset`."""
    if not entries:
        return None
    words = [text.decode([entry.token]) for entry in entries]
    ends = [offset + sum(map(len, words[:place])) for place in range(len(words))]
    return {
        "tokens": words,
        "token_logprobs": [max(entry.logprob, LEAST) for entry in entries],
        "top_logprobs": [{text.decode([token]): max(value, LEAST) for token, value in e.top} for e in entries],
        "text_offset": ends,
    }


def _token(text: Text, token: int, logprob: float) -> dict[str, Any]:
    return {"token": text.decode([token]), "logprob": max(logprob, LEAST), "bytes": list(text.token_bytes(token))}
