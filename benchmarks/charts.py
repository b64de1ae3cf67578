"""Charts of runs, one message each. Needs matplotlib (the extra `bench`); draws to memory and never opens a window."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from benchmarks.run import LevelFigures, RunFigures
from benchmarks.summary import Distribution

COLOURS = colormaps["tab10"]
COLUMNS = 3
LABEL_PLACES = ((8, -11), (-8, 7), (8, 7), (-8, -11))
STYLE = {"closed": ("o", "closed loop"), "open": ("s", "open loop")}


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture with the sentence that says how to read it."""

    name: str
    title: str
    reading: str
    png: bytes


def charts(runs: Sequence[RunFigures]) -> Iterator[Chart]:
    """All that the runs have data for."""
    yield Chart(
        "latency-throughput",
        "Latency against throughput",
        "Each point is one level of load. Further right is more work done, lower is less waiting. "
        "Where a line turns upwards, the server is full.",
        png(latency_against_throughput(runs)),
    )
    yield Chart(
        "first-token",
        "Time to first token",
        "The share of answers that had begun after so long: the further left, the sooner. Dashes mark half and 95%.",
        png(panels(runs, first_token, "time to first token, s", "share of answers", log_x=True)),
    )
    yield Chart(
        "tokens-over-time",
        "Output tokens a second, over time",
        "A flat line is steady work; a dip to zero is a second without tokens.",
        png(panels(runs, tokens_over_time, "seconds since the level began", "output tokens/s")),
    )
    if any(level.server for run in runs for level in run.levels):
        yield Chart(
            "batch-over-time",
            "Requests that run together, over time",
            "How many requests the device works on at once, as the server's metrics say each second.",
            png(panels(runs, running_over_time, "seconds since the level began", "requests running")),
        )
        yield Chart(
            "queue-over-time",
            "Requests that wait, over time",
            "A queue that grows to the end means that requests come faster than they are answered.",
            png(panels(runs, queue_over_time, "seconds since the level began", "requests waiting")),
        )


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    data = BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()


def latency_against_throughput(runs: Sequence[RunFigures]) -> Figure:
    """Two panels: time to first token and whole answer, each at p50 and p95."""
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    first, whole = figure.subplots(1, 2)
    for number, (colour, run) in enumerate(zip(colours(), runs, strict=False)):
        for kind, (marker, name) in STYLE.items():
            levels = [level for level in run.levels if level.kind == kind and level.summary.latency]
            if levels:
                line = Line(colour, marker, f"{run.label}, {name}", LABEL_PLACES[number % len(LABEL_PLACES)])
                latency_lines(first, levels, lambda level: level.summary.ttft, line)
                latency_lines(whole, levels, lambda level: level.summary.latency, line)
    for axes, name in ((first, "time to first token, s"), (whole, "whole answer, s")):
        axes.set(xlabel="output tokens/s", ylabel=name, title=f"{name.partition(',')[0]} (full line p50, dotted p95)")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(plain))
        axes.yaxis.set_minor_formatter(FuncFormatter(plain_where_few))
        right = axes.get_xlim()[1]
        axes.set_xlim(-0.06 * right, 1.08 * right)  # room for the names of points at either end
        axes.grid(alpha=0.3, which="both")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@dataclass(frozen=True, slots=True)
class Line:
    """How a run is drawn. `place` is where its points' names stand, in points to the right and up, so that runs that
    lie together keep theirs apart."""

    colour: str
    marker: str
    label: str
    place: tuple[int, int]


def latency_lines(
    axes: Axes, levels: Sequence[LevelFigures], of: Callable[[LevelFigures], Distribution], line: Line
) -> None:
    """p50 and p95 of the levels against what they put through, with each level's name at its p50."""
    levels = sorted((level for level in levels if of(level)), key=lambda level: level.load)
    x = [level.summary.output_tokens_per_second for level in levels]
    middle, high = ([of(level)[name] for level in levels] for name in ("p50", "p95"))
    axes.plot(x, middle, color=line.colour, marker=line.marker, label=line.label)
    axes.plot(x, high, color=line.colour, marker=line.marker, linestyle=":", alpha=0.6)
    side = "left" if line.place[0] > 0 else "right"
    for level, *at in zip(levels, x, middle, strict=True):
        axes.annotate(
            level.label, (at[0], at[1]), line.place, textcoords="offset points", color=line.colour, fontsize=8, ha=side
        )


def setting_chart(setting: str, values: Sequence[str], runs: Sequence[RunFigures]) -> Figure:
    """What a setting's values come to: throughput, time to first token and whole answer, a line for each load."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    throughput, first, whole = figure.subplots(1, 3)
    for place, colour in zip(range(len(runs[0].levels)), colours(), strict=False):
        levels = [run.levels[place] for run in runs]
        line = {"color": colour, "marker": "o", "label": levels[0].label}
        throughput.plot(values, [level.summary.output_tokens_per_second for level in levels], **line)
        first.plot(values, [level.summary.ttft.get("p95", math.nan) for level in levels], **line)
        whole.plot(values, [level.summary.latency.get("p95", math.nan) for level in levels], **line)
    names = {throughput: "output tokens/s", first: "time to first token p95, s", whole: "whole answer p95, s"}
    for axes, name in names.items():
        axes.set(title=name, xlabel=setting.replace("-", " "), ylabel=name)
        axes.set_ylim(0, 1.1 * axes.dataLim.y1)
        axes.grid(alpha=0.3)
    figure.legend(*throughput.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


Draw = Callable[[Axes, LevelFigures, str, str], None]
"""Draws one level of one run, in a colour and under a name."""


def panels(runs: Sequence[RunFigures], draw: Draw, xlabel: str, ylabel: str, *, log_x: bool = False) -> Figure:
    """A panel for each level of load, with a line for each run that has it."""
    labels = list(dict.fromkeys(level.label for run in runs for level in run.levels))
    columns = min(COLUMNS, len(labels))
    rows = math.ceil(len(labels) / columns)
    figure = Figure(figsize=(max(6.5, 4.4 * columns), 3.3 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=log_x).flatten()
    for axes, label in zip(grid, labels, strict=False):
        for colour, run in zip(colours(), runs, strict=False):
            for level in run.levels:
                if level.label == label:
                    draw(axes, level, colour, run.label)
        finish(axes, label, xlabel, ylabel, log_x)
    for axes in grid[len(labels) :]:
        axes.remove()
    handles = {name: handle for axes in grid for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return figure


def finish(axes: Axes, title: str, xlabel: str, ylabel: str, log_x: bool) -> None:
    """Axes from 0 with their names; a logarithmic one in plain numbers."""
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.set_ylim(0, 1.0 if log_x else max(1.0, 1.1 * axes.dataLim.y1))
    axes.grid(alpha=0.3, which="both")
    if log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(plain))
        axes.xaxis.set_minor_formatter(FuncFormatter(plain_where_few))
        axes.tick_params(labelbottom=True)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 0.95])
        for share in (0.5, 0.95):
            axes.axhline(share, color="grey", linestyle="--", linewidth=1)
    else:
        axes.set_xlim(left=0)
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))


def first_token(axes: Axes, level: LevelFigures, colour: str, name: str) -> None:
    """The empirical distribution, from the first answer to the last."""
    if level.ttft:
        axes.ecdf(level.ttft, color=colour, label=name)


def tokens_over_time(axes: Axes, level: LevelFigures, colour: str, name: str) -> None:
    """A step for each second; the last, which is not whole, is left out."""
    whole = level.tokens_by_second[:-1] or level.tokens_by_second
    axes.stairs(whole, color=colour, label=name, baseline=None, linewidth=1.8, alpha=0.8)


def running_over_time(axes: Axes, level: LevelFigures, colour: str, name: str) -> None:
    """The samples, each holding until the next."""
    samples = level.server.gauges if level.server else []
    steps(axes, [(sample.at, sample.running_rows) for sample in samples], colour, name)


def queue_over_time(axes: Axes, level: LevelFigures, colour: str, name: str) -> None:
    """The samples, each holding until the next."""
    samples = level.server.gauges if level.server else []
    steps(axes, [(sample.at, sample.queue_depth) for sample in samples], colour, name)


def steps(axes: Axes, points: Sequence[tuple[float, float]], colour: str, name: str) -> None:
    """Nothing for no points, so that the legend names no run without a line."""
    if points:
        x, y = zip(*points, strict=True)
        axes.step(x, y, where="post", color=colour, label=name, alpha=0.8)


def colours() -> Iterator[str]:
    """A colour for each run, the same in every chart."""
    while True:
        yield from (to_hex(COLOURS(number)) for number in range(10))


def plain(value: float, position: int) -> str:
    """0.05, 2, 300: no powers of ten."""
    return f"{value:g}"


def plain_where_few(value: float, position: int) -> str:
    """Names only 2 and 5 between powers of ten, so that they do not run into each other."""
    leading = value / 10 ** math.floor(math.log10(value))
    return f"{value:g}" if round(leading, 6) in (2, 5) else ""
