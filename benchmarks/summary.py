"""The arithmetic: many records in, one level's figures out. Times are in seconds."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.client import Record

PERCENTS = (50, 90, 95, 99)

Distribution = dict[str, float]
"""p50 to p99; empty for a distribution of nothing."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What a good answer keeps, in seconds: time to first token, and mean time per output token. None: no limit."""

    ttft: float | None = None
    per_token: float | None = None

    def __bool__(self) -> bool:
        return self.ttft is not None or self.per_token is not None

    def met_by(self, record: Record) -> bool:
        """Whether this is an answer, and within the limits. One of fewer than two tokens has no time per token."""
        if record.error or record.ttft is None:
            return False
        slow_start = self.ttft is not None and record.ttft > self.ttft
        slow = self.per_token is not None and (record.per_token or 0.0) > self.per_token
        return not (slow_start or slow)


@dataclass(frozen=True, slots=True)
class Summary:
    """One level's figures. Rates and distributions are over answers that did not fail; gaps are pooled.

    `goodput` is the share of all requests whose answers met the targets, None without targets; `lateness` is how much
    later than due the client itself sent, at the 99th percentile; `cached_tokens` are those of the prompts that servers
    had computed before, by their own count.
    """

    requests: int
    errors: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    requests_per_second: float
    output_tokens_per_second: float
    ttft: Distribution
    gap: Distribution
    per_token: Distribution
    latency: Distribution
    goodput: float | None
    lateness: float
    cached_tokens: int = 0


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two closest ranks (numpy's method "linear").

    With the values sorted as v[0..n-1], h = (n - 1) * percent / 100 and k = floor(h), it is
    v[k] + (h - k) * (v[k + 1] - v[k]). Raises ValueError for no values.
    """
    if not values:
        raise ValueError("a percentile of nothing")
    ranked = sorted(values)
    rank = (len(ranked) - 1) * percent / 100
    below = int(rank)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (rank - below) * (ranked[above] - ranked[below])


def distribution(values: Iterable[float | None]) -> Distribution:
    """p50 to p99 of the values there are; empty for none."""
    known = sorted(value for value in values if value is not None)
    return {f"p{percent}": percentile(known, percent) for percent in PERCENTS} if known else {}


def summarise(records: Sequence[Record], seconds: float, targets: Targets) -> Summary:
    """A level's figures, from its measured requests; `seconds` is from the first send to the last end."""
    answers = [record for record in records if not record.error]
    return Summary(
        requests=len(records),
        errors=dict(Counter(record.error for record in records if record.error)),
        prompt_tokens=sum(record.prompt_tokens for record in answers),
        output_tokens=sum(record.completion_tokens for record in answers),
        requests_per_second=len(answers) / seconds,
        output_tokens_per_second=sum(record.completion_tokens for record in answers) / seconds,
        ttft=distribution(record.ttft for record in answers),
        gap=distribution(gap for record in answers for gap in record.gaps),
        per_token=distribution(record.per_token for record in answers),
        latency=distribution(record.latency for record in answers),
        goodput=goodput(records, targets) if targets else None,
        lateness=distribution(record.sent - record.due for record in records).get("p99", 0.0),
        cached_tokens=sum(record.cached_tokens for record in answers),
    )


def goodput(records: Sequence[Record], targets: Targets) -> float:
    """The share of requests whose answers met the targets; a failed one did not, and of none none did."""
    return sum(map(targets.met_by, records)) / len(records) if records else 0.0


def tokens_by_second(records: Iterable[Record], seconds: float) -> list[float]:
    """Output tokens that came in each second of a level. An answer's tokens are spread evenly over its chunks."""
    found = [0.0] * max(1, math.ceil(seconds))
    for record in records:
        for chunk in record.chunks:
            second = min(len(found) - 1, int(record.due + chunk))
            found[second] += record.completion_tokens / len(record.chunks)
    return found
