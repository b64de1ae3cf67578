"""The highest rate of an open loop at which enough answers meet the targets."""

from collections.abc import Awaitable, Callable

from benchmarks.loops import OpenLoop
from benchmarks.run import Level, Run
from benchmarks.summary import goodput

MOST_PROBES = 16
LONE = 0.1
"""Requests under way on average, below which hardly one meets another."""


def lone(level: Level) -> bool:
    """Whether the level's requests were alone on the server, so that a lower rate would not answer them any sooner."""
    return sum(record.latency for record in level.records) < LONE * level.seconds


async def search(holds: Callable[[float], Awaitable[bool | None]], first: float, precision: float) -> float | None:
    """The highest rate for which `holds` was seen to be true, to within `precision` (a share of it). It is None for a
    rate that fails as any lower one would.

    Doubles or halves from `first` until one rate holds and another does not, then halves the way between them. None
    if none can hold, or none or all of 16 probes held, so a first guess may be off by a factor of 30,000.
    """
    held, failed = 0.0, float("inf")
    rate = first
    for _ in range(MOST_PROBES):
        if held_here := await holds(rate):
            held = max(held, rate)
        elif held_here is None and not held:
            return None
        else:
            failed = min(failed, rate)
        if failed - held <= precision * held:
            break
        rate = next_rate(held, failed)
    return held if 0 < held < failed < float("inf") else None


def next_rate(held: float, failed: float) -> float:
    """What to try between the highest rate that held (0: none yet) and the lowest that failed (infinite: none yet)."""
    if failed == float("inf"):
        return held * 2
    return failed / 2 if held == 0 else (held + failed) / 2


async def find(run: Run, first: float, share: float, precision: float) -> None:
    """Probe with levels of the run until its `capacity` is known: the rate at which `share` of requests meet the
    targets."""

    async def holds(rate: float) -> bool | None:
        loop = OpenLoop(round(rate, 4), run.settings.burstiness)
        level = await run.measure(loop, run.settings.requests(loop))
        if goodput(level.records, run.settings.targets) >= share:
            return True
        return None if lone(level) else False

    run.capacity = await search(holds, first, precision)
