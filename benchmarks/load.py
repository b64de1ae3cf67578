"""Load any OpenAI-compatible server with streamed chats and say how fast it answers.

python -m benchmarks.load --url http://127.0.0.1:21010 --model NAME --concurrency 1,8,32

One table row a level on standard output, progress on standard error, all records as JSON where `--json` says.
Exits with 1 if any request failed.
"""

import argparse
import asyncio
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.progress import Progress

from benchmarks.client import ChatClient
from benchmarks.closed_loop import measure
from benchmarks.connection import server_url
from benchmarks.machine import machine, versions
from benchmarks.summary import Level, summarise
from benchmarks.table import failures, table
from benchmarks.workloads import WORKLOADS, Workload, draw, uniform

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run was told. Ranges are in tokens, both ends included; `timeout` is seconds a request."""

    url: str
    model: str
    concurrency: tuple[int, ...]
    requests_per_level: int | None = None
    workload: str = "short"
    prompt_tokens: Range | None = None
    output_tokens: Range | None = None
    seed: int = 0
    warm_up: int = 1
    timeout: float = 600.0
    ignore_eos: bool = False
    api_key: str | None = field(default=None, repr=False)

    def requests(self, concurrency: int) -> int:
        """Requests at this level: as told, or two a client and at least 8."""
        return self.requests_per_level or max(8, 2 * concurrency)

    def lengths(self) -> Workload:
        """The named workload, with the ranges that were given in place of its own laws."""
        workload = WORKLOADS[self.workload]
        if self.prompt_tokens:
            workload = replace(workload, prompt_tokens=uniform(*self.prompt_tokens))
        if self.output_tokens:
            workload = replace(workload, output_tokens=uniform(*self.output_tokens))
        return workload


async def run(settings: Settings, progress: Callable[[], None]) -> list[Level]:
    """Measure every level, one after the other, each over connections of its own."""
    levels, serial, lengths = [], 0, settings.lengths()
    for concurrency in settings.concurrency:
        warm_up = draw(lengths, settings.warm_up, seed=settings.seed, first=serial)
        serial += len(warm_up)
        jobs = draw(lengths, settings.requests(concurrency), seed=settings.seed, first=serial)
        serial += len(jobs)
        with closing(client(settings)) as chat:
            levels.append(await measure(chat, jobs, warm_up, concurrency, progress))
    return levels


def client(settings: Settings) -> ChatClient:
    """A client with no connections yet."""
    return ChatClient(
        settings.url,
        settings.model,
        timeout=settings.timeout,
        ignore_eos=settings.ignore_eos,
        api_key=settings.api_key,
    )


def report(settings: Settings, levels: list[Level], started: datetime) -> dict[str, Any]:
    """Everything about a run as plain values; seconds and bytes throughout. The API key stays out.

    A record's `chunks` are the arrivals of its pieces of text, so the first is its time to first token.
    """
    told = asdict(settings)
    del told["api_key"]
    return {
        "started": started.isoformat(timespec="seconds"),
        "settings": told,
        "versions": versions(),
        "machine": machine(),
        "levels": [asdict(level) | {"summary": asdict(summarise(level))} for level in levels],
    }


def parse(arguments: Sequence[str] | None) -> tuple[Settings, Path | None]:
    """Settings and the JSON file's path. Exits with 2 and a sentence for flags that make no sense."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--url", type=url_of, required=True, help="the server's root, such as http://127.0.0.1:21010")
    add("--model", required=True, help="the model's name as the server knows it")
    add("--concurrency", type=levels_of, default=(1, 8, 32), help="clients at each level (1,8,32)")
    add("--requests-per-level", type=positive, help="twice the concurrency and at least 8 if not given")
    add("--workload", choices=sorted(WORKLOADS), default="short", help="the lengths' laws (short)")
    add("--prompt-tokens", type=range_of, metavar="LOW:HIGH", help="in place of the workload's own")
    add("--output-tokens", type=range_of, metavar="LOW:HIGH", help="in place of the workload's own")
    add("--seed", type=int, default=0, help="another seed asks for other texts and lengths (0)")
    add("--warm-up", type=natural, default=1, help="requests before each level that are not measured (1)")
    add("--timeout", type=float, default=600.0, help="seconds until a request counts as failed (600)")
    add("--ignore-eos", action="store_true", help="ask for full-length answers, and check that they are")
    add("--api-key", help="sent as a bearer token")
    add("--json", type=Path, dest="out", help="write settings, figures and every request's record here")
    told = vars(parser.parse_args(arguments))
    out: Path | None = told.pop("out")
    return Settings(**told), out


def url_of(text: str) -> str:
    """The text itself; ValueError if it is not a server's URL."""
    server_url(text)
    return text


def natural(text: str) -> int:
    """A whole number from 0 on; ValueError otherwise."""
    if (number := int(text)) < 0:
        raise ValueError(text)
    return number


def positive(text: str) -> int:
    """A whole number from 1 on; ValueError otherwise."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def levels_of(text: str) -> tuple[int, ...]:
    """ "1,8,32" as numbers of clients; ValueError otherwise."""
    return tuple(positive(part) for part in text.split(","))


def range_of(text: str) -> Range:
    """ "32:64" as its two ends; ValueError otherwise."""
    low, high = map(positive, text.split(":"))
    if low > high:
        raise ValueError(text)
    return low, high


def run_loop(main: Coroutine[Any, Any, list[Level]]) -> list[Level]:
    """Run on uvloop where it is installed: it takes a third off what a chunk costs the client."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 1 if any request failed."""
    settings, out = parse(arguments)
    started = datetime.now(UTC)
    total = sum(settings.warm_up + settings.requests(level) for level in settings.concurrency)
    with Progress(console=Console(stderr=True), refresh_per_second=2) as bar:
        task = bar.add_task("requests", total=total)
        levels = run_loop(run(settings, lambda: bar.advance(task)))
    if out:
        out.write_bytes(orjson.dumps(report(settings, levels, started)))
    show(levels)
    return 1 if any(level.failures() for level in levels) else 0


def show(levels: list[Level]) -> None:
    """Print the table, and under it what failed."""
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file has no edge to wrap at
    console.print(table(levels))
    for line in failures(levels):
        console.print(line, markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
