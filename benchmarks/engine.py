"""The engines alone, without HTTP: how fast a step, a prompt and a whole workload are, and how far logits agree.

python -m benchmarks.engine --model FOLDER --dummy

One table on standard output. Everything runs in one process on one device, one engine after the other; ratios are of
this run.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from batching import checkpoint, model
from batching.engine import NO_LOGPROBS, Engine
from batching.generate import GenerateEngine
from batching.packed import PackedEngine
from batching.row import Row
from batching.types import Request, Sampling, TokenLogprob
from server.settings import Settings

CONTEXT = 1536


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths of one request, in tokens."""

    prompt: int
    output: int


def mixed_64() -> list[Shape]:
    """64 prompts, lognormal(ln 1400, 0.5) within 200..4000; outputs uniform 16..256."""
    random = Random(0)
    prompts = [min(4000, max(200, int(random.lognormvariate(math.log(1400), 0.5)))) for _ in range(64)]
    return [Shape(prompt, random.randint(16, 256)) for prompt in prompts]


def rag_40() -> list[Shape]:
    """40 prompts of 4,853 tokens, outputs uniform 64..320."""
    random = Random(0)
    return [Shape(4853, random.randint(64, 320)) for _ in range(40)]


def rows_of(shapes: Sequence[Shape], vocabulary: int, seed: int = 0, **settings: Any) -> list[Row]:
    """Rows of random tokens that never stop early. No two prompts begin alike."""
    random = Random(seed)
    floor = min(1000, vocabulary // 2)
    return [
        Row(
            Request(
                id=str(number),
                prompt=tuple(random.choices(range(floor, vocabulary), k=shape.prompt)),
                sampling=Sampling(**{"max_tokens": shape.output, "seed": number, "temperature": 0.0, **settings}),
                time_limit=600.0,
            ),
            stream=None,  # type: ignore[arg-type]
            arrived=0.0,
        )
        for number, shape in enumerate(shapes)
    ]


class Clock:
    """`Steps` that counts each row's tokens and notes when each step's came, and how many."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, int]] = []

    def emit(
        self, rows: Sequence[Row], tokens: Sequence[int], logprobs: Mapping[int, TokenLogprob] = NO_LOGPROBS
    ) -> list[bool]:
        self.steps.append((time.perf_counter(), len(rows)))
        for row, token in zip(rows, tokens, strict=True):
            if not row.over:
                row.push(token)
        return [row.over for row in rows]

    def admit(self) -> list[Row]:
        return []


class Watch(Clock):
    """A `Clock` that has torch's profiler look at the steps from `first` to `last`, and at nothing else."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self._first, self._last = first, last
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def emit(
        self, rows: Sequence[Row], tokens: Sequence[int], logprobs: Mapping[int, TokenLogprob] = NO_LOGPROBS
    ) -> list[bool]:
        if len(self.steps) == self._first:
            self.profile.start()
        if len(self.steps) == self._last:
            torch.cuda.synchronize()
            self.profile.stop()
        return super().emit(rows, tokens, logprobs)

    def lines(self, steps: int) -> list[str]:
        """Microseconds a step of each kernel, the longest first."""
        found = sorted(self.profile.key_averages(), key=lambda kernel: -kernel.device_time_total)
        return [
            f"    {kernel.device_time_total / steps:9.1f} us  x{kernel.count / steps:<6.1f} {kernel.key[:100]}"
            for kernel in found[:14]
        ]


def timed(engine: Engine, rows: list[Row]) -> tuple[float, Clock]:
    """Seconds to run them to their ends. Raises AssertionError if a row has not the tokens asked for."""
    clock = Clock()
    started = time.perf_counter()
    engine.run(rows, clock)
    seconds = time.perf_counter() - started
    assert all(row.sent == row.request.sampling.max_tokens for row in rows)
    return seconds, clock


class Bench:
    """Measures one engine and keeps `figures` by name: (value, unit)."""

    def __init__(self, engine: Engine, show: Callable[[str], None]) -> None:
        self._engine = engine
        self._vocabulary = engine.info.vocab_size
        self._show = show
        self._seed = 0
        self.figures: dict[str, float] = {}

    def _rows(self, shapes: Sequence[Shape], **settings: Any) -> list[Row]:
        self._seed += 1  # fresh tokens, so that nothing can be taken over from an earlier pass
        return rows_of(shapes, self._vocabulary, self._seed, **settings)

    def decode(self, rows: int, steps: int, name: str = "", **settings: Any) -> None:
        """Milliseconds a step of so many rows takes, through the whole loop: the median of full steps."""
        _, clock = timed(self._engine, self._rows([Shape(CONTEXT, steps)] * rows, **settings))
        full = [at for at, count in clock.steps if count == rows]
        gaps = [later - earlier for earlier, later in zip(full, full[1:], strict=False)]
        self.note(f"decode {rows} rows{name}, ms/step", 1000 * statistics.median(gaps[4:] or gaps))

    def profile_steps(self, rows: int) -> None:
        """What each kernel takes in a step of so many rows."""
        watch = Watch(24, 56)
        self._engine.run(self._rows([Shape(CONTEXT, 64)] * rows), watch)
        self._show(f"  one step of {rows} rows:")
        for line in watch.lines(32):
            self._show(line)

    def profile_prompts(self, rows: int) -> None:
        """What each kernel takes over so many prompts."""
        watch = Watch(0, 0)
        watch.profile.start()
        self._engine.run(self._rows([Shape(CONTEXT, 1)] * rows), Clock())
        torch.cuda.synchronize()
        watch.profile.stop()
        self._show(f"  {rows} prompts of {CONTEXT} tokens:")
        for line in watch.lines(1):
            self._show(line)

    def prompts(self, rows: int) -> None:
        """Prompt tokens processed a second."""
        shapes = [Shape(CONTEXT, 1)] * rows
        timed(self._engine, self._rows(shapes))
        best = min(timed(self._engine, self._rows(shapes))[0] for _ in range(3))
        self.note(f"prompts {rows} x {CONTEXT}, tok/s", rows * CONTEXT / best)

    def workload(self, name: str, shapes: Sequence[Shape], passes: int) -> None:
        """Seconds for a whole workload, all present at once: the better of the passes."""
        seconds = [timed(self._engine, self._rows(shapes))[0] for _ in range(passes)]
        self.note(f"{name}, s", min(seconds))
        self.note(f"{name}, output tok/s", sum(shape.output for shape in shapes) / min(seconds))

    def note(self, name: str, value: float) -> None:
        self.figures[name] = value
        self._show(f"  {name}: {value:,.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or .gguf file; none: the demo model")
    parser.add_argument("--dummy", action="store_true", help="random weights of the folder's config.json")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--steps", type=int, default=64, help="decode steps timed")
    parser.add_argument("--share", type=float, default=0.9)
    parser.add_argument("--piece", type=int, default=2048)
    parser.add_argument("--invariant", action="store_true")
    parser.add_argument("--profile", action="store_true", help="show what each kernel takes")
    asked = parser.parse_args()
    console = Console()
    started = time.perf_counter()
    load_format: checkpoint.LoadFormat = "dummy" if asked.dummy else "auto"
    folder = checkpoint.locate(asked.model, load_format, Path(str(Settings.model_fields["cache_dir"].default)))
    loaded = model.load(folder, device=asked.device, dtype=asked.dtype, load_format=load_format)
    console.print(f"model loaded after {time.perf_counter() - started:.1f} s")
    engine = PackedEngine(loaded, lanes=asked.lanes, share=asked.share, piece=asked.piece, batch_invariant=asked.invariant)
    console.print(f"engine ready after {time.perf_counter() - started:.1f} s, {engine.info}")
    bench = Bench(engine, console.print)
    for rows in (1, 16, 64):
        bench.decode(rows, asked.steps)
    bench.prompts(16)
    if asked.profile:
        for rows in (1, 16, 64):
            bench.profile_steps(rows)
        bench.profile_prompts(16)
    bench.workload("mixed-64", mixed_64(), 2)
    bench.workload("rag-40", rag_40(), 2)


if __name__ == "__main__":
    main()
