"""The engines alone, without HTTP: how fast a step, a prompt and a whole workload are, and how far logits agree.

python -m benchmarks.engine --model FOLDER --dummy --agreement --against generate,continuous

One table on standard output. Everything runs in one process on one device, one engine after the other; ratios are of
this run.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from batching import checkpoint, model
from batching.engine import Engine
from batching.packed.engine import PackedEngine
from batching.padded import PaddedEngine
from batching.stream import Row
from benchmarks.agreement import Agreement
from benchmarks.continuous import run_continuous
from benchmarks.engine_rows import CONTEXT, Clock, Shape, Watch, rows_of, shapes_of, timed
from server.settings import Settings


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
        """Milliseconds per step with this many rows, through the whole loop: the median of full steps."""
        _, clock = timed(self._engine, self._rows([Shape(CONTEXT, steps)] * rows, **settings))
        full = [at for at, count in clock.steps if count == rows]
        gaps = [later - earlier for earlier, later in pairwise(full)]
        self.note(f"decode {rows} rows{name}, ms/step", 1000 * statistics.median(gaps[4:] or gaps))

    def profile_steps(self, rows: int) -> None:
        """Time per kernel in a step with this many rows."""
        watch = Watch(24, 56)
        self._engine.run(self._rows([Shape(CONTEXT, 64)] * rows), watch)
        self._show(f"  one step of {rows} rows:")
        for line in watch.lines(32):
            self._show(line)

    def profile_prompts(self, rows: int) -> None:
        """Time per kernel for this many prompts."""
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


def padded_batches(engine: Engine, rows: Sequence[Row], size: int) -> float:
    """Seconds for rows in batches of `size`, in their order, as an engine that cannot let rows join has to run them."""
    return sum(timed(engine, list(rows[at : at + size]))[0] for at in range(0, len(rows), size))


def against(names: Sequence[str], load: Callable[[], PreTrainedModel], shapes: Sequence[Shape]) -> dict[str, float]:
    """Seconds for a workload on the other ways to run it, each on a model of its own."""
    found = {}
    for name in names:
        other = load()
        rows = rows_of(shapes, other.config.vocab_size)
        if name == "generate":
            found[name] = padded_batches(PaddedEngine(other, token_budget=10**6), rows, 16)
        elif name == "continuous":
            found[name] = run_continuous(other, rows)
        else:
            raise SystemExit(f"there is no contender {name}, only generate and continuous")
        del other
        free()
    return found


def free() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(figures: dict[str, float]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD)
    shown.add_column("what")
    shown.add_column("measured", justify="right")
    for name, value in figures.items():
        shown.add_row(name, f"{value:,.4f}" if abs(value) < 1 else f"{value:,.2f}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or .gguf file; none: the demo model")
    parser.add_argument("--dummy", action="store_true", help="random weights of the folder's config.json")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", choices=["none", "fp8"], default="none")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=64, help="decode steps timed")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--prefill-chunk", type=int, default=2048)
    parser.add_argument("--invariant", action="store_true")
    parser.add_argument("--profile", action="store_true", help="show what each kernel takes")
    parser.add_argument("--agreement", action="store_true", help="compare logits with transformers' own attention")
    parser.add_argument("--against", default="", help="generate, continuous or both: run mixed-64 on them as well")
    asked = parser.parse_args()
    console = Console(width=160)
    load_format: checkpoint.LoadFormat = "dummy" if asked.dummy else "auto"
    folder = checkpoint.locate(asked.model, load_format, Path(str(Settings.model_fields["cache_dir"].default)))

    def load() -> PreTrainedModel:
        return model.load(
            folder,
            device=asked.device,
            dtype=asked.dtype,
            load_format=load_format,
            quantization=asked.quantization,
        )

    mixed_64 = shapes_of("mixed-64", 64)
    others = against([name for name in asked.against.split(",") if name], load, mixed_64)
    agreement = Agreement(load()) if asked.agreement else None
    started = time.perf_counter()
    engine = PackedEngine(
        load(),
        num_slots=asked.batch_size,
        gpu_memory_utilization=asked.gpu_memory_utilization,
        prefill_chunk=asked.prefill_chunk,
        batch_invariant=asked.invariant,
    )
    bench = Bench(engine, console.print)
    bench.note("load and start, s", time.perf_counter() - started)
    for rows in (1, 16, 64):
        bench.decode(rows, asked.steps)
    bench.decode(64, asked.steps, ", RAGFlow's sampling", **RAGFLOW)
    bench.decode(1, asked.steps, ", RAGFlow's sampling", **RAGFLOW)
    bench.prompts(16)
    if asked.profile:
        for rows in (1, 16, 64):
            bench.profile_steps(rows)
        bench.profile_prompts(16)
    bench.workload("mixed-64", mixed_64, 3)
    bench.workload("rag-40", shapes_of("rag-40", 40), 2)
    if agreement:
        for name, value in agreement.errors(engine).items():
            bench.note(name, value)
    for name, seconds in others.items():
        bench.note(f"mixed-64 on {name}, s", seconds)
        bench.note(f"mixed-64, times as fast as {name}", seconds / bench.figures["mixed-64, s"])
    if torch.cuda.is_available():
        free_bytes, total = torch.cuda.mem_get_info()
        bench.note("share of the device's memory in use", 1 - free_bytes / total)
    console.print(table(bench.figures))


RAGFLOW: dict[str, Any] = {
    "temperature": 0.1,
    "top_p": 0.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.7,
}
"""What RAGFlow's dialogs send unless their owner changes it."""


if __name__ == "__main__":
    main()
