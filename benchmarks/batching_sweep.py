"""What the batching settings buy: this service, started anew for each value of one setting, at several loads.

    python -m benchmarks.batching_sweep --setting batch-window-ms --values 0,5,50 --concurrency 1,4,16

Any setting of the service can be varied; the others keep their defaults, or what `--server-args` says. Writes a chart
and each run into `--out`.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import orjson
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.contenders import ContenderError, microbatch, serving
from benchmarks.load import add_load, add_work, check_effect, run_loop, wide_console
from benchmarks.models import Model, ModelError, add_model, take_model
from benchmarks.run import Run, RunFigures, Settings
from benchmarks.table import SERVER_COLUMNS, server_cells, table

COLUMNS = (
    "setting",
    "output\ntok/s",
    "first token ms\np50 / p95",
    "whole answer s\np50 / p95",
    *SERVER_COLUMNS[2:8],
    "failed",
)


@dataclass(frozen=True, slots=True)
class Sweep:
    """One setting, the values it gets, and what each is loaded with."""

    model: Model
    setting: str
    values: tuple[str, ...]
    load: Settings
    out: Path


async def run_all(sweep: Sweep, runs: list[Run]) -> None:
    """Fill `runs`, one value after the other. Raises ContenderError if a server does not start."""
    with Progress(console=Console(stderr=True), refresh_per_second=2) as bar:
        for value in sweep.values:
            name = f"{sweep.setting} {value}"
            contender = microbatch(name.replace(" ", "-"), sweep.model, *flags_of(sweep.setting, value))
            task = bar.add_task(name, total=sweep.load.total())
            async with serving(contender, sweep.out / f"{contender.name}.log") as url:
                body = sweep.load.body | contender.fields
                settings = replace(sweep.load, url=url, model=contender.model, label=name, body=body)
                run = Run(settings, lambda task=task: bar.advance(task))  # type: ignore[misc]
                await run.measure_all()
            runs.append(run)
            (sweep.out / f"{contender.name}.json").write_bytes(orjson.dumps(run.figures()))


def flags_of(setting: str, value: str) -> tuple[str, ...]:
    """The service's flags for a value. A switch has none: true turns it on, false off."""
    switches = {"true": (f"--{setting}",), "false": (f"--no-{setting}",)}
    return switches.get(value, (f"--{setting}", value))


def tables(runs: Sequence[RunFigures]) -> list[Table]:
    """One for each level, with a row for each value."""
    levels = enumerate(runs[0].levels)
    return [table(level.label, COLUMNS, [row(run, place) for run in runs]) for place, level in levels]


def row(run: RunFigures, place: int) -> list[str]:
    """One value's figures at one level."""
    level = run.levels[place]
    summary = level.summary
    return [
        run.label,
        f"{summary.output_tokens_per_second:,.1f}",
        " / ".join(f"{summary.ttft[name] * 1000:,.0f}" for name in ("p50", "p95") if summary.ttft),
        " / ".join(f"{summary.latency[name]:,.2f}" for name in ("p50", "p95") if summary.latency),
        *(server_cells(level.label, level.server)[2:8] if level.server else ["-"] * 6),
        str(sum(summary.errors.values())),
    ]


def parse(arguments: Sequence[str] | None) -> Sweep:
    """Exits with 2 and a sentence for flags that make no sense."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batching_sweep", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--setting", required=True, help="a setting of the service, as batch-window-ms, max-batch-size, token-budget")
    add(
        "--values",
        type=lambda text: tuple(text.split(",")),
        required=True,
        help="what it gets, as 0,5,50 or true,false",
    )
    add("--out", type=Path, default=Path("out/sweep"), help="folder for runs, logs and chart (out/sweep)")
    add_model(parser)
    add_load(parser)
    add_work(parser)
    told = vars(parser.parse_args(arguments))
    check_effect(parser, told)
    setting, values, out = told.pop("setting"), told.pop("values"), told.pop("out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        model = take_model(told)
        load = Settings(url="", model=model.name, full_length=True, **told)
        load.source()
    except (ModelError, OSError, ValueError) as error:
        parser.error(str(error))
    return Sweep(model, setting, values, load, out)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code: 0, 1 if any request failed, 2 if a server did not start."""
    sweep = parse(arguments)
    runs: list[Run] = []
    try:
        run_loop(run_all(sweep, runs))
    except ContenderError as error:
        print(f"python -m benchmarks.batching_sweep: {error}", file=sys.stderr)
        return 2
    figures = [run.figures() for run in runs]
    show(sweep, figures)
    return int(any(level.failures() for run in runs for level in run.levels))


def show(sweep: Sweep, figures: Sequence[RunFigures]) -> None:
    """Print the tables and write the chart."""
    console = wide_console()
    for found in tables(figures):
        console.print(found)
    from benchmarks.charts import png, setting_chart

    picture = sweep.out / f"{sweep.setting}.png"
    picture.write_bytes(png(setting_chart(sweep.setting, sweep.values, figures)))
    console.print(str(picture), highlight=False)


if __name__ == "__main__":
    sys.exit(main())
