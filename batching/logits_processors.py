"""What changes a row's logits before its token is chosen, for the rows of a batch that ask for it.

Worker thread only. Each kind is made once a batch by its `of`, which answers None if no row needs it, so that what
nobody asks for costs nothing.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from batching.types import Forced, Request


class Adjustment(Protocol):
    """One kind of change, over all rows of a batch that have it."""

    def apply(self, logits: Tensor) -> None:
        """Change `logits` [all rows, vocabulary] in place, those of its own rows only."""
        ...

    def advance(self, tokens: Tensor) -> None:
        """Take note of the tokens [all rows] that were chosen."""
        ...


def column(values: Sequence[float], device: torch.device) -> Tensor:
    """One number a row, [rows, 1] in float32."""
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
        """See `Adjustment`."""
        chosen = logits[self._rows]
        seen = self._prompt | (self._counts > 0)
        repeated = torch.where(chosen > 0, chosen / self._repetition, chosen * self._repetition)
        chosen = torch.where(seen, repeated, chosen)
        chosen -= self._counts * self._frequency + (self._counts > 0) * self._presence
        logits[self._rows] = chosen

    def advance(self, tokens: Tensor) -> None:
        """See `Adjustment`."""
        mine = tokens[self._rows][:, None]
        self._counts.scatter_add_(1, mine, torch.ones_like(mine, dtype=self._counts.dtype))


class Bias:
    """`logit_bias`, added; and `min_tokens`, which keeps a row's stop tokens out until it has that many.

    Both are single places in the logits: rows, tokens and values, three flat tensors each.
    """

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        self._position = 0
        self._added = _Places(
            [(row, token, bias) for row, r in enumerate(requests) for token, bias in r.sampling.logit_bias], device
        )
        self._early = [
            (row, token, r.sampling.min_tokens)
            for row, r in enumerate(requests)
            if r.sampling.min_tokens
            for token in sorted(r.sampling.stop_token_ids)
        ]
        self._device = device
        self._kept_out = self._places_at(0)

    @classmethod
    def of(cls, requests: Sequence[Request], vocab_size: int, device: torch.device) -> "Bias | None":
        """The biases of a batch, or None if no row has any."""
        wanted = any(request.sampling.logit_bias or request.sampling.min_tokens for request in requests)
        return cls(requests, device) if wanted else None

    def apply(self, logits: Tensor) -> None:
        """See `Adjustment`."""
        self._added.add_to(logits)
        self._kept_out.add_to(logits)

    def advance(self, tokens: Tensor) -> None:
        """See `Adjustment`."""
        self._position += 1
        if any(least == self._position for _, _, least in self._early):
            self._kept_out = self._places_at(self._position)

    def _places_at(self, position: int) -> "_Places":
        barred = [(row, token, -float("inf")) for row, token, least in self._early if position < least]
        return _Places(barred, self._device)


class _Places:
    """Values to add at single places of the logits."""

    def __init__(self, places: Sequence[tuple[int, int, float]], device: torch.device) -> None:
        self._empty = not places
        rows, tokens, values = zip(*places, strict=True) if places else ((), (), ())
        self._index = (torch.tensor(rows, device=device).long(), torch.tensor(tokens, device=device).long())
        self._values = torch.tensor(values, device=device, dtype=torch.float32)

    def add_to(self, logits: Tensor) -> None:
        if not self._empty:
            logits.index_put_(self._index, self._values, accumulate=True)


class Forcing:
    """`Sampling.forced`: from some step on a row's tokens are given, unless it has said a certain one itself."""

    def __init__(self, asked: dict[int, Forced], device: torch.device) -> None:
        self._rows = list(asked)
        self._index = torch.tensor(self._rows, device=device)
        self._asked = list(asked.values())
        self._waiting = [True] * len(asked)
        self._given: list[list[int]] = [[] for _ in asked]
        self._position = 0

    @classmethod
    def of(cls, requests: Sequence[Request], vocab_size: int, device: torch.device) -> "Forcing | None":
        """Those of a batch, or None if no row has any."""
        asked = {row: r.sampling.forced for row, r in enumerate(requests) if r.sampling.forced is not None}
        return cls(asked, device) if asked else None

    def next_of(self, place: int) -> int | None:
        """The token that is given to the row at `place` now, if one is."""
        return self._given[place][0] if self._given[place] else None

    def apply(self, logits: Tensor) -> None:
        """See `Adjustment`."""
        rows = [row for row, given in zip(self._rows, self._given, strict=True) if given]
        if rows:
            logits[rows] = -float("inf")
            logits[rows, [given[0] for given in self._given if given]] = 0.0

    def advance(self, tokens: Tensor) -> None:
        """See `Adjustment`."""
        self._position += 1
        for place, token in enumerate(tokens[self._index].tolist()):
            asked = self._asked[place]
            if self._given[place]:
                self._given[place].pop(0)
            elif token == asked.unless:
                self._waiting[place] = False
            elif self._waiting[place] and self._position >= asked.after:
                self._given[place] = list(asked.tokens)
                self._waiting[place] = False
