"""The arithmetic: many records in, one level's figures out. Times are in seconds."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.client import Record

PERCENTS = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Level:
    """What was measured at one concurrency: `seconds` from the first send to the last end, and every request.

    `cpu_share` is the client's own CPU time over `seconds`: near 1, the client is what was measured.
    """

    concurrency: int
    seconds: float
    cpu_share: float
    records: list[Record]
    warm_up: list[Record]

    def failures(self) -> list[Record]:
        """Failed requests, those of the warm-up included."""
        return [record for record in self.warm_up + self.records if record.error]


@dataclass(frozen=True, slots=True)
class Summary:
    """One level's figures. Rates and distributions are over answers that did not fail; gaps are pooled."""

    requests: int
    errors: dict[str, int]
    requests_per_second: float
    output_tokens_per_second: float
    ttft: dict[str, float]
    gap: dict[str, float]
    per_token: dict[str, float]
    latency: dict[str, float]


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


def distribution(values: Iterable[float | None]) -> dict[str, float]:
    """p50 to p99 of the values there are; empty for none."""
    known = sorted(value for value in values if value is not None)
    return {f"p{percent}": percentile(known, percent) for percent in PERCENTS} if known else {}


def summarise(level: Level) -> Summary:
    """A level's figures, without its warm-up."""
    answers = [record for record in level.records if not record.error]
    return Summary(
        requests=len(level.records),
        errors=dict(Counter(record.error for record in level.records if record.error)),
        requests_per_second=len(answers) / level.seconds,
        output_tokens_per_second=sum(record.completion_tokens for record in answers) / level.seconds,
        ttft=distribution(record.ttft for record in answers),
        gap=distribution(gap for record in answers for gap in record.gaps),
        per_token=distribution(record.per_token for record in answers),
        latency=distribution(record.latency for record in answers),
    )
