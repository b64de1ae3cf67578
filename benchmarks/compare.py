"""Compare servers on this machine: each is started in turn on the same model and given the same work.

python -m benchmarks.compare --concurrency 1,8,32
python -m benchmarks.compare --model FOLDER --load-format dummy --workload mixed-64 --concurrency 1,16,64 \
    --requests-per-level 3,16,64 --levels serial=1

Contenders: microbatch, microbatch-ENGINE for each of its engines, serial (one request at a time), transformers and
transformers-cb (`transformers serve`, without and with continuous batching; `pip install -e '.[compare]'`), and
`--external NAME=URL` for any server that runs already with the same model. Ratios are to the first contender.

Every answer must have the tokens asked for, and every server must count the same tokens in a prompt: another model or
template is refused. `--levels` spares slow ones the levels that would take them too long. Each contender's run is
written into `--out` after each of its levels, for benchmarks.report; SIGTERM ends the comparison with what was measured
until then. Exits with 1 if a request failed or not all was measured, with 2 if nothing can be compared.
"""

import argparse
import asyncio
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import orjson
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import flags
from benchmarks.contenders import (
    Contender,
    ContenderError,
    check_model,
    engines,
    external,
    known,
    serving,
)
from benchmarks.load import add_load, add_work, check_effect, run_loop, wide_console
from benchmarks.loops import ClosedLoop, Loop
from benchmarks.models import Model, ModelError, add_model, take_model
from benchmarks.run import Run, Settings
from benchmarks.summary import Summary
from benchmarks.table import failures, number, quantiles, table

COLUMNS = (
    "server",
    "failed",
    "requests/s",
    "output\ntok/s",
    "ratio",
    "first token ms\np50 / p90 / p95 / p99",
    "per token ms\np50 / p90 / p95 / p99",
    "whole answer s\np50 / p90 / p95 / p99",
)


@dataclass(frozen=True, slots=True)
class Plan:
    """The servers, the load for each, and where their output goes.

    `clients` are the only closed loops of some contenders, by name.
    """

    contenders: list[Contender]
    settings: Settings
    out: Path
    clients: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def asks(self, contender: Contender, loop: Loop) -> bool:
        """Whether the contender is measured at this level."""
        only = self.clients.get(contender.name)
        return only is None or not isinstance(loop, ClosedLoop) or loop.concurrency in only

    def total(self, contender: Contender) -> int:
        """Requests of all the contender's levels, warm-up too."""
        asked = [requests for loop, requests in self.settings.levels() if self.asks(contender, loop)]
        return sum(self.settings.warm_up + requests for requests in asked)


def check_same(runs: dict[str, Run]) -> None:
    """Raises ValueError, in one sentence, for fewer than two runs or where two are not of the same model and work.

    All levels must be among the first run's. Two servers have the same model and template only if they count the same
    tokens in each prompt.
    """
    if len(runs) < 2:
        raise ValueError("fewer than two servers were measured")
    (first, reference), *others = runs.items()
    for name, run in others:
        if not run.levels or not jobs(run).items() <= jobs(reference).items():
            raise ValueError(f"{name} and {first} were given different work, so they cannot be compared")
        counted, expected = prompt_tokens(run), prompt_tokens(reference)
        for serial in counted.keys() & expected.keys():
            if counted[serial] != expected[serial]:
                raise ValueError(
                    f"{name} counts {counted[serial]} tokens in a prompt where {first} counts {expected[serial]}: "
                    "another model or chat template, which is not compared"
                )


def jobs(run: Run) -> dict[str, str]:
    """What was asked at each level, by its label."""
    return {level.loop.label: level.jobs for level in run.levels}


def prompt_tokens(run: Run) -> dict[int, int]:
    """How many tokens the server counted in each answered request's prompt, by serial."""
    return {record.serial: record.prompt_tokens for level in run.levels for record in level.records if not record.error}


def tables(runs: dict[str, Run]) -> Iterator[Table]:
    """One for each level: a row for each contender that has it, with its throughput's ratio to the first one's."""
    kept = {name: {level.label: level.summary for level in run.figures().levels} for name, run in runs.items()}
    for label, first in next(iter(kept.values())).items():
        rows = [row(name, levels[label], first) for name, levels in kept.items() if label in levels]
        yield table(label, COLUMNS, rows)


def row(name: str, found: Summary, first: Summary) -> list[str]:
    """A cell for each of COLUMNS. There is no ratio between answers that are not all there."""
    comparable = not found.errors and not first.errors
    ratio = found.output_tokens_per_second / first.output_tokens_per_second if comparable else None
    return [
        name,
        str(sum(found.errors.values())),
        f"{found.requests_per_second:.2f}",
        f"{found.output_tokens_per_second:,.1f}",
        number(ratio, "{:.2f}"),
        quantiles(found.ttft, scale=1000, digits=0),
        quantiles(found.per_token, scale=1000, digits=1),
        quantiles(found.latency, scale=1, digits=2),
    ]


async def run_one(plan: Plan, contender: Contender, bar: Progress, runs: dict[str, Run]) -> None:
    """Start, measure and end one contender, whose run is kept from its first level on. Raises ContenderError as
    `serving`."""
    body = plan.settings.body | contender.fields
    task = bar.add_task(contender.name, total=plan.total(contender))
    async with serving(contender, plan.out / f"{contender.name}.log") as url:
        settings = replace(plan.settings, url=url, model=contender.model, label=contender.name, body=body)
        run = Run(settings, lambda: bar.advance(task))
        for loop, requests in settings.levels():
            if not plan.asks(contender, loop):
                run.skip(requests)
                continue
            await run.measure(loop, requests)
            runs[contender.name] = run
            (plan.out / f"{contender.name}.json").write_bytes(orjson.dumps(run.figures()))


async def run_all(plan: Plan, runs: dict[str, Run], problems: list[str]) -> None:
    """Fill `runs`, one contender after the other, and `problems` with those that could not run.

    Raises ContenderError before anything is started if an external server does not serve the model.
    """
    for contender in plan.contenders:
        if contender.url:
            await check_model(contender)
    with Progress(console=Console(stderr=True), refresh_per_second=2) as bar:
        for contender in plan.contenders:
            try:
                await run_one(plan, contender, bar, runs)
            except ContenderError as error:
                problems.append(str(error))


def parse(arguments: Sequence[str] | None) -> Plan:
    """Exits with 2 and a sentence if flags contradict each other. Writes random weights here if requested."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_model(parser)
    add("--contenders", default="microbatch,serial,transformers,transformers-cb", help="in this order")
    add(
        "--external",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="a server that runs already; may be repeated",
    )
    add(
        "--levels",
        action="append",
        type=flags.named_counts,
        default=[],
        metavar="NAME=1,8",
        help="of --concurrency, this contender's only levels; may be repeated (all, and always all of the first one)",
    )
    add("--out", type=Path, default=Path("out/compare"), help="folder for runs and logs (out/compare)")
    add_load(parser)
    add_work(parser)
    told = vars(parser.parse_args(arguments))
    check_effect(parser, told)
    named = [name for name in told.pop("contenders").split(",") if name]
    running, levels, out = told.pop("external"), told.pop("levels"), told.pop("out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        model = take_model(told)
        settings = Settings(url="", model=model.name, full_length=True, **told)
        settings.source()
        plan = Plan(chosen(model, named, running), settings, out, dict(levels))
        check_levels(plan)
        return plan
    except (ModelError, OSError, ValueError) as error:
        parser.error(str(error))


def chosen(model: Model, named: Sequence[str], running: Sequence[str]) -> list[Contender]:
    """The contenders of these names, then the servers that run already, as NAME=URL. Raises ValueError."""
    startable = known(model, engines() if any(name.startswith("microbatch-") for name in named) else [])
    for name in named:
        if name not in startable:
            raise ValueError(f"there is no contender {name}, only {', '.join(startable)}")
    found = [startable[name] for name in named]
    for text in running:
        name, _, url = text.partition("=")
        found.append(external(name, flags.url(url), model))
    if len({contender.name for contender in found}) < max(2, len(found)):
        raise ValueError("a comparison needs two contenders or more, each of another name")
    return found


def check_levels(plan: Plan) -> None:
    """Raises ValueError unless each level is there once, and `clients` names some, and contenders behind the first."""
    labels = [loop.label for loop in plan.settings.loops()]
    if len(set(labels)) < len(labels):
        raise ValueError("a comparison has each level once")
    known = {loop.concurrency for loop in plan.settings.loops() if isinstance(loop, ClosedLoop)}
    behind = {contender.name for contender in plan.contenders[1:]}
    for name, numbers in plan.clients.items():
        if name not in behind or not known.issuperset(numbers):
            raise ValueError(f"levels of {name}: name a contender behind the first, and numbers of --concurrency")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code, as above."""
    plan = parse(arguments)
    runs: dict[str, Run] = {}
    problems: list[str] = []
    try:
        measure(plan, runs, problems)
        for problem in problems:
            print(problem, file=sys.stderr)
        check_same(runs)
    except (ContenderError, ValueError) as error:
        print(f"python -m benchmarks.compare: {error}", file=sys.stderr)
        return 2
    show(runs)
    return int(bool(problems) or any(level.failures() for run in runs.values() for level in run.levels))


def measure(plan: Plan, runs: dict[str, Run], problems: list[str]) -> None:
    """`run_all` to its end, or to SIGTERM, which is a problem."""
    try:
        run_loop(run_all(plan, runs, problems))
    except asyncio.CancelledError:
        problems.append("the comparison was ended before all was measured")


def show(runs: dict[str, Run]) -> None:
    """Print a table for each level, and what failed."""
    console = wide_console()
    for found in tables(runs):
        console.print(found)
    for name, run in runs.items():
        for line in failures(run.levels):
            console.print(f"{name}, {line}", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
