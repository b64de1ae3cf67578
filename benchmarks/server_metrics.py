"""What the server itself counted while a level ran: scrapes of `/metrics` and their differences.

For servers without this service's metrics there is nothing, and nothing is an error.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import SplitResult

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.connection import get

PREFIX = "microbatch_"
SAMPLE_SECONDS = 1.0

Histogram = dict[float, float]
"""Observations up to each upper bound, the last one infinite."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """One reading of `/metrics`: `values` by name (labels summed over), histograms' buckets apart."""

    values: dict[str, float]
    buckets: dict[str, Histogram]
    facts: dict[str, str]

    def counted_since(self, earlier: "Scrape", counter: str) -> int:
        """How far a counter went on between two scrapes."""
        return int(self.values.get(counter, 0.0) - earlier.values.get(counter, 0.0))

    def mean_since(self, earlier: "Scrape", histogram: str) -> float | None:
        """The mean of what a histogram observed between two scrapes; None for nothing."""
        count, total = (
            self.values.get(f"{histogram}_{part}", 0.0) - earlier.values.get(f"{histogram}_{part}", 0.0)
            for part in ("count", "sum")
        )
        return total / count if count else None

    def buckets_since(self, earlier: "Scrape", histogram: str) -> Histogram:
        """Observations between two scrapes, as a histogram of their own."""
        before = earlier.buckets.get(histogram, {})
        return {bound: count - before.get(bound, 0.0) for bound, count in self.buckets.get(histogram, {}).items()}


@dataclass(frozen=True, slots=True)
class Gauges:
    """What was so at one moment, `at` seconds after the level began."""

    at: float
    queue_depth: float
    running_rows: float


@dataclass(frozen=True, slots=True)
class ServerFigures:
    """A level's figures by the server's own count; None where nothing was observed. `queue_wait` is in seconds.

    `batch_size` is the mean number of requests in a batch at its start, `joined` how many came into one that ran,
    `step_rows` the mean number that got a token in one step, `padding` the mean share of a batch's prompt positions
    that is padding, `reused` the share of prompt tokens that had been computed for another request.
    """

    batches: int
    joined: int
    batch_size: float | None
    step_rows: float | None
    padding: float | None
    reused: float | None
    queue_wait: float | None
    queue_wait_p95: float | None
    gauges: list[Gauges]


def parse(exposition: str) -> Scrape | None:
    """A scrape of this service's metrics; None if they are not among these, or this is not the text format."""
    values: dict[str, float] = {}
    buckets: dict[str, Histogram] = {}
    facts: dict[str, str] = {}
    try:
        samples = [one for family in text_string_to_metric_families(exposition) for one in family.samples]
    except ValueError:
        return None
    for sample in samples:
        name = sample.name.removeprefix(PREFIX)
        if name == sample.name:
            continue
        if "le" in sample.labels:
            histogram, bound = buckets.setdefault(name.removesuffix("_bucket"), {}), float(sample.labels["le"])
            histogram[bound] = histogram.get(bound, 0.0) + sample.value
        else:
            values[name] = values.get(name, 0.0) + sample.value
            facts |= sample.labels if name == "build_info" else {}
    return Scrape(values, buckets, facts) if values else None


def quantile(histogram: Histogram, share: float) -> float | None:
    """Prometheus's `histogram_quantile`: linear within a bucket, the highest finite bound beyond all; None if empty."""
    bounds = sorted(histogram)
    total = histogram[bounds[-1]] if bounds else 0.0
    if not total:
        return None
    rank, below, counted = share * total, 0.0, 0.0
    for bound in bounds:
        if histogram[bound] >= rank:
            if math.isinf(bound):
                return below
            inside = histogram[bound] - counted
            return below + (bound - below) * (rank - counted) / inside if inside else bound
        below, counted = bound, histogram[bound]
    return below


def figures(before: Scrape, after: Scrape, gauges: list[Gauges]) -> ServerFigures:
    """What happened between two scrapes."""
    prompts = after.counted_since(before, "prompt_tokens_total")
    return ServerFigures(
        batches=after.counted_since(before, "batches_total"),
        joined=after.counted_since(before, "joined_requests_total"),
        batch_size=after.mean_since(before, "batch_size_rows"),
        step_rows=after.mean_since(before, "step_size_rows"),
        padding=after.mean_since(before, "batch_padding_ratio"),
        reused=after.counted_since(before, "reused_prompt_tokens_total") / prompts if prompts else None,
        queue_wait=after.mean_since(before, "queue_wait_seconds"),
        queue_wait_p95=quantile(after.buckets_since(before, "queue_wait_seconds"), 0.95),
        gauges=gauges,
    )


@dataclass(slots=True)
class Watch:
    """Reads a server's metrics. `figures` is there after `watching`, None for servers that have none."""

    url: SplitResult
    figures: ServerFigures | None = None
    facts: dict[str, str] = field(default_factory=dict)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Scrape at both ends, and the gauges once a second between them."""
        if (before := await self.scrape()) is None:
            yield
            return
        self.facts = before.facts
        gauges: list[Gauges] = []
        sampler = asyncio.create_task(self._sample(gauges))
        try:
            yield
        finally:
            sampler.cancel()
        if after := await self.scrape():
            self.figures = figures(before, after, gauges)

    async def scrape(self) -> Scrape | None:
        """One reading; None if the server gives none."""
        try:
            async with asyncio.timeout(5):
                reply = await get(self.url, "/metrics")
        except OSError:
            return None
        return parse(reply.body.decode(errors="replace")) if reply.status == 200 else None

    async def _sample(self, gauges: list[Gauges]) -> None:
        began = time.perf_counter()
        while True:
            if seen := await self.scrape():
                values = seen.values
                at = time.perf_counter() - began
                gauges.append(Gauges(at, values.get("queue_depth", 0.0), values.get("running_rows", 0.0)))
            await asyncio.sleep(SAMPLE_SECONDS)
