"""What a person sees of a run: one table row a level, and one line for each kind of failure."""

from collections import defaultdict
from collections.abc import Iterator

from rich import box
from rich.table import Table

from benchmarks.client import Record
from benchmarks.summary import Level, summarise

COLUMNS = (
    "clients",
    "answers",
    "failed",
    "requests/s",
    "output tok/s",
    "TTFT ms\np50 / p90 / p95 / p99",
    "gap ms\np50 / p95 / p99",
    "per token ms\np50 / p95",
    "answer s\np50 / p90 / p95 / p99",
    "client\nCPU",
)


def table(levels: list[Level]) -> Table:
    """All levels, in the order in which they ran."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        shown.add_column(column, justify="right", no_wrap=True)
    for level in levels:
        shown.add_row(*cells(level))
    return shown


def cells(level: Level) -> list[str]:
    """One level's row, a cell for each of COLUMNS."""
    summary = summarise(level)
    failed = sum(summary.errors.values())
    return [
        str(level.concurrency),
        str(summary.requests - failed),
        str(failed),
        f"{summary.requests_per_second:.2f}",
        f"{summary.output_tokens_per_second:,.0f}",
        quantiles(summary.ttft, "p50 p90 p95 p99", scale=1000, digits=0),
        quantiles(summary.gap, "p50 p95 p99", scale=1000, digits=1),
        quantiles(summary.per_token, "p50 p95", scale=1000, digits=1),
        quantiles(summary.latency, "p50 p90 p95 p99", scale=1, digits=2),
        f"{level.cpu_share:.0%}",
    ]


def quantiles(found: dict[str, float], names: str, *, scale: float, digits: int) -> str:
    """The named percentiles, times `scale`, with a stroke between; a dash for a distribution of nothing."""
    if not found:
        return "-"
    return " / ".join(f"{found[name] * scale:,.{digits}f}" for name in names.split())


def failures(levels: list[Level]) -> Iterator[str]:
    """One line a level and kind: how often, and one failure's own words."""
    for level in levels:
        by_kind = defaultdict[str, list[Record]](list)
        for record in level.failures():
            by_kind[record.error or ""].append(record)
        for kind, records in by_kind.items():
            yield f"{level.concurrency} clients: {len(records)} x {kind}: {records[0].detail or 'no detail'}"
