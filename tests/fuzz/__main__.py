"""`python -m tests.fuzz TARGET --cpu-seconds 600`: coverage-guided fuzzing (atheris, which is libFuzzer) of one target.

New inputs are kept in `out/fuzz/TARGET`, between runs too; one that breaks the law is written beside them as crash-*.
So is one that takes longer than a callback on the event loop may, where it is read there.
"""

import argparse
import gc
import math
import os
import sys
import time
from pathlib import Path

import atheris

HERE = Path(__file__).parent
OUT = HERE.parents[1] / "out" / "fuzz"

with atheris.instrument_imports(include=["server"]):
    from tests.fuzz.targets import TARGETS

from tests.loop_guard import LIMIT_SECONDS  # noqa: E402

ELSEWHERE = {"pattern", "schema"}
"""Targets that compile grammars, which the service does in another process."""

TRACED = 15
"""Times as long that code takes while the fuzzer follows its branches and comparisons: 11 for a call to a tool."""


class Bounded:
    """Runs a target until so much CPU time is spent, then tells how often it ran and ends the process."""

    def __init__(self, name: str, cpu_seconds: float) -> None:
        self._name = name
        self._target = TARGETS[name]
        self._limit = cpu_seconds
        self._longest = math.inf if name in ELSEWHERE else TRACED * LIMIT_SECONDS
        self._runs = 0

    def __call__(self, data: bytes) -> None:
        self._runs += 1
        # Once may be slow because of what is new to the fuzzer or of Python's collector.
        if self._seconds(data) > self._longest:
            took = min(self._seconds(data) for _ in range(3))
            if took > self._longest:
                raise TimeoutError(f"{took * 1000:.0f} ms")
        if (spent := time.process_time()) > self._limit:
            print(f"{self._name}: {self._runs} executions in {spent:.0f} CPU seconds, no failure", flush=True)
            os._exit(0)

    def _seconds(self, data: bytes) -> float:
        started = time.thread_time()
        self._target(data)
        return time.thread_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--cpu-seconds", type=float, default=60.0)
    options = parser.parse_args()
    gc.freeze()  # what is loaded by now would be gone through again and again
    kept = OUT / options.target
    kept.mkdir(parents=True, exist_ok=True)
    flags = [
        f"-dict={HERE / 'words.dict'}",
        f"-artifact_prefix={kept}/",
        "-max_len=4096",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    folders = [str(kept), str(HERE / "corpus" / options.target)]
    atheris.Setup([sys.argv[0], *flags, *folders], Bounded(options.target, options.cpu_seconds))
    atheris.Fuzz()


main()
