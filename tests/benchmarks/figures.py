"""Figures of made-up runs, for tests of what is shown of them."""

from typing import Any

from benchmarks.client import Record
from benchmarks.loops import ClosedLoop, Loop, OpenLoop
from benchmarks.run import Level, Run, RunFigures, Settings
from benchmarks.server_metrics import Gauges, ServerFigures
from benchmarks.summary import Targets

SERVER = ServerFigures(
    batches=3,
    joined=1,
    batch_size=2.5,
    step_rows=2.0,
    padding=0.125,
    reused=0.5,
    queue_wait=0.25,
    queue_wait_p95=0.5,
    gauges=[Gauges(0.0, 1, 2), Gauges(1.0, 4, 3)],
)


def level(loop: Loop, *, jobs: str = "same", server: ServerFigures | None = SERVER, **fields: Any) -> Level:
    """Four answers of ten tokens, two a second."""
    records = [
        Record(
            serial=number,
            max_tokens=10,
            due=number / 2,
            sent=number / 2,
            chunks=[0.5 + number, 1.0 + number],
            latency=1.0 + number,
            prompt_tokens=7,
            completion_tokens=10,
            finish_reason="length",
            **fields,
        )
        for number in range(4)
    ]
    return Level(loop, jobs, seconds=5.5, cpu_share=0.1, records=records, server=server)


def run(*levels: Level, **settings: Any) -> Run:
    """A run with these levels, measured by nobody."""
    told: dict[str, Any] = {"url": "http://127.0.0.1:1", "model": "m", "targets": Targets(ttft=2.0)} | settings
    return Run(Settings(**told), levels=list(levels))


def run_figures(label: str, **fields: Any) -> RunFigures:
    """One level of each loop."""
    found = run(level(ClosedLoop(2), **fields), level(OpenLoop(0.5), **fields), label=label, api_key="secret")
    return found.figures()
