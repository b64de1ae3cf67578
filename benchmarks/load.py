"""Load any OpenAI-compatible server with streamed chats and say how fast it answers.

python -m benchmarks.load --url http://127.0.0.1:21010 --model NAME --concurrency 1,8,32
python -m benchmarks.load --url http://127.0.0.1:21010 --model NAME --rate 0.5,1,2 --ttft-target-ms 1000
python -m benchmarks.load --url http://127.0.0.1:21010 --model NAME --find-capacity --ttft-target-ms 1000

A table row a level on standard output, progress on standard error. `--json` writes what `benchmarks.report` draws,
`--records` every request; Ctrl-C leaves those of the levels before. Exits with 1 if any request failed, or no
capacity was found where that was asked for.
"""

import argparse
import asyncio
import sys
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.progress import Progress

from benchmarks import flags
from benchmarks.capacity import find, lone
from benchmarks.run import Run, Settings
from benchmarks.summary import Targets, goodput
from benchmarks.table import failures, tables
from benchmarks.words import LANGUAGES
from benchmarks.workloads import WORKLOADS


@dataclass(frozen=True, slots=True)
class Command:
    """What to do with a run: search for the capacity, and what to write where."""

    find_capacity: bool
    first_rate: float
    share: float
    precision: float
    json: Path | None
    records: Path | None


INTERRUPTED = 130
"""The exit code after Ctrl-C, by the shells' convention: 128 and the signal's number."""

PROGRAM = "python -m benchmarks.load"


def parse(arguments: Sequence[str] | None, program: str = PROGRAM) -> tuple[Settings, Command]:
    """Exits with 2 and a sentence for flags that make no sense."""
    parser = argparse.ArgumentParser(prog=program, description=__doc__.splitlines()[0])
    add_server(parser)
    add_load(parser)
    add_work(parser)
    add_goals(parser)
    parser.add_argument(
        "--level-limit",
        type=flags.more_than_zero,
        metavar="SECONDS",
        help="leave out levels that would take longer, judged by the one before, or follow one with failures (none)",
    )
    parser.add_argument("--json", type=Path, help="write settings, figures and time series here, for benchmarks.report")
    parser.add_argument("--records", type=Path, help="write every request here, one line of JSON each")
    told = vars(parser.parse_args(arguments))
    check_effect(parser, told)
    if told["find_capacity"] and len(told["requests_per_level"]) > 1:
        parser.error("--find-capacity chooses its own levels: --requests-per-level is one number for all")
    command = Command(**{name: told.pop(name) for name in Command.__slots__})
    try:
        settings = settings_of(told)
    except ValueError as error:
        parser.error(str(error))
    if command.find_capacity and not settings.targets:
        parser.error("--find-capacity needs --ttft-target-ms or --tpot-target-ms")
    if command.find_capacity and (settings.rate or settings.concurrency or settings.level_limit):
        parser.error("--find-capacity chooses its own levels: leave --rate, --concurrency and --level-limit out")
    return settings, command


def check_effect(parser: argparse.ArgumentParser, told: dict[str, Any]) -> None:
    """Exits with 2 and a sentence for a flag that would be ignored."""
    for flag, where in without_effect({name for name in told if told[name] != parser.get_default(name)}):
        parser.error(f"--{flag.replace('_', '-')} has no effect {where}")


def without_effect(given: set[str]) -> Iterator[tuple[str, str]]:
    """Those of the given flags that would be ignored, and where they would."""
    if "find_capacity" not in given:
        yield from ((flag, "without --find-capacity") for flag in ("first_rate", "share", "precision") if flag in given)
    if given.isdisjoint({"rate", "find_capacity"}):
        yield from ((flag, "without --rate") for flag in ("duration", "burstiness") if flag in given)
    elif given >= {"duration", "requests_per_level"}:
        yield "duration", "with --requests-per-level"
    if "prompts" in given:
        yield from ((flag, "with prompts of your own") for flag in ("prompt_tokens", "language") if flag in given)


def add_server(parser: argparse.ArgumentParser) -> None:
    """Who is asked, and how."""
    add = parser.add_argument_group("server").add_argument
    add("--url", type=flags.url, required=True, help="the server's root, such as http://127.0.0.1:21010")
    add("--model", required=True, help="the model's name as the server knows it")
    add("--label", help="what a report calls this run (the model's name)")
    add("--api-key", help="sent as a bearer token")
    add("--session-header", metavar="NAME", help="a header that names the conversation, for balancers that go by one")
    add("--ignore-eos", action="store_true", help="ask for full-length answers, and check that they are")
    add("--body", type=flags.json_object, default={}, metavar="JSON", help="more fields of every request")


def add_load(parser: argparse.ArgumentParser) -> None:
    """How hard."""
    add = parser.add_argument_group("load").add_argument
    add(
        "--concurrency",
        type=flags.counts,
        help="closed loop: clients at each level (the workload's own, mostly 1,8,32)",
    )
    add("--rate", type=flags.rates, default=(), help="open loop: requests a second at each level, as 0.5,1,2")
    add("--burstiness", type=flags.more_than_zero, default=1.0, help="of arrivals: 1 Poisson's, 0.25 in bursts (1)")
    add("--duration", type=flags.more_than_zero, default=30.0, help="seconds of arrivals a level of --rate (30)")
    add(
        "--requests-per-level",
        type=flags.counts,
        default=(),
        metavar="N[,N...]",
        help="one number, or one for each level; default: two a client, or what comes in --duration; 8 or more",
    )
    add("--timeout", type=flags.more_than_zero, default=600.0, help="seconds until a request counts as failed (600)")
    add("--warm-up", type=flags.natural, default=1, help="requests before each level that are not measured (1)")


def add_work(parser: argparse.ArgumentParser) -> None:
    """Flags of the workload."""
    add = parser.add_argument_group("work").add_argument
    add("--workload", choices=sorted(WORKLOADS), default="short", help="lengths and shape of prompts (short)")
    add("--language", choices=sorted(LANGUAGES), default="en", help="of the workload's text (en)")
    add(
        "--quotation",
        type=flags.fraction,
        metavar="SHARE",
        help="of rag-quote's questions, how many ask for a passage word for word (1)",
    )
    add("--prompts", type=Path, help="your own: JSON Lines with prompt or messages, or ShareGPT's array")
    add("--prompt-tokens", type=flags.token_range, metavar="LOW:HIGH", help="in place of the workload's own")
    add("--output-tokens", type=flags.token_range, metavar="LOW:HIGH", help="in place of the workload's or file's own")
    add("--seed", type=int, default=0, help="another seed asks for other texts, lengths and arrivals (0)")


def add_goals(parser: argparse.ArgumentParser) -> None:
    """Flags of the targets."""
    add = parser.add_argument_group("goals").add_argument
    add("--ttft-target-ms", type=flags.milliseconds, help="a good answer's first token comes within this")
    add("--tpot-target-ms", type=flags.milliseconds, help="a good answer's mean time per output token is within this")
    add("--find-capacity", action="store_true", help="search the highest rate that meets the targets")
    add(
        "--first-rate", type=flags.more_than_zero, default=1.0, help="requests a second that the search begins with (1)"
    )
    add(
        "--share",
        type=flags.share,
        default=0.95,
        help="of requests that must meet the targets; of 20 requests, 0.95 lets one miss (0.95)",
    )
    add("--precision", type=flags.more_than_zero, default=0.1, help="of the capacity, as a share of it (0.1)")


def settings_of(told: dict[str, Any]) -> Settings:
    """Flags as settings: `--ignore-eos` is a field of the body and a check."""
    targets = Targets(told.pop("ttft_target_ms"), told.pop("tpot_target_ms"))
    settings = Settings(targets=targets, full_length=told.pop("ignore_eos"), **told)
    return replace(settings, body={"ignore_eos": True} | settings.body) if settings.full_length else settings


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run on uvloop where it is installed: it takes a third off what a chunk costs the client."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


def measure(run: Run, command: Command) -> None:
    """Measure with a bar of progress, whose end is unknown while the capacity is searched."""
    settings = run.settings
    total = None if command.find_capacity else settings.total()
    with Progress(console=Console(stderr=True), refresh_per_second=2) as bar:
        task = bar.add_task("requests", total=total)
        run.progress = lambda: bar.advance(task)
        if command.find_capacity:
            run_loop(find(run, command.first_rate, command.share, command.precision))
        else:
            run_loop(run.measure_all())


def check_files(command: Command) -> None:
    """Raises OSError for files that could not be written in the end, when all is measured."""
    for file in filter(None, (command.json, command.records)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("ab").close()


def write(run: Run, command: Command) -> None:
    """Write the requested files."""
    if command.json:
        command.json.write_bytes(orjson.dumps(run.figures()))
    if command.records:
        with command.records.open("wb") as lines:
            lines.writelines(run.record_lines())


def show(run: Run, command: Command) -> None:
    """Print the tables, then failures, and the capacity if it was requested."""
    console = wide_console()
    for table in tables(run.figures().levels):
        console.print(table)
    for line in failures(run.levels):
        console.print(line, markup=False, highlight=False)
    for label, reason in run.left_out.items():
        console.print(f"{label}: left out, because {reason}", markup=False, highlight=False)
    if command.find_capacity:
        console.print(f"capacity: {capacity_of(run, command.share)}", highlight=False)


def capacity_of(run: Run, share: float) -> str:
    """What a search for the capacity found, in words."""
    goal = f"with {share:.0%} of requests within the targets"
    if run.capacity is not None:
        return f"{run.capacity:.3g} requests/s, {goal}"
    last = run.levels[-1]
    if (good := goodput(last.records, run.settings.targets)) < share:
        alone = f": at {last.loop.label}, where requests are alone, {good:.0%} are" if lone(last) else ""
        return f"none was found, {goal}{alone}"
    return (
        f"none was found: even at {last.loop.label} a level's requests are answered within the targets; "
        "set more of them with --duration or --requests-per-level"
    )


def wide_console() -> Console:
    """Standard output; a file has no edge to wrap at."""
    console = Console()
    if not console.is_terminal:
        console.width = 220
    return console


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """The command, called `program` in its messages.

    Returns its exit code: 0; 1 if any request failed or no capacity was found; 2 for a bad file; 130 after Ctrl-C.
    """
    settings, command = parse(arguments, program)
    try:
        check_files(command)
        run = Run(settings)
    except (OSError, ValueError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    try:
        measure(run, command)
    except KeyboardInterrupt:
        print(f"{program}: interrupted; only whole levels are shown", file=sys.stderr)
        if run.levels:
            write(run, command)
            show(run, replace(command, find_capacity=False))
        return INTERRUPTED
    write(run, command)
    show(run, command)
    if command.find_capacity:  # which goes where requests fail, to find the edge
        return int(run.capacity is None)
    return int(any(level.failures() for level in run.levels))


if __name__ == "__main__":
    sys.exit(main())
