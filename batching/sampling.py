"""Samples the next token of every row of a batch at once, each by its own request's parameters.

Worker thread only. Invariant: a row's token depends only on the row's own logits, parameters and seed, and on nothing
else in the batch. So random numbers are a function of seed, position and token, and every reduction runs along the
vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from batching.grammar import GuidedDecoding
from batching.logits_processors import ForcedTokens, LogitBias, LogitsProcessor, Penalties, column
from batching.types import Request, Sampling, TokenLogprob

CANDIDATES = 256
"""Number of a row's largest logits that are sorted. Only a row that needs more to reach its top_p sorts all."""

OFF = float("inf")


class Sampler:
    """Samples tokens for one batch. `requests` are its rows in order; all state is on `device`.

    Call it once per step. Greedy rows without logits processors share a single argmax.
    """

    def __init__(self, requests: Sequence[Request], vocab_size: int, device: torch.device) -> None:
        self._num_output_tokens = 0
        self._logprobs = Logprobs.of(requests, device)
        found = [kind.of(requests, vocab_size, device) for kind in (Penalties, LogitBias, ForcedTokens, GuidedDecoding)]
        self._processors: list[LogitsProcessor] = [processor for processor in found if processor]
        random_rows = [row for row, request in enumerate(requests) if not request.sampling.greedy]
        self._random_rows = torch.tensor(random_rows, device=device) if random_rows else None
        self._seeds = torch.tensor([requests[row].sampling.seed for row in random_rows], device=device)
        self._filter = Filter([requests[row].sampling for row in random_rows], device)

    @property
    def is_plain_argmax(self) -> bool:
        """Whether every row's token is its argmax, with nothing to process, sample or report."""
        return self._random_rows is None and not self._processors and self._logprobs is None

    @property
    def logprobs(self) -> Mapping[int, TokenLogprob]:
        """Log probabilities of the latest tokens, by row, for rows that want them."""
        return self._logprobs.by_row if self._logprobs else {}

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [rows, vocabulary] in float32, which may be overwritten -> tokens [rows] in int64."""
        if self._logprobs:
            self._logprobs.read(logits)
        for processor in self._processors:
            processor.apply(logits)
        tokens = logits.argmax(-1)
        if self._random_rows is not None:
            tokens[self._random_rows] = self._sample(logits[self._random_rows])
        for processor in self._processors:
            processor.accept_tokens(tokens)
        if self._logprobs:
            self._logprobs.accept_tokens(tokens)
        self._num_output_tokens += 1
        return tokens

    def _sample(self, logits: Tensor) -> Tensor:
        """Gumbel-max sampling in its exponential form: the largest probability / exponential noise is the sample.

        Unlike a search in cumulative probabilities this compares tokens with each other, so that the rounding of
        logits, which differs with the size of the batch, changes the result only in a near tie.
        """
        probabilities = self._filter(logits)
        return (probabilities / exponential(self._seeds, self._num_output_tokens, logits.shape[-1])).argmax(-1)


def exponential(seeds: Tensor, position: int, tokens: int) -> Tensor:
    """Exponential noise [rows, tokens], mean 1, that depends on seed [rows, int64], position and token alone.

    A 32-bit key from two rounds of the splitmix64 mixer (Steele, Lea and Flood 2014), then for each token the mixer
    lowbias32 (Wellons 2018), whose lower 31 bits represent a number between 0 and 1.
    """
    key = _mix(_mix(seeds) + position).to(torch.int32)  # the lower half
    place = torch.arange(tokens, device=seeds.device, dtype=torch.int32) * (0x9E3779B9 - (1 << 32))
    bits = _mix32(place + key[:, None]) & 0x7FFFFFFF
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-31
    return -torch.log1p(-uniform.clamp(max=1 - 2.0**-24))


def _mix32(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


def _mix(x: Tensor) -> Tensor:
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical right shift: torch's own is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class Filter:
    """Temperature, top_k, top_p and min_p of sampled rows: logits -> probabilities, zero where cut off.

    Each limit amounts to a smallest logit that is kept. All ties with it are kept, so sort order does not matter.
    """

    def __init__(self, samplings: Sequence[Sampling], device: torch.device) -> None:
        self._temperature = column([sampling.temperature for sampling in samplings], device)
        self._top_k = column([sampling.top_k or OFF for sampling in samplings], device)
        # Above 1, because rounding may make a cumulative probability reach 1 too early.
        self._top_p = column([s.top_p if s.top_p < 1.0 else OFF for s in samplings], device)
        self._min_p = column([sampling.min_p for sampling in samplings], device)
        self._unlimited = (self._top_k == OFF) & (self._top_p == OFF) & (self._min_p == 0.0)
        self._cuts = not bool(self._unlimited.all())

    def __call__(self, logits: Tensor) -> Tensor:
        """[rows, vocabulary] in float32 -> probabilities of the same shape."""
        # Shifted first, so that a small temperature cannot overflow and the largest logit is exactly 0.
        scaled = (logits - logits.amax(-1, keepdim=True)) / self._temperature
        if self._cuts:
            scaled = scaled.masked_fill(scaled < self._smallest_kept(scaled), -OFF)
        return scaled.softmax(-1)

    def _smallest_kept(self, scaled: Tensor) -> Tensor:
        """The cut-off of each row, [rows, 1]."""
        # Not `exp().sum()`: torch sums a single row in another order than one of many, so the last bit would differ.
        total = 1.0 / scaled.softmax(-1).amax(-1, keepdim=True)
        all_rows = torch.ones(len(scaled), dtype=torch.bool, device=scaled.device)
        largest = scaled.topk(min(CANDIDATES, scaled.shape[-1])).values
        smallest, enough = self._cut(largest, total, all_rows)
        short = ~(enough | self._unlimited).squeeze(-1)
        if bool(short.any()):
            ordered = scaled[short].sort(descending=True).values
            smallest[short], _ = self._cut(ordered, total[short], short)
        return smallest.masked_fill(self._unlimited, -OFF)

    def _cut(self, largest: Tensor, total: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """From the largest scaled logits in descending order [rows, n]: the smallest kept, and whether n were enough.

        `total` [rows, 1] is the sum of the exponentials of all of a row's logits, the largest of which is 1.
        """
        top_k, top_p = self._top_k[rows], self._top_p[rows]
        all_of_k = top_k <= largest.shape[-1]
        within_k = torch.arange(largest.shape[-1], device=largest.device) < top_k
        weights = largest.exp() * within_k
        total = torch.where(all_of_k, weights.sum(-1, keepdim=True), total)
        before = weights.cumsum(-1) - weights
        kept = within_k & (before < top_p * total) & (weights >= self._min_p[rows])
        kept[:, 0] = True
        smallest = largest.gather(-1, kept.sum(-1, keepdim=True) - 1)
        # top_p is a fraction of what top_k keeps, so all of that must be known.
        total_known = (top_k == OFF) | (top_p == OFF)
        return smallest, all_of_k | (total_known & ~kept[:, -1:])


class OtherLogprobs:
    """What is told at each place beside the token itself: how many of the likeliest tokens, and which others."""

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        self._numbers = [sampling.top_logprobs or 0 for sampling in samplings]
        self._ids = [sampling.logprob_token_ids for sampling in samplings]
        self.most = max(self._numbers)
        widest = max(map(len, self._ids))
        self.ids = torch.tensor([[*ids, *[0] * (widest - len(ids))] for ids in self._ids], dtype=torch.int64)
        """[rows, most ids of any], filled up with token 0."""

    def of(
        self, row: int, ids: Sequence[int], values: Sequence[float], named: Sequence[float]
    ) -> tuple[tuple[int, float], ...]:
        """`ids` and `values` are the likeliest tokens at a place of the row, `named` the values of its `ids`."""
        number = self._numbers[row]
        likeliest = dict(zip(ids[:number], values[:number], strict=True))
        return tuple((likeliest | dict(zip(self._ids[row], named, strict=False))).items())


class Logprobs:
    """Log probabilities of a batch's tokens, and of others, for the rows that want them.

    They are the model's own, of its logits before penalties, bias, temperature or any cut: `read` a step's logits
    before they are changed, then `accept_tokens`.
    """

    def __init__(self, rows: list[int], requests: Sequence[Request], device: torch.device) -> None:
        self._places = rows
        self._rows = torch.tensor(rows, device=device)
        self._others = OtherLogprobs([requests[row].sampling for row in rows])
        self._ids = self._others.ids.to(device)
        self.by_row: dict[int, TokenLogprob] = {}

    @classmethod
    def of(cls, requests: Sequence[Request], device: torch.device) -> "Logprobs | None":
        """The log probabilities of a batch, or None if no row wants any."""
        rows = [row for row, request in enumerate(requests) if request.sampling.top_logprobs is not None]
        return cls(rows, requests, device) if rows else None

    def read(self, logits: Tensor) -> None:
        """Logits [all rows, vocabulary], not kept."""
        self._all = logits[self._rows].log_softmax(-1)

    def accept_tokens(self, tokens: Tensor) -> None:
        """Tokens [all rows] -> `by_row`."""
        chosen = tokens[self._rows]
        own = self._all.gather(-1, chosen[:, None]).squeeze(-1).tolist()
        values, ids = (found.tolist() for found in self._all.topk(self._others.most))
        named = self._all.gather(-1, self._ids).tolist()
        self.by_row = {
            row: TokenLogprob(token, own[at], self._others.of(at, ids[at], values[at], named[at]))
            for at, (row, token) in enumerate(zip(self._places, chosen.tolist(), strict=True))
        }
