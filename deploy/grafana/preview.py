"""Draw the dashboard from a real Prometheus, where no Grafana is at hand.

    python deploy/grafana/preview.py --prometheus http://127.0.0.1:9090 --minutes 5 --out deploy/grafana/preview.png

Each panel is drawn at its place with the data of its own queries; what has no data is drawn as "no data".
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import matplotlib as mpl
import orjson
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.gridspec import GridSpec

DASHBOARD = Path(__file__).parent / "dashboard.json"
COLORS = {"green": "#56a64b", "orange": "#ff9830", "red": "#e02f44"}
UNITS = {"s": "s", "percentunit": "%", "bytes": "GiB", "reqps": "req/s", "none": "", "suffix: tok/s": "tok/s"}
SCALES = {"percentunit": 100.0, "bytes": 2.0**-30}

Series = list[tuple[str, list[float], list[float]]]
"""Name, times and values of each series."""


def panels(*kinds: str) -> list[dict[str, Any]]:
    """The panels of these kinds, by default all that show data."""
    found: list[dict[str, Any]] = orjson.loads(DASHBOARD.read_bytes())["panels"]
    return [panel for panel in found if panel["type"] in (kinds or DRAW)]


def expression(query: str, interval: str = "1m") -> str:
    """A panel's query as Grafana sends it with all instances chosen."""
    return query.replace("$__rate_interval", interval).replace("$instance", ".*").replace("$model", ".*")


@dataclass
class Prometheus:
    url: str

    def get(self, path: str, **parameters: Any) -> Any:
        """The `data` of an answer of its HTTP API. Raises RuntimeError with Prometheus' own words."""
        with httpx2.Client(trust_env=False, timeout=30) as client:
            answer = client.get(f"{self.url}/api/v1/{path}", params=parameters).json()
        if answer["status"] != "success":
            raise RuntimeError(answer["error"])
        return answer["data"]

    def values(self, query: str) -> list[float]:
        """What a query says now: the numbers of its series."""
        return [float(series["value"][1]) for series in self.get("query", query=query)["result"]]

    def series(self, panel: dict[str, Any], seconds: float) -> Series:
        """What a panel shows of the last `seconds`."""
        end = time.time()
        found: Series = []
        for target in panel["targets"]:
            query, step = expression(target["expr"], "20s"), max(1.0, seconds / 300)
            for one in self.get("query_range", query=query, start=end - seconds, end=end, step=step)["result"]:
                name = named(target["legendFormat"], one["metric"])
                points = [(float(at) - end, float(value)) for at, value in one["values"]]
                found.append((name, [at for at, _ in points], [value for _, value in points]))
        return found


def named(legend: str, labels: dict[str, str]) -> str:
    """A legend with its labels filled in."""
    for label, value in labels.items():
        legend = legend.replace("{{" + label + "}}", value)
    return legend


def draw_stat(axes: Axes, panel: dict[str, Any], series: Series) -> None:
    """The last value in large print, on the colour of the threshold that it has passed."""
    defaults = panel["fieldConfig"]["defaults"]
    name, _, values = series[-1]
    last = [value for value in values if math.isfinite(value)][-1]
    passed = [step["color"] for step in defaults["thresholds"]["steps"] if last >= (step["value"] or -math.inf)]
    unit = defaults["unit"]
    text = f"{last * SCALES.get(unit, 1):.3g} {UNITS[unit]}"
    if panel["options"]["textMode"] == "name":
        text = name
    axes.set_facecolor(COLORS[passed[-1]])
    axes.text(0.5, 0.45, text, ha="center", va="center", fontsize=11, color="white", transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_lines(axes: Axes, panel: dict[str, Any], series: Series) -> None:
    unit = panel["fieldConfig"]["defaults"]["unit"]
    for name, times, values in series:
        axes.plot(times, [value * SCALES.get(unit, 1) for value in values], linewidth=1, label=name)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(UNITS[unit], fontsize=7)
    axes.legend(fontsize=6, loc="upper left", frameon=False)
    axes.tick_params(labelsize=6)
    axes.grid(alpha=0.2)


def draw_heat(axes: Axes, panel: dict[str, Any], series: Series) -> None:
    """How many there are in each bucket alone; Prometheus counts each with all below it."""
    ordered = sorted(series, key=lambda one: float(one[0]))
    counts = [[0.0] * len(ordered[0][2]), *(values for _, _, values in ordered)]
    alone = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(counts)]
    axes.imshow(alone, aspect="auto", origin="lower", cmap="Oranges", extent=(ordered[0][1][0], 0, 0, len(alone)))
    axes.set_yticks([n + 0.5 for n in range(len(ordered))], [name for name, *_ in ordered], fontsize=6)
    axes.tick_params(axis="x", labelsize=6)


DRAW = {"stat": draw_stat, "timeseries": draw_lines, "heatmap": draw_heat}


def draw(prometheus: Prometheus, seconds: float, out: Path) -> None:
    found = panels()
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in found)
    figure = pyplot.figure(figsize=(18, height * 0.4))
    grid = GridSpec(height, 24, figure=figure, left=0.03, right=0.99, top=1, bottom=0.02, wspace=2.5, hspace=0.1)
    for row in panels("row"):
        axes = figure.add_subplot(grid[row["gridPos"]["y"], :])
        axes.text(-0.02, 0.4, row["title"], fontsize=11, fontweight="bold")
        axes.axis("off")
    for panel in found:
        place = panel["gridPos"]
        # Its first row of cells is for the title, its last for the numbers of its axis.
        rows = slice(place["y"] + 1, place["y"] + place["h"] - 1)
        axes = figure.add_subplot(grid[rows, place["x"] : place["x"] + place["w"]])
        axes.set_title(panel["title"], fontsize=8)
        if series := list(with_data(prometheus.series(panel, seconds))):
            DRAW[panel["type"]](axes, panel, series)
        else:
            axes.text(0.5, 0.5, "no data", ha="center", transform=axes.transAxes)
    figure.savefig(out, dpi=80)


def with_data(series: Series) -> Iterator[tuple[str, list[float], list[float]]]:
    return (one for one in series if any(math.isfinite(value) for value in one[2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--out", type=Path, default=DASHBOARD.with_name("preview.png"))
    told = parser.parse_args()
    mpl.use("agg")
    draw(Prometheus(told.prometheus), told.minutes * 60, told.out)


if __name__ == "__main__":
    main()
