"""One run of the load tool: its settings, its levels measured one after another, and its file."""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import TypeAdapter, ValidationError

from benchmarks.client import ChatClient, Record
from benchmarks.connection import server_url
from benchmarks.loops import ClosedLoop, Loop, OpenLoop, Progress
from benchmarks.machine import machine, versions
from benchmarks.prompts import read
from benchmarks.server_metrics import ServerFigures, Watch
from benchmarks.summary import Summary, Targets, summarise, tokens_by_second
from benchmarks.workloads import WORKLOADS, Job, Source, digest, named, uniform

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a run. Ranges are in tokens, both ends included; `timeout` is seconds per request.

    `duration` is for how many seconds requests arrive at a level of the open loop; `body` are further fields of every
    request; `requests_per_level` is one number for all levels, or one for each. Made, it raises ValueError for any
    other count of numbers. `level_limit` is how many seconds a level may be expected to take; None: any.
    """

    url: str
    model: str
    label: str | None = None
    concurrency: tuple[int, ...] | None = None
    rate: tuple[float, ...] = ()
    burstiness: float = 1.0
    duration: float = 30.0
    requests_per_level: tuple[int, ...] = ()
    workload: str = "short"
    prompts: Path | None = None
    language: str = "en"
    quotation: float | None = None
    prompt_tokens: Range | None = None
    output_tokens: Range | None = None
    seed: int = 0
    warm_up: int = 1
    timeout: float = 600.0
    full_length: bool = False
    body: dict[str, Any] = field(default_factory=dict)
    targets: Targets = field(default_factory=Targets)
    api_key: str | None = field(default=None, repr=False)
    session_header: str | None = None
    level_limit: float | None = None

    def __post_init__(self) -> None:
        told, levels = len(self.requests_per_level), len(self.loops())
        if told > 1 and told != levels:
            raise ValueError(f"requests-per-level has {told} numbers for {levels} levels: give one, or one for each")

    def loops(self) -> list[Loop]:
        """The levels, in order: the closed loop's, then the open loop's.

        A closed loop has the workload's own concurrency where none was asked for; none if only rates were.
        """
        default = () if self.rate else WORKLOADS[self.workload].concurrency
        concurrency = default if self.concurrency is None else self.concurrency
        return [*map(ClosedLoop, concurrency), *(OpenLoop(rate, self.burstiness) for rate in self.rate)]

    def levels(self) -> list[tuple[Loop, int]]:
        """The same, each with its number of requests."""
        loops = self.loops()
        several = len(self.requests_per_level) > 1
        numbers = self.requests_per_level if several else [self.requests(loop) for loop in loops]
        return list(zip(loops, numbers, strict=True))

    def requests(self, loop: Loop) -> int:
        """Requests of any level: as set, or two per client, or as many as arrive in the duration; at least 8."""
        if self.requests_per_level:
            return self.requests_per_level[0]
        match loop:
            case ClosedLoop(concurrency=concurrency):
                return max(8, 2 * concurrency)
            case OpenLoop(rate=rate):
                return max(8, round(rate * self.duration))

    def total(self) -> int:
        """Requests of all levels, warm-up too."""
        return sum(self.warm_up + requests for _, requests in self.levels())

    def source(self) -> Source:
        """The prompt file or the named workload, with the ranges that were given in place of its own laws.

        Raises ValueError and OSError as `prompts.read`, and ValueError for what the workload does not have.
        """
        found = named(self.workload, self.language, self.quotation)
        if self.prompt_tokens:
            found = replace(found, prompt_tokens=uniform(*self.prompt_tokens))
        if self.output_tokens:
            found = replace(found, output_tokens=uniform(*self.output_tokens))
        if self.prompts is None:
            return found
        return read(self.prompts, found.output_tokens, keep_lengths=self.output_tokens is None)


@dataclass(frozen=True, slots=True)
class Level:
    """What was measured at one level: `seconds` from the first send to the last end, and every request.

    `cpu_share` is the client's own CPU time over `seconds`: near 1, the client is what was measured. `jobs` names what
    was asked (`workloads.digest`).
    """

    loop: Loop
    jobs: str
    seconds: float
    cpu_share: float
    records: list[Record]
    warm_up: list[Record] = field(default_factory=list)
    server: ServerFigures | None = None

    def failures(self) -> list[Record]:
        """Failed requests, those of the warm-up included."""
        return [record for record in self.warm_up + self.records if record.error]


@dataclass(frozen=True, slots=True)
class LevelFigures:
    """A level as a run's file keeps it. `load` is clients or requests a second; `ttft` has every answer's; `reasons`
    has one failure's own words for each kind.
    """

    label: str
    kind: Literal["closed", "open"]
    load: float
    jobs: str
    seconds: float
    cpu_share: float
    summary: Summary
    server: ServerFigures | None
    tokens_by_second: list[float]
    ttft: list[float]
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunFigures:
    """A run as its file keeps it, in seconds and bytes throughout. The API key stays out.

    `server` is what the service says of itself in its metrics, empty for others; `capacity` is the rate that
    `--find-capacity` found; `left_out` says of each level that was not measured why.
    """

    format: Literal["microbatch load 1"]
    label: str
    started: str
    settings: dict[str, Any]
    machine: dict[str, str | int]
    versions: dict[str, str]
    server: dict[str, str]
    levels: list[LevelFigures]
    capacity: float | None = None
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Run:
    """Measures levels one after the other, each over connections of its own.

    Made, it raises what `Settings.source` does.
    """

    settings: Settings
    progress: Progress = lambda: None
    levels: list[Level] = field(default_factory=list)
    capacity: float | None = None
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    facts: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    _source: Source = field(init=False)
    _serial: int = 0

    def __post_init__(self) -> None:
        self._source = self.settings.source()

    async def measure_all(self) -> None:
        """Measure the levels that the settings name, except those that would take longer than the limit."""
        for loop, requests in self.settings.levels():
            if reason := self._too_much(requests):
                self.left_out[loop.label] = reason
                self.skip(requests)
            else:
                await self.measure(loop, requests)

    def _too_much(self, requests: int) -> str:
        """Why a level is left out, judged by the one before: it was refused requests, or answered them too slowly."""
        limit = self.settings.level_limit
        if limit is None or not self.levels:
            return ""
        last = self.levels[-1]
        failed = sum(record.error is not None for record in last.records)
        if failed:
            return f"{failed} of {len(last.records)} requests failed at {last.loop.label}"
        seconds = requests * last.seconds / len(last.records)
        return f"it would take about {seconds:.0f} s at the pace of {last.loop.label}" if seconds > limit else ""

    async def measure(self, loop: Loop, requests: int) -> Level:
        """A level of so many requests. Send the warm-up at once and wait for it, then the level's jobs.

        The clock stops at the last answer's end, so the tail, when the load is less than asked for, counts.
        """
        settings, watch = self.settings, Watch(server_url(self.settings.url))
        warm_up, jobs = self._draw(settings.warm_up), self._draw(requests)
        with closing(client(settings)) as chat:
            warmed = await ClosedLoop(len(warm_up)).send(chat, warm_up, settings.seed, self.progress)
            async with watch.watching():
                began, cpu = time.perf_counter(), time.process_time()
                records = await loop.send(chat, jobs, settings.seed, self.progress)
                seconds = time.perf_counter() - began
                cpu_share = (time.process_time() - cpu) / seconds
        self.facts = watch.facts
        self.levels.append(Level(loop, digest(jobs), seconds, cpu_share, records, warmed, watch.figures))
        return self.levels[-1]

    def skip(self, requests: int) -> None:
        """Skip a level of so many. The levels after it get the same work as without skipping."""
        self._serial += self.settings.warm_up + requests

    def _draw(self, count: int) -> list[Job]:
        jobs = self._source.draw(count, seed=self.settings.seed, first=self._serial)
        self._serial += count
        return jobs

    def figures(self) -> RunFigures:
        """Everything but the records."""
        told = asdict(self.settings)
        del told["api_key"]
        return RunFigures(
            format="microbatch load 1",
            label=self.settings.label or self.settings.model,
            started=self.started.isoformat(timespec="seconds"),
            settings=orjson.loads(orjson.dumps(told, default=str)),
            machine=machine(),
            versions=versions(),
            server=self.facts,
            levels=[level_figures(level, self.settings.targets) for level in self.levels],
            capacity=self.capacity,
            left_out=self.left_out,
        )

    def record_lines(self) -> Iterator[bytes]:
        """Each request as a line of JSON, with its level and phase. `chunks` are the arrivals of its pieces of text."""
        for level in self.levels:
            for phase, records in (("warm-up", level.warm_up), ("measured", level.records)):
                for record in records:
                    yield orjson.dumps({"level": level.loop.label, "phase": phase} | asdict(record)) + b"\n"


def client(settings: Settings) -> ChatClient:
    """A client with no connections yet."""
    return ChatClient(
        settings.url,
        settings.model,
        timeout=settings.timeout,
        fields=settings.body,
        full_length=settings.full_length,
        api_key=settings.api_key,
        session_header=settings.session_header,
    )


def level_figures(level: Level, targets: Targets) -> LevelFigures:
    """A level's figures, without its warm-up."""
    match level.loop:
        case ClosedLoop(concurrency=load):
            kind: Literal["closed", "open"] = "closed"
        case OpenLoop(rate=load):
            kind = "open"
    return LevelFigures(
        label=level.loop.label,
        kind=kind,
        load=load,
        jobs=level.jobs,
        seconds=level.seconds,
        cpu_share=level.cpu_share,
        summary=summarise(level.records, level.seconds, targets),
        server=level.server,
        tokens_by_second=tokens_by_second(level.records, level.seconds),
        ttft=sorted(record.ttft for record in level.records if record.ttft is not None and not record.error),
        reasons={record.error: record.detail for record in reversed(level.records) if record.error},
    )


def load_run(path: Path) -> RunFigures:
    """A run from its file. Raises ValueError, in one sentence, for any other file, and OSError."""
    try:
        return TypeAdapter(RunFigures).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path} is not a run that benchmarks.load wrote: {place}: {first['msg']}") from error
