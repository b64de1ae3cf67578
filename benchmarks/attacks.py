"""`python -m benchmarks.attacks`: what others notice of each attack, and what it makes the service hold.

Starts a service of its own (flags after `--` are passed to it; by default the demo model with a small token budget),
lets one attack after the other at it for --seconds (`benchmarks.attackers`), and meanwhile asks `/health/live` from
another process, on a connection of its own each time. Then, with a service that asks for keys: what a connection
without a key can make it hold, and how long a good client's answers take while another key does its worst.

Writes attacks.json and report.md into --out. Exit status 1 if the service ended, or a figure misses what is required.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import SplitResult

import orjson
import psutil  # type: ignore[import-untyped]

from benchmarks.attackers import (
    CHUNKED,
    HEAD,
    QUESTION,
    Attack,
    Said,
    attacks,
    chat,
    endless_schemas,
    half_a_character,
    held,
    repeated,
    wire,
)
from benchmarks.child import Child, serving
from benchmarks.connection import exchange, get
from benchmarks.mischief import CHAT
from benchmarks.soak import settle

MIB = 2**20
FLAGS = ["--context-window", "2048", "--token-budget", "16384", "--max-batch-size", "16", "--log-level", "warning"]
PAUSE = 0.005
"""Seconds between two probes."""

LIVE_WORST, LIVE_P99 = 0.1, 0.05
KEYLESS_BYTES = 128 * 2**10
SHARE = 2.5
"""How much longer an answer may take while another key does its worst."""

LONGEST = 60.0
"""Seconds after which an answer is waited for no more, and counts as that long."""

HEADERS = b"".join(b"a%d:b\r\n" % n for n in range(95))
KEYLESS = {
    "half a head": b"GET / HTTP/1.1\r\nHost: localhost\r\na: " + b"b" * 16_000,
    "a head and a part of its body": HEAD + b"Content-Length: 4000000\r\n" + HEADERS + b"\r\n" + b"x" * 100_000,
    "half of the trailers": CHUNKED + b"0\r\n" + b"a:b\r\n" * 700,
    "answers that are not read": b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100,
}


@dataclass(frozen=True, slots=True)
class Effect:
    """What an attack did. Times of probes in seconds, memory of the process in bytes; `said` counts its answers."""

    attack: str
    probes: int
    unanswered: int
    p99: float
    worst: float
    before: int
    most: int
    after: int
    said: dict[str, int]


def probe(url: SplitResult, seconds: float) -> list[float | None]:
    """How long `/health/live` took, again and again for so long; None where it was not 200."""

    async def loop() -> list[float | None]:
        found, end = list[float | None](), time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            try:
                well = (await get(url, "/health/live")).status == 200
            except OSError:
                well = False
            found.append(time.perf_counter() - began if well else None)
            await asyncio.sleep(PAUSE)
        return found

    return asyncio.run(loop())


def resident(child: Child) -> int:
    """Bytes. Raises `psutil.NoSuchProcess` if it has ended."""
    return int(psutil.Process(child.popen.pid).memory_info().rss)


@contextlib.asynccontextmanager
async def acting(attack: Attack, url: SplitResult) -> AsyncIterator[Said]:
    """It acts for as long as this lasts."""
    said = Said()
    task = asyncio.ensure_future(attack(url, said))
    try:
        yield said
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def effect(child: Child, pool: ProcessPoolExecutor, name: str, attack: Attack, seconds: float) -> Effect:
    before = most = resident(child)
    async with acting(attack, child.url) as said:
        await asyncio.sleep(0.5)
        probing = asyncio.get_running_loop().run_in_executor(pool, probe, child.url, seconds)
        while not probing.done():
            most = max(most, resident(child))
            await asyncio.wait([probing], timeout=0.05)
    await settle(child)
    times = sorted(took for took in probing.result() if took is not None)
    unanswered = len(probing.result()) - len(times)
    p99 = times[int(0.99 * (len(times) - 1))]
    return Effect(name, len(times), unanswered, p99, times[-1], before, most, resident(child), dict(said))


async def effects(child: Child, options: argparse.Namespace) -> list[Effect]:
    await child.wait_ready()
    found = []
    with ProcessPoolExecutor(1) as pool:
        pool.submit(probe, child.url, 0.1).result()
        os.nice(5)  # an attacker has a machine of its own
        chosen = {"nobody": idle} | attacks(await half_a_character(child.url))
        await warm(child)
        for name, attack in chosen.items():
            if options.only in name:
                found.append(await effect(child, pool, name, attack, options.seconds))
                print(row(found[-1]), flush=True)
    return found


async def idle(url: SplitResult, said: Said) -> None:
    """No attack, for comparison."""


async def warm(child: Child) -> None:
    """Let it take what its own settings allow: a batch that fills the token budget's rows, and a large body."""
    await exchange(child.url, chat(n=16, max_tokens=64, ignore_eos=True))
    await exchange(child.url, wire("/v1/tokenize", orjson.dumps({"prompt": "a b " * 900_000})))


# Keys


async def keyless(child: Child, count: int) -> dict[str, float]:
    """Bytes that each of `count` connections without a key makes the process hold."""
    await child.wait_ready()
    found = {}
    for name, sent in KEYLESS.items():
        before = resident(child)
        async with acting(held(sent, count, reads=False), child.url):
            await asyncio.sleep(5)
            await get(child.url, "/health/live")
            found[name] = (resident(child) - before) / count
        await settle(child)
    return found


def keyed(key: str, request: bytes) -> bytes:
    return request.replace(b"\r\n", f"\r\nAuthorization: Bearer {key}\r\n".encode(), 1)


WORST: dict[str, Attack] = {
    "40 clients of priority -8": repeated([keyed("bad", chat(priority=-8, max_tokens=16, ignore_eos=True))], 40),
    "400 clients, which fill its share of the queue": repeated(
        [keyed("bad", chat(max_tokens=16, ignore_eos=True))], 400
    ),
    "chats of 4 MiB that are refused, 4 clients": repeated(
        [keyed("bad", chat(messages=[{"role": "user", "content": "word " * 838_000}]))], 4
    ),
    "schemas that compile endlessly, 4 clients": repeated((keyed("bad", one) for one in endless_schemas()), 4),
    "answers of 16 x 960 tokens, 2 clients": repeated([keyed("bad", chat(n=16, max_tokens=960, ignore_eos=True))], 2),
}


async def good_answer(child: Child, times: int) -> float:
    """Median seconds of a short answer to the good key."""
    request = keyed("good", wire(CHAT, orjson.dumps({"messages": QUESTION, "max_tokens": 16, "ignore_eos": True})))
    found = []
    for _ in range(times):
        began = time.perf_counter()
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(LONGEST):
                await exchange(child.url, request)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


async def shares(child: Child, options: argparse.Namespace) -> dict[str, float]:
    """How long a good key's answer takes while another does its worst, in times of what it takes alone."""
    await good_answer(child, 3)
    alone = await good_answer(child, options.answers)
    found = {"alone, s": alone}
    for name, attack in WORST.items():
        async with acting(attack, child.url):
            await asyncio.sleep(2)
            found[name] = await good_answer(child, options.answers) / alone
        print(f"| {name} | {found[name]:.2f} |", flush=True)
        await settle(child)
    return found


async def between_keys(child: Child, options: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    return await keyless(child, options.connections), await shares(child, options) if options.answers else {}


# What it came to


def row(one: Effect) -> str:
    said = ", ".join(f"{word}: {count}" for word, count in sorted(one.said.items()))
    live = f"{one.p99 * 1000:.0f} / {one.worst * 1000:.0f}" + (f", {one.unanswered} not 200" if one.unanswered else "")
    memory = " / ".join(f"{size / MIB:.0f}" for size in (one.before, one.most, one.after))
    return f"| {one.attack} | {live} | {memory} | {said or '-'} |"


def report(found: Sequence[Effect], held_by: dict[str, float], ratios: dict[str, float]) -> str:
    lines = ["| attack | live p99 / worst, ms | memory before / most / after, MiB | its answers |", "| --- " * 4 + "|"]
    lines += [*map(row, found), "", "| a connection without a key | KiB held |", "| --- | --- |"]
    lines += [f"| {name} | {size / 1024:.0f} |" for name, size in held_by.items()]
    lines += ["", "| a good key's answer beside another's worst | times as long |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {ratio:.2f} |" for name, ratio in ratios.items()), ""])


def good(found: Sequence[Effect], held_by: dict[str, float], ratios: dict[str, float]) -> bool:
    quick = all(one.worst <= LIVE_WORST and one.p99 <= LIVE_P99 and not one.unanswered for one in found)
    fair = all(ratio <= SHARE for name, ratio in ratios.items() if name in WORST)
    return quick and fair and all(size <= KEYLESS_BYTES for size in held_by.values())


def keep_to(child: Child, cores: Sequence[int]) -> None:
    """Let the service have these cores alone, if any are named: what attackers cost is not its own."""
    if cores:
        psutil.Process(child.popen.pid).cpu_affinity(list(cores))


def run(options: argparse.Namespace) -> int:
    """Answers the exit status."""
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, *options.flags]
    found, held_by, ratios = list[Effect](), dict[str, float](), dict[str, float]()
    if options.part != "keys":
        with serving("server", flags, out / "server.log") as child:
            keep_to(child, options.cores)
            found = asyncio.run(effects(child, options))
    if options.part != "live":
        with serving("server", [*flags, "--api-keys", "good,bad"], out / "keys.log") as child:
            keep_to(child, options.cores)
            held_by, ratios = asyncio.run(between_keys(child, options))
    told = {"effects": [asdict(one) for one in found], "keyless": held_by, "shares": ratios}
    (out / "attacks.json").write_text(json.dumps(told, indent=1))
    text = report(found, held_by, ratios)
    (out / "report.md").write_text(text)
    print(text)
    return int(not good(found, held_by, ratios))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each attack lasts")
    parser.add_argument("--part", choices=["all", "live", "keys"], default="all", help="what is measured")
    parser.add_argument("--cores", type=int, nargs="*", default=[], help="numbers of the service's cores (all)")
    parser.add_argument("--only", default="", help="only attacks with this in their name")
    parser.add_argument("--connections", type=int, default=1000, help="how many hold what they can without a key")
    parser.add_argument("--answers", type=int, default=10, help="answers of the good key that are timed; 0: none")
    parser.add_argument("--out", type=Path, default=Path("out/attacks"))
    parser.add_argument("flags", nargs="*", help="after --: more flags of the server")
    raise SystemExit(run(parser.parse_args()))


if __name__ == "__main__":
    main()
