"""Changes to logits before sampling, for the rows of a batch that need them.

Worker thread only. Each kind is created once per batch by its `of`, which returns None if no row needs it, so that
unused kinds cost nothing.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from batching.types import Forced, Request


class LogitsProcessor(Protocol):
    """One kind of change, for all rows of a batch that need it."""

    def apply(self, logits: Tensor) -> None:
        """Change `logits` [all rows, vocabulary] in place, only in its own rows."""
        ...

    def accept_tokens(self, tokens: Tensor) -> None:
        """Take the sampled tokens [all rows]."""
        ...


def column(values: Sequence[float], device: torch.device) -> Tensor:
    """One number per row, [rows, 1] in float32."""
    return torch.tensor(values, device=device, dtype=torch.float32)[:, None]


class Penalties:
    """Presence, frequency and repetition penalties of the rows that have any, over counts [those rows, vocabulary].

    Repetition first, as transformers defines it (logits of tokens in prompt or output divided if positive, else
    multiplied); then frequency and presence as OpenAI does (logit -= count x frequency + (count > 0) x presence, over
    the output alone).
    """

    def __init__(self, rows: list[int], requests: Sequence[Request], vocab_size: int, device: torch.device) -> None:
        samplings = [requests[row].sampling for row in rows]
        self._rows = torch.tensor(rows, device=device)
        self._presence = column([sampling.presence_penalty for sampling in samplings], device)
        self._frequency = column([sampling.frequency_penalty for sampling in samplings], device)
        self._repetition = column([sampling.repetition_penalty for sampling in samplings], device)
        self._counts = torch.zeros(len(rows), vocab_size, device=device)
        self._prompt = torch.zeros(len(rows), vocab_size, device=device, dtype=torch.bool)
        for place, row in enumerate(rows):
            self._prompt[place, torch.tensor(requests[row].prompt, device=device)] = True

    @classmethod
    def of(cls, requests: Sequence[Request], vocab_size: int, device: torch.device) -> "Penalties | None":
        """The penalties of a batch, or None if no row has any."""
        rows = [row for row, request in enumerate(requests) if request.sampling.penalised]
        return cls(rows, requests, vocab_size, device) if rows else None

    def apply(self, logits: Tensor) -> None:
        chosen = logits[self._rows]
        seen = self._prompt | (self._counts > 0)
        repeated = torch.where(chosen > 0, chosen / self._repetition, chosen * self._repetition)
        chosen = torch.where(seen, repeated, chosen)
        chosen -= self._counts * self._frequency + (self._counts > 0) * self._presence
        logits[self._rows] = chosen

    def accept_tokens(self, tokens: Tensor) -> None:
        mine = tokens[self._rows][:, None]
        self._counts.scatter_add_(1, mine, torch.ones_like(mine, dtype=self._counts.dtype))


class LogitBias:
    """`logit_bias`; and `min_tokens`, which masks a row's stop tokens until it has that many tokens.

    Both change single logits: rows, tokens and values, three flat tensors each. Stop tokens that only the tokenizer has
    need no mask.
    """

    def __init__(self, requests: Sequence[Request], vocab_size: int, device: torch.device) -> None:
        self._num_output_tokens = 0
        self._logit_bias = _SparseBias(
            [(row, token, bias) for row, r in enumerate(requests) for token, bias in r.sampling.logit_bias], device
        )
        self._min_tokens = [
            (row, token, r.sampling.min_tokens)
            for row, r in enumerate(requests)
            if r.sampling.min_tokens
            for token in sorted(r.sampling.stop_token_ids)
            if 0 <= token < vocab_size
        ]
        self._device = device
        self._barred_stops = self._barred_at(0)

    @classmethod
    def of(cls, requests: Sequence[Request], vocab_size: int, device: torch.device) -> "LogitBias | None":
        """The biases of a batch, or None if no row has any."""
        wanted = any(request.sampling.logit_bias or request.sampling.min_tokens for request in requests)
        return cls(requests, vocab_size, device) if wanted else None

    def apply(self, logits: Tensor) -> None:
        self._logit_bias.add_to(logits)
        self._barred_stops.add_to(logits)

    def accept_tokens(self, tokens: Tensor) -> None:
        self._num_output_tokens += 1
        if any(least == self._num_output_tokens for _, _, least in self._min_tokens):
            self._barred_stops = self._barred_at(self._num_output_tokens)

    def _barred_at(self, position: int) -> "_SparseBias":
        barred = [(row, token, -float("inf")) for row, token, least in self._min_tokens if position < least]
        return _SparseBias(barred, self._device)


class _SparseBias:
    """Values to add to single logits."""

    def __init__(self, places: Sequence[tuple[int, int, float]], device: torch.device) -> None:
        self._empty = not places
        rows, tokens, values = zip(*places, strict=True) if places else ((), (), ())
        self._index = (torch.tensor(rows, device=device).long(), torch.tensor(tokens, device=device).long())
        self._values = torch.tensor(values, device=device, dtype=torch.float32)

    def add_to(self, logits: Tensor) -> None:
        if not self._empty:
            logits.index_put_(self._index, self._values, accumulate=True)


class ForcedRow:
    """`Sampling.forced` of one row: from some step on its tokens are given, unless it has sampled a certain token."""

    def __init__(self, forced: Forced) -> None:
        self._forced = forced
        self._is_waiting = True
        self._pending: list[int] = []
        self._num_output_tokens = 0

    @property
    def next_token(self) -> int | None:
        """The token that the row must take now, if there is one."""
        return self._pending[0] if self._pending else None

    def accept_token(self, token: int) -> None:
        """Take the row's newest token."""
        self._num_output_tokens += 1
        forced = self._forced
        if self._pending:
            self._pending.pop(0)
        elif token == forced.unless or (self._num_output_tokens == 1 and forced.first not in (None, token)):
            self._is_waiting = False
        elif self._is_waiting and self._num_output_tokens >= forced.after:
            self._pending = list(forced.tokens)
            self._is_waiting = False


class ForcedTokens:
    """The rows that have forced tokens."""

    def __init__(self, asked: dict[int, Forced], device: torch.device) -> None:
        self._rows = list(asked)
        self._index = torch.tensor(self._rows, device=device)
        self._forced = [ForcedRow(forced) for forced in asked.values()]

    @classmethod
    def of(cls, requests: Sequence[Request], vocab_size: int, device: torch.device) -> "ForcedTokens | None":
        """The forced tokens of a batch, or None if no row has any."""
        asked = {row: r.sampling.forced for row, r in enumerate(requests) if r.sampling.forced is not None}
        return cls(asked, device) if asked else None

    def apply(self, logits: Tensor) -> None:
        next_tokens = {row: forced.next_token for row, forced in zip(self._rows, self._forced, strict=True)}
        given = {row: token for row, token in next_tokens.items() if token is not None}
        if given:
            logits[list(given)] = -float("inf")
            logits[list(given), list(given.values())] = 0.0

    def accept_tokens(self, tokens: Tensor) -> None:
        for forced, token in zip(self._forced, tokens[self._index].tolist(), strict=True):
            forced.accept_token(token)
