"""Draw runs of benchmarks.load as one HTML page that needs nothing else, and its charts as PNG files.

python -m benchmarks.report run1.json run2.json --out out/report

Runs are drawn side by side under their labels (`--label` of benchmarks.load). Needs `pip install -e '.[bench]'`.
"""

import argparse
import sys
from base64 import b64encode
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.run import LevelFigures, RunFigures, load_run
from benchmarks.table import CLIENT_COLUMNS, SERVER_COLUMNS, client_cells, server_cells

SHOWN_SETTINGS = ("model", "url", "workload", "prompts", "language", "seed", "full_length", "burstiness", "duration")


def page(runs: Sequence[RunFigures], charts: Sequence[Any]) -> str:
    """The HTML, pictures and all."""
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    pictures = [(chart, b64encode(chart.png).decode()) for chart in charts]
    return environment.get_template("report.html").render(
        runs=runs,
        pictures=pictures,
        facts=facts(runs),
        warnings=warnings(runs),
        client_columns=CLIENT_COLUMNS,
        client_rows=[[run.label, *client_cells(level)] for run in runs for level in run.levels],
        server_columns=SERVER_COLUMNS,
        server_rows=[
            [run.label, *server_cells(level.label, level.server)]
            for run in runs
            for level in run.levels
            if level.server
        ],
    )


def facts(runs: Sequence[RunFigures]) -> list[tuple[str, list[str]]]:
    """What the figures depend on, one line each with a value per run; lines without any value are left out."""
    lines: dict[str, list[str]] = {"started": [run.started for run in runs]}
    for name in SHOWN_SETTINGS:
        lines[name.replace("_", " ")] = [told(run.settings.get(name)) for run in runs]
    lines["targets"] = [targets(run) for run in runs]
    lines["capacity"] = [f"{run.capacity:.3g} requests/s" if run.capacity else "" for run in runs]
    lines["server"] = [", ".join(f"{name} {value}" for name, value in run.server.items()) for run in runs]
    for name in ("processor", "processors", "gpu", "system"):
        lines[name] = [told(run.machine.get(name)) for run in runs]
    lines["memory"] = [f"{float(run.machine['memory']) / 2**30:.0f} GiB" for run in runs]
    lines["client's versions"] = [", ".join(f"{name} {value}" for name, value in run.versions.items()) for run in runs]
    return [(name, values) for name, values in lines.items() if any(values)]


def told(value: object) -> str:
    """A setting as a person says it; nothing for what was not set."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value}"


def targets(run: RunFigures) -> str:
    """The latency targets in milliseconds, if there were any."""
    limits = run.settings["targets"]
    names = {"ttft": "first token", "per_token": "per token"}
    return ", ".join(f"{name} {limits[key] * 1000:g} ms" for key, name in names.items() if limits[key])


def warnings(runs: Sequence[RunFigures]) -> list[str]:
    """Differences between runs at the same level other than the server, and failures."""
    asked = defaultdict[str, set[tuple[str, ...]]](set)
    for run in runs:
        for label in dict.fromkeys(level.label for level in run.levels):
            asked[label].add(tuple(level.jobs for level in run.levels if level.label == label))
    found = [f"The runs had different work at {label}." for label, jobs in asked.items() if len(jobs) > 1]
    if len({(run.machine["processor"], run.machine.get("gpu")) for run in runs}) > 1:
        found.append("The runs are of different machines.")
    for run in runs:
        for level in run.levels:
            total = level.summary.requests
            for kind, count in level.summary.errors.items():
                found.append(
                    f"{run.label}: {count} of {total} requests failed at {level.label} ({kind}).{words(level, kind)}"
                )
        found += [f"{run.label}: {label} left out, because {reason}." for label, reason in run.left_out.items()]
    return found


def words(level: LevelFigures, kind: str) -> str:
    """What one of the requests that failed so was told, as a sentence of its own."""
    reason = level.reasons.get(kind)
    return f" One was told: {reason}" if reason else ""


def distinct(runs: Sequence[RunFigures], names: Sequence[str]) -> list[RunFigures]:
    """The runs, with their files' names in labels that more than one has."""
    labels = [run.label for run in runs]
    return [
        replace(run, label=f"{run.label} ({name})") if labels.count(run.label) > 1 else run
        for run, name in zip(runs, names, strict=True)
    ]


def write(runs: Sequence[RunFigures], out: Path) -> Path:
    """Write page and pictures into the folder; the page's path. Raises ImportError without matplotlib."""
    from benchmarks.charts import charts

    out.mkdir(parents=True, exist_ok=True)
    drawn = list(charts(runs))
    for chart in drawn:
        (out / f"{chart.name}.png").write_bytes(chart.png)
    (out / "report.html").write_text(page(runs, drawn))
    return out / "report.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 for files that are no runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="files that benchmarks.load --json wrote")
    parser.add_argument("--out", type=Path, default=Path("out/report"), help="folder to write into (out/report)")
    told = parser.parse_args(arguments)
    try:
        runs = distinct([load_run(path) for path in told.runs], [path.stem for path in told.runs])
        print(write(runs, told.out))
    except (OSError, ValueError) as error:
        print(f"python -m benchmarks.report: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"python -m benchmarks.report: {error}; pip install -e '.[bench]'", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
