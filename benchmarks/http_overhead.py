"""What the service's HTTP layer costs by itself: an engine without a model, against a bare answer of constant bytes.

    python -m benchmarks.http_overhead [--streams 1,64,512,2000] [--tokens N] [--repeats N]

Every measurement has a server process of its own, which tells its own CPU time and memory; this process only counts
what comes. Of several passes the one that took the least CPU is shown: other work on the machine only ever adds to it.
Exits with 1 if a token costs more than three bare ones, or the idle streams' process has more than 300 MB.
"""

import argparse
import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import orjson
import uvloop
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.connection import Connection, get, post, request
from benchmarks.scripted_server import MODES, NAME, Mode, raise_open_files
from benchmarks.summary import percentile

ROOT = Path(__file__).parents[1]
PATIENCE = 120.0
SETTLING = 0.2
MOST_TIMES_BARE = 3.0
MOST_IDLE_BYTES = 300e6
LEAST_ROWS = 64
"""From this many streams on, the limit applies to a token's cost in a step of its own. A step of few rows costs what
its way from the engine's thread to the event loop does, which a bare answer does not have."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One mode at one number of streams, from `go` to the last end. Times in seconds, memory in bytes.

    `cpu` is that of the whole server process, `loop_cpu` that of its event loop's thread. `idle_memory` is the whole
    process with every stream open and waiting, and `empty_memory` before the first one was opened.
    """

    mode: Mode
    streams: int
    tokens: int
    events: int
    seconds: float
    cpu: float
    loop_cpu: float
    lags: tuple[float, ...]
    empty_memory: int
    idle_memory: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def cpu_per_token(self) -> float:
        return self.cpu / self.tokens

    @property
    def loop_cpu_per_step(self) -> float:
        """Of the event loop, for one token on each stream."""
        return self.loop_cpu * self.streams / self.tokens

    @property
    def memory_per_stream(self) -> float:
        return (self.idle_memory - self.empty_memory) / self.streams


def times_bare(measured: Measured, others: Sequence[Measured]) -> float:
    """CPU per token over that of the bare answer that is written the same way, at as many streams."""
    mode: Mode = "bare at once" if measured.mode.endswith("at once") else "bare"
    [bare] = [other for other in others if (other.mode, other.streams) == (mode, measured.streams)]
    return measured.cpu_per_token / bare.cpu_per_token


def broken_limits(found: Sequence[Measured]) -> list[str]:
    """A sentence for each limit that is not kept: of a token's cost, and of idle streams' memory."""
    ours = [one for one in found if not one.mode.startswith("bare")]
    costly = [
        f"{one.streams} streams, {one.mode}: a token costs {ratio:.1f} times a bare one"
        for one in ours
        if (one.mode == "at once" or one.streams >= LEAST_ROWS) and (ratio := times_bare(one, found)) > MOST_TIMES_BARE
    ]
    large = [
        f"{one.streams} idle streams, {one.mode}: the process has {one.idle_memory / 1e6:.0f} MB"
        for one in ours
        if one.idle_memory > MOST_IDLE_BYTES
    ]
    return costly + large


class Answer:
    """One streamed answer: counts its events as they come, and keeps its end."""

    def __init__(self) -> None:
        self.events = 0
        self.end = b""
        self.begun = asyncio.get_running_loop().create_future()

    def receive(self, status: int, data: bytes) -> None:
        cut = self.end.endswith(b"\n") and data.startswith(b"\n")
        self.events += data.count(b"\n\n") + cut
        self.end = self.end[-500:] + data
        if self.events and not self.begun.done():
            self.begun.set_result(None)


def request_of(url: SplitResult, mode: Mode, tokens: int) -> bytes:
    """One answer's HTTP request."""
    asked = {
        "model": NAME,
        "messages": [{"role": "user", "content": "Say some words."}],
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    path = "/bare" if mode.startswith("bare") else "/v1/chat/completions"
    return request(url, "POST", path, orjson.dumps(asked))


@contextlib.asynccontextmanager
async def connected(url: SplitResult, streams: int) -> AsyncIterator[list[Connection]]:
    """This many connections, closed at the end."""
    connections: list[Connection] = []
    try:
        for _ in range(streams):
            connections.append(await Connection.open(url))
        yield connections
    finally:
        for connection in connections:
            connection.close()


def check(answer: Answer, mode: Mode, tokens: int) -> None:
    """Raises ValueError for an answer that is not whole."""
    if mode.startswith("bare"):
        whole = answer.events == tokens
    else:
        whole = b'"completion_tokens":%d' % tokens in answer.end and b"data: [DONE]" in answer.end
    if not whole:
        raise ValueError(f"{mode}: an answer of {tokens} tokens ended with {answer.end[-200:]!r}")


async def usage(url: SplitResult) -> Any:
    """What the server process has used."""
    return orjson.loads((await get(url, "/usage")).body)


async def ready(url: SplitResult) -> None:
    """Wait until the server takes requests. Raises TimeoutError."""
    async with asyncio.timeout(PATIENCE):
        while (await get(url, "/health/ready")).status != 200:  # noqa: ASYNC110  # another process cannot notify this one
            await asyncio.sleep(0.05)


async def measure(url: SplitResult, mode: Mode, streams: int, tokens: int) -> Measured:
    """Open the streams, let them go, and wait for their ends."""
    await ready(url)
    empty = await usage(url)
    message = request_of(url, mode, tokens)
    async with connected(url, streams) as connections, asyncio.TaskGroup() as group:
        answers = [Answer() for _ in connections]
        pairs = zip(connections, answers, strict=True)
        ends = [group.create_task(connection.send(message, answer.receive)) for connection, answer in pairs]
        await asyncio.gather(*(answer.begun for answer in answers))
        await asyncio.sleep(SETTLING)
        idle = await usage(url)
        before = sum(answer.events for answer in answers)
        started = time.perf_counter()
        await post(url, "/go", {})
        await asyncio.gather(*ends)
        seconds = time.perf_counter() - started
        done = await usage(url)
    for answer in answers:
        check(answer, mode, tokens)
    return Measured(
        mode=mode,
        streams=streams,
        tokens=streams * (tokens - 1),
        events=sum(answer.events for answer in answers) - before,
        seconds=seconds,
        cpu=done["cpu"] - idle["cpu"],
        loop_cpu=done["loop_cpu"] - idle["loop_cpu"],
        lags=tuple(done["lags"]),
        empty_memory=empty["memory"],
        idle_memory=idle["memory"],
    )


@contextlib.contextmanager
def server(mode: Mode, streams: int, tokens: int) -> Iterator[SplitResult]:
    """A server process; its address."""
    flags = ["--streams", str(streams), "--tokens", str(tokens), "--mode", mode]
    command = [sys.executable, "-m", "benchmarks.scripted_server", *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield urlsplit(f"http://127.0.0.1:{int(process.stdout.readline())}")
        finally:
            process.kill()


def compare(streams: int, tokens: int, repeats: int) -> list[Measured]:
    """Every mode with this many streams, interleaved: of each the pass with the least CPU time."""
    passes: list[list[Measured]] = []
    for _ in range(repeats):
        passes.append([])
        for mode in MODES:
            with server(mode, streams, tokens) as url:
                measured = uvloop.run(measure(url, mode, streams, tokens))
            passes[-1].append(measured)
            print(f"{streams} streams, {mode}: {measured.cpu_per_token * 1e6:.1f} µs a token", file=sys.stderr)
    return [min(same, key=lambda one: one.cpu) for same in zip(*passes, strict=True)]


def tokens_for(streams: int) -> int:
    """Tokens a stream that make a measurement of some seconds."""
    return min(20_000, max(100, 200_000 // streams))


def table(found: Sequence[Measured]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, padding=0)
    for column in (
        "streams",
        "answers",
        "tok/s",
        "tok an\nevent",
        "CPU µs\na tok",
        "times\nbare",
        "loop ms\na step",
        "lag ms\np50/p99",
        "idle kB\na stream",
        "idle MB",
    ):
        shown.add_column(column, justify="right")
    for one in found:
        lags = [f"{percentile(one.lags, percent) * 1000:.0f}" for percent in (50, 99)] if one.lags else ["-"]
        shown.add_row(
            f"{one.streams:,}",
            one.mode,
            f"{one.tokens_per_second:,.0f}",
            f"{one.tokens / one.events:.2f}",
            f"{one.cpu_per_token * 1e6:.1f}",
            f"{times_bare(one, found):.2f}",
            f"{one.loop_cpu_per_step * 1e3:.3f}",
            "/".join(lags),
            f"{one.memory_per_stream / 1e3:.0f}",
            f"{one.idle_memory / 1e6:.0f}",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--streams", default="1,64,512,2000", help="how many at once, several with commas")
    parser.add_argument("--tokens", type=int, help="tokens a stream; none: as many as take some seconds")
    parser.add_argument("--repeats", type=int, default=2, help="passes over every measurement")
    asked = parser.parse_args()
    raise_open_files()
    found = [
        one
        for streams in map(int, asked.streams.split(","))
        for one in compare(streams, asked.tokens or tokens_for(streams), asked.repeats)
    ]
    Console().print(table(found))
    broken = broken_limits(found)
    print(*broken, sep="\n")
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()
