"""What a soak's measurements say: how much each grew after the first fifth of the time, in words and in a picture."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.soak import Sample

LIMIT = 0.02
"""Most that a quantity may grow after the warm-up."""

BOUNDED = {
    "rss": ("resident memory, MiB", 2**20),
    "device_memory": ("device memory, MiB", 2**20),
    "descriptors": ("file descriptors", 1),
    "threads": ("threads", 1),
    "tasks": ("tasks", 1),
}
"""What must not grow, by the name of the field, and the unit that it is shown in."""

SHOWN = BOUNDED | {"latency": ("a short answer, ms", 1e-3)}
"""Latency is shown but not judged, because it also reflects other load on the machine."""


def ends(samples: Sequence[Sample], field: str) -> tuple[float, float]:
    """Medians of the fifth after the warm-up, and of the last fifth."""
    values = [float(getattr(one, field)) for one in samples]
    fifth = max(1, len(values) // 5)
    return statistics.median(values[fifth : 2 * fifth] or values), statistics.median(values[-fifth:])


def growths(samples: Sequence[Sample]) -> Mapping[str, float]:
    """For each bounded quantity by how much of itself it grew."""
    found = {field: ends(samples, field) for field in BOUNDED}
    return {field: (last - first) / first if first else last for field, (first, last) in found.items()}


def report(samples: Sequence[Sample], words: Counter[str]) -> str:
    """In Markdown."""
    lines = [f"# A soak of {samples[-1].at / 60:.0f} minutes, {words.total()} clients", ""]
    lines += ["| | after the warm-up | in the end | growth |", "| --- | --- | --- | --- |"]
    for field, (name, unit) in SHOWN.items():
        first, last = ends(samples, field)
        lines.append(f"| {name} | {first / unit:.1f} | {last / unit:.1f} | {(last - first) / (first or 1):+.1%} |")
    lines += ["", "| what came of the clients | times |", "| --- | --- |"]
    lines += [f"| {word} | {number} |" for word, number in words.most_common()]
    return "\n".join([*lines, "", "![growth](growth.png)", ""])


def picture(samples: Sequence[Sample], file: Path) -> None:
    """Each quantity over the minutes, with the end of the warm-up marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 12), layout="constrained")
    minutes = [one.at / 60 for one in samples]
    for place, (field, (name, unit)) in enumerate(SHOWN.items(), 1):
        axes = figure.add_subplot(len(SHOWN), 1, place, title=name)
        values = [getattr(one, field) / unit for one in samples]
        axes.plot(minutes, values, marker=".")
        axes.set_ylim(0, 1.1 * max(values))
        axes.axvline(minutes[-1] / 5, linestyle=":", color="gray")
    axes.set_xlabel("minutes")
    figure.savefig(file, dpi=100)
