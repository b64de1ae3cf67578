"""The highest rate of an open loop at which enough answers meet the targets."""

from collections.abc import Awaitable, Callable

from benchmarks.loops import OpenLoop
from benchmarks.run import Run
from benchmarks.summary import goodput

MOST_PROBES = 16


async def search(holds: Callable[[float], Awaitable[bool]], first: float, precision: float) -> float | None:
    """The highest rate for which `holds` was seen to be true, to within `precision` (a share of it).

    Doubles or halves from `first` until one rate holds and another does not, then halves the way between them. None
    if none or all of 16 probes held, so a first guess may be off by a factor of 30,000.
    """
    held, failed = 0.0, float("inf")
    rate = first
    for _ in range(MOST_PROBES):
        if await holds(rate):
            held = max(held, rate)
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

    async def holds(rate: float) -> bool:
        loop = OpenLoop(round(rate, 4), run.settings.burstiness)
        level = await run.measure(loop, run.settings.requests(loop))
        return goodput(level.records, run.settings.targets) >= share

    run.capacity = await search(holds, first, precision)
