"""`python -m benchmarks.soak --minutes N`: mixed load with faults for N minutes, and what grows meanwhile.

Starts a service of its own whose engine fails now and then (`benchmarks.rigged_server`; flags after `--` are passed to
it, by default a tiny random model) and lets clients of every kind at it (`benchmarks.mischief`). Once a minute the
clients pause, and the quiet service is measured: memory, descriptors, threads, tasks, and how long a request takes.

Writes report.md, series.json and growth.png into --out. Exit status 1 if something grew by more than 2% after the first
fifth, if an answer was wrong, or if something is left of the requests in the end.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from benchmarks import tiny_model
from benchmarks.child import Child, serving
from benchmarks.connection import post
from benchmarks.mischief import CHAT, Crowd, act
from benchmarks.soak_report import LIMIT, growths, picture, report
from server.settings import parse

FLAGS = ["--queue-size", "48", "--max-batch-size", "8", "--send-timeout-s", "5", "--log-level", "warning"]
PROBES = 21
SETTLED = 20.0
"""Seconds that connections and tasks have to end once no client is there: more than any time limit of a connection."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The quiet service. `at` in seconds since the start, memory in bytes, `latency` (the least) in seconds."""

    at: float
    rss: int
    device_memory: float
    descriptors: int
    threads: int
    tasks: float
    latency: float
    running: float
    queued: float


async def probe(child: Child) -> float:
    """Least time of a short answer of fixed length, one at a time, in which other processes show least. A request that
    the engine fails is not counted."""
    times: list[float] = []
    messages = [{"role": "user", "content": "Tell me of the lamp."}]
    fields = {"messages": messages, "temperature": 0, "max_tokens": 32, "ignore_eos": True}
    while len(times) < PROBES:
        began = time.perf_counter()
        if (await post(child.url, CHAT, fields)).status == 200:
            times.append(time.perf_counter() - began)
    return min(times)


async def settle(child: Child) -> None:
    """Wait until nothing of the clients is left: no connection but this one's, or the time for that has passed."""
    process = psutil.Process(child.popen.pid)
    end = time.monotonic() + SETTLED
    while time.monotonic() < end:
        others = [one for one in process.net_connections("tcp") if one.status == psutil.CONN_ESTABLISHED]
        if not others:
            return
        await asyncio.sleep(0.5)


async def sample(child: Child, began: float) -> Sample:
    await settle(child)
    latency = await probe(child)
    metrics = await child.metrics()
    process = psutil.Process(child.popen.pid)
    return Sample(
        at=time.monotonic() - began,
        rss=process.memory_info().rss,
        device_memory=metrics["device_memory_bytes"],
        descriptors=process.num_fds(),
        threads=process.num_threads(),
        tasks=metrics["tasks"],
        latency=latency,
        running=metrics["running_rows"],
        queued=metrics["queue_depth"],
    )


async def load(crowd: Crowd, seconds: float, pause: float, words: Counter[str]) -> None:
    """One client after another for so long, with a pause after each."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        words[await act(crowd)] += 1
        await asyncio.sleep(crowd.dice.random() * 2 * pause)


async def soak(child: Child, options: argparse.Namespace) -> tuple[list[Sample], Counter[str]]:
    await child.wait_ready()
    began, end = time.monotonic(), time.monotonic() + options.minutes * 60
    crowd, words, samples = Crowd(child.url, options.seed), Counter[str](), list[Sample]()
    while time.monotonic() < end:
        async with asyncio.TaskGroup() as clients:
            for _ in range(options.clients):
                clients.create_task(load(crowd, options.every, options.pause, words))
        samples.append(await sample(child, began))
        print(f"{samples[-1].at / 60:5.1f} min  {words.total()} clients  {samples[-1]}", file=sys.stderr, flush=True)
    return samples, words


def run(options: argparse.Namespace) -> int:
    """Answers the exit status."""
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        flags = options.flags or ["--model", folder, "--load-format", "dummy", "--name", "tiny"]
        if not options.flags:
            tiny_model.make(Path(folder), parse([]).cache_dir)
        rigged = ["--fail-every", str(options.fail_every), *FLAGS, *flags]
        with serving("benchmarks.rigged_server", rigged, out / "server.log") as child:
            samples, words = asyncio.run(soak(child, options))
    (out / "series.json").write_text(json.dumps([asdict(one) for one in samples], indent=1))
    text = report(samples, words)
    (out / "report.md").write_text(text)
    print(text, flush=True)
    picture(samples, out / "growth.png")
    grew = any(growth > LIMIT for growth in growths(samples).values())
    wrong = any(word.startswith("WRONG") for word in words)
    return int(grew or wrong or samples[-1].running + samples[-1].queued > 0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=4, help="how many act at the same time")
    parser.add_argument("--pause", type=float, default=0.3, help="mean seconds that a client rests between two acts")
    parser.add_argument("--every", type=float, default=50.0, help="seconds of load between two quiet measurements")
    parser.add_argument("--fail-every", type=int, default=500, help="about how many steps go well between two faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/soak"))
    parser.add_argument("flags", nargs="*", help="after --: flags of the server, instead of the tiny model's")
    raise SystemExit(run(parser.parse_args()))


if __name__ == "__main__":
    main()
