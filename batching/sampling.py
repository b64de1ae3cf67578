"""Choosing the next token of every row of a batch at once, each row by its own request's settings.

Worker thread only. The law it keeps: a row's token depends on the row's own logits, settings and seed, and on nothing
else in the batch. So a draw is a function of (seed, position), and every reduction runs along the vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from batching.types import Request, Sampling

CANDIDATES = 256
"""How many of a row's largest logits are sorted. Only a row that needs more to reach its top_p sorts them all."""

OFF = float("inf")


class Sampler:
    """Next tokens for one batch. `requests` are its rows in order; all state is on `device`.

    Call it once a step. Rows that are greedy and have no penalties cost one argmax together.
    """

    def __init__(self, requests: Sequence[Request], vocab_size: int, device: torch.device) -> None:
        self._position = 0
        self._penalties = Penalties.of(requests, vocab_size, device)
        drawn = [row for row, request in enumerate(requests) if not request.sampling.greedy]
        self._drawn = torch.tensor(drawn, device=device) if drawn else None
        self._seeds = torch.tensor([requests[row].sampling.seed for row in drawn], device=device)
        self._filter = Filter([requests[row].sampling for row in drawn], device)

    @property
    def plain(self) -> bool:
        """Whether the largest logit of every row is its token, with nothing to apply or to draw."""
        return self._drawn is None and self._penalties is None

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [rows, vocabulary] in float32, which may be written over -> tokens [rows] in int64."""
        if self._penalties:
            self._penalties.apply(logits)
        tokens = logits.argmax(-1)
        if self._drawn is not None:
            tokens[self._drawn] = self._draw(logits[self._drawn])
        if self._penalties:
            self._penalties.count(tokens)
        self._position += 1
        return tokens

    def _draw(self, logits: Tensor) -> Tensor:
        probabilities = self._filter(logits)
        # Summed in vocabulary order, so that how a cut-off was found cannot change which token a draw lands on.
        cumulative = probabilities.cumsum(-1)
        target = uniform(self._seeds, self._position)[:, None] * cumulative[:, -1:]
        # The first token whose sum exceeds the target, hence never one of probability 0. Rounding can put the target
        # on the last sum itself, which no token exceeds: the last token that adds to the sum is meant then.
        last = (cumulative < cumulative[:, -1:]).sum(-1)
        return torch.minimum(torch.searchsorted(cumulative, target, right=True).squeeze(-1), last)


def uniform(seeds: Tensor, position: int) -> Tensor:
    """Numbers in [0, 1), multiples of 2**-24, that depend on seed [rows, int64] and position alone.

    Two rounds of the splitmix64 mixer (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
    """
    bits = _mix(_mix(seeds) + position)
    return (_shift(bits, 40)).to(torch.float32) * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A right shift that fills with zeros: torch's own repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device, dtype=torch.float32)[:, None]


class Filter:
    """Temperature, top_k, top_p and min_p of sampled rows: logits -> probabilities, zero where cut off.

    Each limit comes down to a smallest logit that stays. Ties at it all stay, so sort order cannot matter.
    """

    def __init__(self, samplings: Sequence[Sampling], device: torch.device) -> None:
        self._temperature = _column([sampling.temperature for sampling in samplings], device)
        self._top_k = _column([sampling.top_k or OFF for sampling in samplings], device)
        # Above 1, because rounding may bring a cumulative probability to 1 too early.
        self._top_p = _column([s.top_p if s.top_p < 1.0 else OFF for s in samplings], device)
        self._min_p = _column([sampling.min_p for sampling in samplings], device)
        self._unlimited = (self._top_k == OFF) & (self._top_p == OFF) & (self._min_p == 0.0)
        self._cuts = not bool(self._unlimited.all())

    def __call__(self, logits: Tensor) -> Tensor:
        """[rows, vocabulary] in float32 -> probabilities of the same shape."""
        # Shifted first: a small temperature cannot overflow then, and the largest logit is exactly 0.
        scaled = (logits - logits.amax(-1, keepdim=True)) / self._temperature
        if self._cuts:
            scaled = scaled.masked_fill(scaled < self._smallest_kept(scaled), -OFF)
        return scaled.softmax(-1)

    def _smallest_kept(self, scaled: Tensor) -> Tensor:
        """The cut-off of each row, [rows, 1]."""
        # Not `exp().sum()`: torch sums a lone row in another order than one of many, and the last bit would differ.
        total = 1.0 / scaled.softmax(-1).amax(-1, keepdim=True)
        everyone = torch.ones(len(scaled), dtype=torch.bool, device=scaled.device)
        largest = scaled.topk(min(CANDIDATES, scaled.shape[-1])).values
        smallest, enough = self._cut(largest, total, everyone)
        short = ~(enough | self._unlimited).squeeze(-1)
        if bool(short.any()):
            ordered = scaled[short].sort(descending=True).values
            smallest[short], _ = self._cut(ordered, total[short], short)
        return smallest.masked_fill(self._unlimited, -OFF)

    def _cut(self, largest: Tensor, total: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """From the largest scaled logits in falling order [rows, n]: the smallest kept, and whether n were enough.

        `total` [rows, 1] is the sum of the exponentials of all of a row's logits, the largest of which is 1.
        """
        top_k = self._top_k[rows]
        within_k = torch.arange(largest.shape[-1], device=largest.device) < top_k
        weights = largest.exp() * within_k
        total = torch.where(top_k <= largest.shape[-1], weights.sum(-1, keepdim=True), total)
        before = weights.cumsum(-1) - weights
        kept = within_k & (before < self._top_p[rows] * total) & (weights >= self._min_p[rows])
        kept[:, 0] = True
        smallest = largest.gather(-1, kept.sum(-1, keepdim=True) - 1)
        return smallest, (top_k <= largest.shape[-1]) | ~kept[:, -1:]


class Penalties:
    """Presence, frequency and repetition penalties of the rows that have any, over counts [those rows, vocabulary].

    Repetition first, as transformers defines it (logits of tokens in prompt or output divided if positive, else
    multiplied); then frequency and presence as OpenAI does (logit -= count x frequency + (count > 0) x presence, over
    the output alone).
    """

    def __init__(self, rows: list[int], requests: Sequence[Request], vocab_size: int, device: torch.device) -> None:
        samplings = [requests[row].sampling for row in rows]
        self._rows = torch.tensor(rows, device=device)
        self._presence = _column([sampling.presence_penalty for sampling in samplings], device)
        self._frequency = _column([sampling.frequency_penalty for sampling in samplings], device)
        self._repetition = _column([sampling.repetition_penalty for sampling in samplings], device)
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
        """Penalise `logits` [all rows, vocabulary] in place."""
        chosen = logits[self._rows]
        seen = self._prompt | (self._counts > 0)
        repeated = torch.where(chosen > 0, chosen / self._repetition, chosen * self._repetition)
        chosen = torch.where(seen, repeated, chosen)
        chosen -= self._counts * self._frequency + (self._counts > 0) * self._presence
        logits[self._rows] = chosen

    def count(self, tokens: Tensor) -> None:
        """Note the tokens [all rows] that were chosen."""
        mine = tokens[self._rows][:, None]
        self._counts.scatter_add_(1, mine, torch.ones_like(mine, dtype=self._counts.dtype))
