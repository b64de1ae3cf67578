"""`python -m benchmarks.overload --seconds 120`: ten times as many requests as can be answered.

Starts a service of its own whose steps take a known time (`benchmarks.rigged_server`), so that the machine's own speed
says little: ROWS rows of TOKENS tokens take TOKENS steps. Measures the most that it answers, then sends requests at ten
times that rate, each with the service's time limit, and tells: what was answered in time (goodput) beside the most, how
long a refusal took, how many accepted requests missed their limit, and how long the first request after the flood took.

Writes overload.json and report.md into --out. Exit status 1 if goodput is below 90% of the peak, a refusal's 99th
percentile above 50 ms, an accepted request missed its limit, or the service is not itself again after a batch.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.child import Child, serving
from benchmarks.connection import post
from benchmarks.mischief import CHAT

ROWS, TOKENS = 8, 16
FIELDS = {
    "messages": [{"role": "user", "content": "Tell me of the lamp."}],
    "max_tokens": TOKENS,
    "temperature": 0,
    "ignore_eos": True,
}


@dataclass(frozen=True, slots=True)
class Answer:
    """`sent` in seconds since the phase began, `took` until the whole answer was there. `status` is 0 without one."""

    sent: float
    took: float
    status: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What an overload came to. Rates a second, times in seconds; `statuses` counts the flood's answers."""

    peak: float
    offered: float
    goodput: float
    refusal_p50: float
    refusal_p99: float
    accepted_longest: float
    accepted_late: int
    batch: float
    after: float
    statuses: dict[int, int]

    @property
    def good(self) -> bool:
        """Whether all the laws hold."""
        fast = self.goodput >= 0.9 * self.peak and self.refusal_p99 <= 0.05
        return fast and not self.accepted_late and self.after <= 2 * self.batch


async def ask(child: Child, began: float) -> Answer:
    sent, status = time.perf_counter(), 0
    with contextlib.suppress(ConnectionError):
        status = (await post(child.url, CHAT, FIELDS)).status
    return Answer(sent - began, time.perf_counter() - sent, status)


async def closed(child: Child, seconds: float) -> list[Answer]:
    """As many at once as fill two batches, each followed by the next."""
    began, found = time.perf_counter(), list[Answer]()

    async def client() -> None:
        while time.perf_counter() - began < seconds:
            found.append(await ask(child, began))

    await asyncio.gather(*(client() for _ in range(2 * ROWS)))
    return found


async def flood(child: Child, seconds: float, rate: float) -> list[Answer]:
    """One request every 1 / `rate` seconds, whatever becomes of those before it."""
    began, tasks = time.perf_counter(), list[asyncio.Task[Answer]]()
    for number in range(round(seconds * rate)):
        await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(child, began)))
    return list(await asyncio.gather(*tasks))


async def measure(child: Child, options: argparse.Namespace) -> Figures:
    await child.wait_ready()
    await closed(child, 2.0)
    steady = await closed(child, options.peak_seconds)
    if not (peak := rate_of(steady)):
        raise SystemExit(f"python -m benchmarks.overload: next to nothing was answered: {statuses(steady)}")
    batch = statistics.median([(await ask(child, 0.0)).took for _ in range(5)])
    answers = await flood(child, options.seconds, options.times * peak)
    after = (await ask(child, 0.0)).took
    return figures(answers, peak=peak, batch=batch, after=after, offered=options.times * peak, limit=options.limit)


def rate_of(answers: Sequence[Answer]) -> float:
    """Answers a second between the first batch's end, whose answers do not count, and the last one's, or 0."""
    ends = sorted(one.sent + one.took for one in answers if one.status == 200)
    if len(ends) < 2:
        return 0.0
    return sum(end - ends[0] > 0.05 for end in ends) / (ends[-1] - ends[0])


def figures(
    answers: Sequence[Answer], *, peak: float, batch: float, after: float, offered: float, limit: float
) -> Figures:
    in_time = [one for one in answers if one.status == 200 and one.took <= limit]
    refused = sorted(one.took for one in answers if one.status == 429)
    return Figures(
        peak=peak,
        offered=offered,
        goodput=rate_of(in_time),
        refusal_p50=statistics.median(refused) if refused else 0.0,
        refusal_p99=refused[int(0.99 * (len(refused) - 1))] if refused else 0.0,
        accepted_longest=max((one.took for one in answers if one.status != 429), default=0.0),
        accepted_late=sum(one.status != 429 for one in answers) - len(in_time),
        batch=batch,
        after=after,
        statuses=statuses(answers),
    )


def statuses(answers: Sequence[Answer]) -> dict[int, int]:
    """How many answers had each status."""
    return dict(Counter(one.status for one in answers))


def report(found: Figures, seconds: float, limit: float) -> str:
    refused = 429 in found.statuses
    rows = {
        "most answers a second": f"{found.peak:.1f}",
        f"offered for {seconds:.0f} s, requests a second": f"{found.offered:.0f}",
        f"answered within {limit:g} s, a second": f"{found.goodput:.1f} ({found.goodput / found.peak:.0%} of the most)",
        "refused, p50 / p99": f"{found.refusal_p50 * 1000:.1f} / {found.refusal_p99 * 1000:.1f} ms"
        if refused
        else "none",
        "accepted and not answered in time": f"{found.accepted_late}, the longest took {found.accepted_longest:.2f} s",
        "a request alone before / right after": f"{found.batch:.2f} / {found.after:.2f} s",
        "answers by status": ", ".join(f"{status}: {n}" for status, n in sorted(found.statuses.items())),
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items()), ""])


def run(options: argparse.Namespace) -> int:
    """Answers the exit status."""
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    flags = ["--step-ms", str(options.step_ms), "--max-batch-size", str(ROWS), "--log-level", "error"]
    flags += ["--request-timeout-s", str(options.limit), *options.flags]
    with serving("benchmarks.rigged_server", flags, out / "server.log") as child:
        found = asyncio.run(measure(child, options))
    (out / "overload.json").write_text(json.dumps(asdict(found), indent=1))
    text = report(found, options.seconds, options.limit)
    (out / "report.md").write_text(text)
    print(text)
    return int(not found.good)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long the flood lasts")
    parser.add_argument("--times", type=float, default=10.0, help="how many times the peak is offered")
    parser.add_argument("--peak-seconds", type=float, default=20.0)
    parser.add_argument("--step-ms", type=float, default=100.0)
    parser.add_argument("--limit", type=float, default=12.0, help="time limit of a request in seconds")
    parser.add_argument("--out", type=Path, default=Path("out/overload"))
    parser.add_argument("flags", nargs="*", help="after --: flags of the server")
    raise SystemExit(run(parser.parse_args()))


if __name__ == "__main__":
    main()
