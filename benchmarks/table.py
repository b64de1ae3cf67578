"""What a person sees of a run: one table row a level, and one line for each kind of failure."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table

from benchmarks.client import Record
from benchmarks.run import Level, LevelFigures
from benchmarks.server_metrics import ServerFigures
from benchmarks.summary import Distribution

CLIENT_COLUMNS = (
    "load",
    "answers",
    "failed",
    "requests/s",
    "output\ntok/s",
    "first token ms\np50 / p90 / p95 / p99",
    "gap ms\np50 / p90 / p95 / p99",
    "per token ms\np50 / p90 / p95 / p99",
    "whole answer s\np50 / p90 / p95 / p99",
    "good",
    "client\nCPU",
)
SERVER_COLUMNS = (
    "load",
    "batches",
    "batch size\nmean",
    "joined\na batch",
    "rows a step\nmean",
    "padding\nmean",
    "prompts\nreused",
    "queue wait ms\nmean / p95",
    "queue depth\nmost",
)


def tables(levels: Sequence[LevelFigures]) -> Iterator[Table]:
    """All levels, in the order in which they ran: what clients saw, and what the server counted, if it does."""
    yield table("What clients saw", CLIENT_COLUMNS, [client_cells(level) for level in levels])
    told = [server_cells(level.label, level.server) for level in levels if level.server]
    if told:
        yield table("What the server counted", SERVER_COLUMNS, told)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A plain table, numbers to the right."""
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    return shown


def client_cells(level: LevelFigures) -> list[str]:
    """One level's row, a cell for each of CLIENT_COLUMNS."""
    summary = level.summary
    failed = sum(summary.errors.values())
    return [
        level.label,
        str(summary.requests - failed),
        str(failed),
        f"{summary.requests_per_second:.2f}",
        f"{summary.output_tokens_per_second:,.0f}",
        quantiles(summary.ttft, scale=1000, digits=0),
        quantiles(summary.gap, scale=1000, digits=1),
        quantiles(summary.per_token, scale=1000, digits=1),
        quantiles(summary.latency, scale=1, digits=2),
        number(summary.goodput, "{:.0%}"),
        f"{level.cpu_share:.0%}",
    ]


def server_cells(label: str, server: ServerFigures) -> list[str]:
    """One level's row, a cell for each of SERVER_COLUMNS."""
    waits = (server.queue_wait, server.queue_wait_p95)
    return [
        label,
        str(server.batches),
        number(server.batch_size, "{:.1f}"),
        str(server.joined),
        number(server.step_rows, "{:.1f}"),
        number(server.padding, "{:.0%}"),
        number(server.reused, "{:.0%}"),
        " / ".join(number(wait and wait * 1000, "{:,.0f}") for wait in waits),
        number(max((sample.queue_depth for sample in server.gauges), default=None), "{:.0f}"),
    ]


def number(value: float | None, form: str) -> str:
    """The value in its form; a dash for none."""
    return "-" if value is None else form.format(value)


def quantiles(found: Distribution, *, scale: float, digits: int) -> str:
    """All percentiles, times `scale`, with a stroke between; a dash for a distribution of nothing."""
    return " / ".join(f"{value * scale:,.{digits}f}" for value in found.values()) or "-"


def failures(levels: Sequence[Level]) -> Iterator[str]:
    """One line a level and kind: how often, and one failure's own words."""
    for level in levels:
        by_kind = defaultdict[str, list[Record]](list)
        for record in level.failures():
            by_kind[record.error or ""].append(record)
        for kind, records in by_kind.items():
            yield f"{level.loop.label}: {len(records)} x {kind}: {records[0].detail or 'no detail'}"
