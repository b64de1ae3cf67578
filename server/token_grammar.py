"""A compiled grammar and a row's place in it: `batching`'s protocols over llguidance. For one thread at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from server.grammar_source import matcher_of

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray


class TokenGrammar:
    """`batching.types.Grammar` over llguidance, for the rows of one request.

    All copies of a matcher share a lexer and what it may take. Once it has taken that, the masks of all of them are
    wrong without a word; so no two requests may share a grammar.
    """

    def __init__(self, source: str, tokens: LLTokenizer) -> None:
        """Compiles, which takes milliseconds. Raises ValueError if that cannot be."""
        self._matcher = matcher_of(source, tokens)  # stays at its beginning
        self._tokens = tokens
        if self._matcher.is_error():
            raise ValueError(_first_line(self._matcher.get_error()))

    def matcher(self) -> TokenMatcher:
        return TokenMatcher(self._matcher.deep_copy(), self._tokens)


class TokenMatcher:
    """`batching.types.Matcher` over llguidance."""

    def __init__(self, matcher: LLMatcher, tokens: LLTokenizer) -> None:
        self._matcher = matcher
        self._vocab_size = tokens.vocab_size
        self._words = -(-tokens.vocab_size // 32)
        self._eos = tokens.eos_tokens

    def fill(self, allowed: NDArray[np.int32]) -> bool:
        """See `Matcher`. Tokens that only the tokenizer or only the model has are never allowed."""
        fits = len(allowed) >= self._words
        mask = allowed[: self._words] if fits else np.zeros(self._words, np.int32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            raise ValueError(_first_line(self._matcher.get_error()))
        for token in self._eos:  # the library's way to say that the text may end; the caller has its own
            mask[token >> 5] &= ~np.left_shift(np.int32(1), np.int32(token & 31))
        if not fits:
            allowed[:] = mask[: len(allowed)]
        return self._matcher.is_accepting()

    def advance(self, token: int) -> None:
        """See `Matcher`."""
        if token >= self._vocab_size or not self._matcher.consume_token(token):
            raise ValueError(f"token {token} may not come here")


def _first_line(error: str) -> str:
    return (error.splitlines() or ["unknown"])[0][:200]
