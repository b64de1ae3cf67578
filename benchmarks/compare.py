"""Compare servers on this machine: each is started on the same model, one after the other, and asked for the same work.

python -m benchmarks.compare --concurrency 1,8,32
python -m benchmarks.compare --model FOLDER --load-format dummy --workload mixed-64 --concurrency 1,16,64

Contenders: microbatch, microbatch-ENGINE for each of its engines, serial (one request at a time), transformers and
transformers-cb (`transformers serve`, without and with continuous batching; `pip install 'microbatch[compare]'`), and
`--external NAME=URL` for any server that runs already with the same model. Ratios are to the first contender.

Every answer must have the tokens asked for, and every server must count the same tokens in a prompt: another model or
template is refused. Each contender's run is written into `--out`, for benchmarks.report. Exits with 1 if a request
failed or a contender did not start, with 2 if nothing can be compared.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import flags
from benchmarks.contenders import (
    MODULE,
    Contender,
    ContenderError,
    Model,
    check_model,
    engines,
    external,
    known,
    serving,
)
from benchmarks.load import add_load, add_work, run_loop, wide_console
from benchmarks.run import Run, Settings
from benchmarks.table import failures, number, quantiles, table

CACHE = Path.home() / ".cache" / "microbatch"
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
    """Who runs, with what asked of each, and where what they say goes."""

    contenders: list[Contender]
    settings: Settings
    out: Path
    patience: float


def check_same(runs: dict[str, Run]) -> None:
    """Raises ValueError, in one sentence, for fewer than two runs or where two are not of the same model and work.

    Two servers have the same model and template only if they count the same tokens in each prompt.
    """
    if len(runs) < 2:
        raise ValueError("fewer than two servers were measured")
    (first, reference), *others = runs.items()
    for name, run in others:
        if [level.jobs for level in run.levels] != [level.jobs for level in reference.levels]:
            raise ValueError(f"{name} and {first} were asked for different work, which is not compared")
        counted, expected = prompt_tokens(run), prompt_tokens(reference)
        for serial in counted.keys() & expected.keys():
            if counted[serial] != expected[serial]:
                raise ValueError(
                    f"{name} counts {counted[serial]} tokens in a prompt where {first} counts {expected[serial]}: "
                    "another model or chat template, which is not compared"
                )


def prompt_tokens(run: Run) -> dict[int, int]:
    """How many tokens the server counted in each answered request's prompt, by serial."""
    return {record.serial: record.prompt_tokens for level in run.levels for record in level.records if not record.error}


def tables(runs: dict[str, Run]) -> Iterator[Table]:
    """One for each level: a row for each contender, with its throughput's ratio to the first one's."""
    kept = {name: run.figures().levels for name, run in runs.items()}
    first = next(iter(kept.values()))
    for place, level in enumerate(first):
        rows = []
        for name, levels in kept.items():
            found = levels[place].summary
            ratio = ratio_of(found.output_tokens_per_second, level.summary.output_tokens_per_second)
            rows.append(
                [
                    name,
                    str(sum(found.errors.values())),
                    f"{found.requests_per_second:.2f}",
                    f"{found.output_tokens_per_second:,.1f}",
                    "-" if found.errors or level.summary.errors else number(ratio, "{:.2f}"),
                    quantiles(found.ttft, scale=1000, digits=0),
                    quantiles(found.per_token, scale=1000, digits=1),
                    quantiles(found.latency, scale=1, digits=2),
                ]
            )
        yield table(level.label, COLUMNS, rows)


def ratio_of(value: float, reference: float) -> float | None:
    """None where there is nothing to compare with."""
    return value / reference if reference else None


async def run_one(plan: Plan, contender: Contender, bar: Progress) -> Run:
    """Start, measure and end one contender. Raises ContenderError as `serving`."""
    body = plan.settings.body | contender.fields
    task = bar.add_task(contender.name, total=total(plan.settings))
    async with serving(contender, plan.out / f"{contender.name}.log", plan.patience) as url:
        settings = replace(plan.settings, url=url, model=contender.model, label=contender.name, body=body)
        run = Run(settings, lambda: bar.advance(task))
        await run.measure_all()
    (plan.out / f"{contender.name}.json").write_bytes(orjson.dumps(run.figures()))
    return run


def total(settings: Settings) -> int:
    """Requests that one contender gets."""
    return sum(settings.warm_up + settings.requests(loop) for loop in settings.loops())


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
                runs[contender.name] = await run_one(plan, contender, bar)
            except ContenderError as error:
                problems.append(str(error))


def parse(arguments: Sequence[str] | None) -> Plan:
    """Exits with 2 and a sentence for flags that make no sense. Random weights are written here, if asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", help="folder, or GGUF file; the demo model if not given")
    add("--name", help="what clients call it, external servers too (the folder's name)")
    add("--load-format", choices=["auto", "dummy"], default="auto", help="dummy: random weights, written once")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    add("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto", help="of the weights (auto)")
    add("--contenders", default="microbatch,serial,transformers,transformers-cb", help="in this order")
    add(
        "--external",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="a server that runs already; may be repeated",
    )
    add("--server-args", type=shlex.split, default=[], help="more flags of this service, as one text")
    add("--cache-dir", type=Path, default=CACHE, help="where converted and random models are kept")
    add("--out", type=Path, default=Path("out/compare"), help="folder for runs and logs (out/compare)")
    add("--patience", type=flags.more_than_zero, default=900.0, help="seconds that a server may take to start (900)")
    add("--timeout", type=flags.more_than_zero, default=600.0, help="seconds until a request counts as failed (600)")
    add_load(parser)
    add_work(parser)
    told = vars(parser.parse_args(arguments))
    ours = {
        name: told.pop(name)
        for name in (
            *("model", "name", "load_format", "device", "dtype", "contenders", "external", "server_args"),
            *("cache_dir", "out", "patience"),
        )
    }
    try:
        return plan_of(ours, Settings(url="", model="", full_length=True, **told))
    except (ContenderError, OSError, ValueError) as error:
        parser.error(str(error))


def plan_of(ours: dict[str, Any], settings: Settings) -> Plan:
    """Raises ContenderError or ValueError for what cannot be run."""
    ours["out"].mkdir(parents=True, exist_ok=True)
    model = model_of(ours)
    names = [name for name in ours["contenders"].split(",") if name]
    startable = known(model, engines() if any(name.startswith("microbatch-") for name in names) else [])
    for name in names:
        if name not in startable:
            raise ValueError(f"there is no contender {name}, only {', '.join(startable)}")
    chosen = [startable[name] for name in names]
    for text in ours["external"]:
        name, _, url = text.partition("=")
        chosen.append(external(name, flags.url(url), model))
    if len(chosen) < 2:
        raise ValueError("a comparison needs two contenders")
    settings.source()
    return Plan(chosen, settings, ours["out"], ours["patience"])


def model_of(ours: dict[str, Any]) -> Model:
    """The folder that all serve, converted or filled with random weights first where need be. Raises as `locate`."""
    folder = folder_of(ours["model"], ours["load_format"], ours["dtype"], ours["cache_dir"])
    name = ours["name"] or (Path(ours["model"]).resolve().name if ours["model"] else "smollm2-135m-instruct")
    return Model(folder, name, ours["device"], ours["dtype"], tuple(ours["server_args"]))


def folder_of(model: str | None, load_format: str, dtype: str, cache: Path) -> str:
    """Loading is left to processes of their own, so that this one holds no device and no memory."""
    if load_format == "auto":
        found = "from batching.checkpoint import locate; import sys, pathlib; "
        found += "print(locate(sys.argv[1] or None, 'auto', pathlib.Path(sys.argv[2])))"
        return said((sys.executable, "-c", found, model or "", str(cache)))
    if model is None:
        raise ValueError("load-format dummy needs a model folder with a config.json")
    kind = "bfloat16" if dtype == "auto" else dtype
    out = cache / f"random-{Path(model).resolve().name}-{kind}"
    said((*MODULE, "benchmarks.random_weights", model, str(out), "--dtype", kind))
    return str(out)


def said(command: Sequence[str]) -> str:
    """The last line of the command's output. Raises ContenderError with what it said if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ContenderError(
            f"the model cannot be prepared: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}"
        )
    return done.stdout.strip().rpartition("\n")[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code, as above."""
    plan = parse(arguments)
    runs: dict[str, Run] = {}
    problems: list[str] = []
    try:
        run_loop(run_all(plan, runs, problems))
        for problem in problems:
            print(problem, file=sys.stderr)
        check_same(runs)
    except (ContenderError, ValueError) as error:
        print(f"python -m benchmarks.compare: {error}", file=sys.stderr)
        return 2
    show(runs)
    return int(bool(problems) or any(level.failures() for run in runs.values() for level in run.levels))


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
