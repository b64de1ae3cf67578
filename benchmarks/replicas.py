"""What a second GPU brings: one server, then several behind HAProxy or as replicas of Ray Serve, each on its own GPU.

MICROBATCH_MODEL=FOLDER MICROBATCH_NAME=m python -m benchmarks.replicas --replicas 2 --clients 64

The service's settings are its MICROBATCH_* variables. One server has --clients clients with RAGFlow's chats, several
have that many each. Then conversations go on over several turns, with and without affinity: what is reused of prompts
is what a server had computed for an earlier turn. A table on standard output; figures and logs in --out, after each
measurement. Exits with 1 if a request failed, with 2 if something does not start.
"""

import argparse
import asyncio
import contextlib
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult

import orjson

from benchmarks import flags
from benchmarks.balancer import BalancerError, balancing
from benchmarks.child import Child, ServerEnded, serving
from benchmarks.connection import get
from benchmarks.load import run_loop, wide_console
from benchmarks.ray_serve import installed, ray_serving
from benchmarks.run import LevelFigures, Run, Settings
from benchmarks.table import number, quantiles, table
from benchmarks.workloads import CONVERSATIONS, TURNS

COLUMNS = (
    "servers",
    "load",
    "clients",
    "failed",
    "requests/s",
    "ratio",
    "output\ntok/s",
    "first token ms\np50 / p90 / p95 / p99",
    "prompts\nreused",
)
PATIENCE = 300.0
"""Seconds that servers may take until they are ready."""
SESSION_HEADER = "x-session-id"
REPLICA = re.compile(rb'replica="(\w+)"')


class NotReady(Exception):
    """No answer within the patience; the message says where the log is."""


def service_variables() -> dict[str, str]:
    """The service's settings in this process's environment."""
    return {name: value for name, value in os.environ.items() if name.startswith("MICROBATCH_")}


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. `ratio` is its requests per second over those of the first row with its load, None after
    failures."""

    name: str
    workload: str
    clients: int
    ratio: float | None
    figures: LevelFigures


@dataclass(slots=True)
class Comparison:
    """What to measure, and what was. `replicas` share the load of `clients` each, `rounds` requests a client.

    `prompt_tokens` and `output_tokens` are in place of those of RAGFlow's chats, where a small model has no room.
    """

    replicas: int
    clients: int
    rounds: int
    parts: tuple[str, ...]
    out: Path
    prompt_tokens: tuple[int, int] | None
    output_tokens: tuple[int, int] | None
    variables: dict[str, str] = field(default_factory=service_variables)
    rows: list[Row] = field(default_factory=list)

    async def run(self) -> None:
        """All parts. Raises BalancerError, ServerEnded and NotReady."""
        if "haproxy" in self.parts:
            await self.haproxy()
        if "ray" in self.parts:
            await self.ray()

    async def haproxy(self) -> None:
        """One server alone, then all of them behind the balancer."""
        with self.server(0) as first, contextlib.ExitStack() as others:
            await first.wait_ready()
            await self.chats("1 server", first.url, 1)
            servers = [first, *(others.enter_context(self.server(gpu)) for gpu in range(1, self.replicas))]
            for server in servers:
                await server.wait_ready()
            name = f"{self.replicas} servers, HAProxy"
            async with self.balanced(servers) as url:
                await self.chats(name, url, self.replicas)
            async with self.balanced(servers, affinity=False) as url:
                await self.conversations(f"{name}, fewest requests", url, seed=1)
            async with self.balanced(servers) as url:
                await self.conversations(f"{name}, by conversation", url, seed=2)

    async def ray(self) -> None:
        """One replica, then all of them."""
        with ray_serving(1, self.out, self.variables) as (url, log):
            await ready(url, log, 1)
            await self.chats("Ray Serve, 1 replica", url, 1)
        name = f"Ray Serve, {self.replicas} replicas"
        with ray_serving(self.replicas, self.out, self.variables) as (url, log):
            await ready(url, log, self.replicas)
            await self.chats(name, url, self.replicas)
            await self.conversations(f"{name}, fewest requests", url, seed=3)
            await self.conversations(f"{name}, by session", url, seed=4, session_header=SESSION_HEADER)

    def server(self, gpu: int) -> contextlib.AbstractContextManager[Child]:
        """A server that sees this GPU alone."""
        variables = self.variables | {"CUDA_VISIBLE_DEVICES": str(gpu)}
        return serving("server", [], self.out / f"server-{gpu}.log", variables)

    @contextlib.asynccontextmanager
    async def balanced(self, servers: Sequence[Child], *, affinity: bool = True) -> AsyncIterator[SplitResult]:
        """The address of the balancer in front of these, once it answers."""
        with balancing([server.url for server in servers], self.out, affinity=affinity) as url:
            await ready(url, self.out / "haproxy.log")
            yield url

    async def chats(self, name: str, url: SplitResult, replicas: int) -> None:
        """RAGFlow's chats, with the clients that so many replicas have."""
        settings = await full_answers(url, self.clients * replicas, self.rounds * self.clients * replicas)
        lengths: dict[str, Any] = {"prompt_tokens": self.prompt_tokens, "output_tokens": self.output_tokens}
        await self.measure(name, replace(settings, workload="ragflow-chat", warm_up=8 * replicas, **lengths))

    async def conversations(self, name: str, url: SplitResult, seed: int, session_header: str | None = None) -> None:
        """Conversations with all their turns. Another seed has other texts, of which no server has seen anything."""
        settings = await full_answers(url, self.clients * self.replicas, TURNS * CONVERSATIONS)
        settings = replace(settings, workload="conversations", seed=seed, warm_up=0, session_header=session_header)
        await self.measure(name, settings)

    async def measure(self, name: str, settings: Settings) -> None:
        """One row, printed and written at once."""
        run = Run(settings)
        await run.measure_all()
        [figures] = run.figures().levels
        first = next((row.figures for row in self.rows if row.workload == settings.workload), figures)
        self.rows.append(Row(name, settings.workload, int(figures.load), ratio(figures, first), figures))
        pace = figures.summary.requests_per_second
        print(f"{name}, {settings.workload}: {pace:.2f} requests/s", file=sys.stderr, flush=True)
        (self.out / "replicas.json").write_bytes(orjson.dumps([asdict(row) for row in self.rows]))


async def ready(url: SplitResult, log: Path, replicas: int = 0) -> None:
    """Wait until requests are taken at this address, and so many replicas are in its metrics. Raises NotReady."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if (await get(url, "/health/ready")).status == 200 and await replicas_at(url) >= replicas:
                return
        await asyncio.sleep(0.2)
    raise NotReady(f"nothing was ready within {PATIENCE:g} s; see {log}")


async def replicas_at(url: SplitResult) -> int:
    """How many replicas of Ray Serve the metrics there are of."""
    return len(set(REPLICA.findall((await get(url, "/metrics")).body)))


async def full_answers(url: SplitResult, clients: int, requests: int) -> Settings:
    """Settings of one level, of answers in full length from the model that is served there."""
    model = orjson.loads((await get(url, "/v1/models")).body)["data"][0]["id"]
    return Settings(
        url.geturl(),
        model,
        concurrency=(clients,),
        requests_per_level=(requests,),
        full_length=True,
        body={"ignore_eos": True},
    )


def ratio(figures: LevelFigures, first: LevelFigures) -> float | None:
    """Requests per second over those of the first; None where answers are missing."""
    if figures.summary.errors or first.summary.errors:
        return None
    return figures.summary.requests_per_second / first.summary.requests_per_second


def cells(row: Row) -> list[str]:
    """A cell for each of COLUMNS."""
    summary = row.figures.summary
    failed = sum(summary.errors.values())
    reused = summary.cached_tokens / summary.prompt_tokens if summary.prompt_tokens else None
    return [
        row.name,
        row.workload,
        str(row.clients),
        str(failed),
        f"{summary.requests_per_second:.2f}",
        number(row.ratio, "{:.2f}"),
        f"{summary.output_tokens_per_second:,.0f}",
        quantiles(summary.ttft, scale=1000, digits=0),
        number(reused, "{:.0%}"),
    ]


PARTS = ("haproxy", "ray")


def two_or_more(text: str) -> int:
    """A whole number from 2 on."""
    if (found := flags.positive(text)) < 2:
        raise ValueError(text)
    return found


def parts(text: str) -> tuple[str, ...]:
    """ "haproxy,ray" as names. Raises ValueError for others."""
    found = tuple(text.split(","))
    if not set(found) <= set(PARTS):
        raise ValueError(text)
    return found


def parse(arguments: Sequence[str] | None) -> Comparison:
    """Exits with 2 and a sentence for flags that make no sense."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replicas", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--replicas", type=two_or_more, default=2, help="servers, each on a GPU of its own (2)")
    add("--clients", type=flags.positive, default=64, help="clients for each server (64)")
    add("--rounds", type=flags.positive, default=4, help="RAGFlow chats for each client (4)")
    default = PARTS if installed() else PARTS[:1]
    add("--parts", type=parts, default=default, help="haproxy, ray or both (ray where it is installed)")
    add("--prompt-tokens", type=flags.token_range, metavar="LOW:HIGH", help="in place of those of RAGFlow's chats")
    add("--output-tokens", type=flags.token_range, metavar="LOW:HIGH", help="in place of those of RAGFlow's chats")
    add("--out", type=Path, default=Path("out/replicas"), help="folder for figures and logs (out/replicas)")
    told = parser.parse_args(arguments)
    told.out.mkdir(parents=True, exist_ok=True)
    return Comparison(**vars(told))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code, as above."""
    comparison = parse(arguments)
    try:
        run_loop(comparison.run())
    except (BalancerError, NotReady, ServerEnded) as error:
        print(f"python -m benchmarks.replicas: {error}", file=sys.stderr)
        return 2
    finally:
        wide_console().print(table("Servers and GPUs", COLUMNS, [cells(row) for row in comparison.rows]))
    return int(any(row.figures.summary.errors for row in comparison.rows))


if __name__ == "__main__":
    sys.exit(main())
