"""What structured output adds to a step: the same batch with and without grammars, in one process, taking turns.

A table for each number of rows: a model's whole step, in which matching overlaps the forward pass. For `generate` one
more comes first: the sampler alone on logits as wide as Qwen3's, where a step is nothing but the choice of tokens.

    python -m benchmarks.structured [--model FOLDER] [--tokenizer FOLDER] [--device cuda] [--dummy] [--rows 1,16,64]
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from batching import checkpoint, model
from batching.engine import Engine
from batching.packed.engine import PackedEngine
from batching.padded import PaddedEngine
from batching.sampling import Sampler
from batching.stream import Row
from batching.types import Grammar, Request, Sampling
from benchmarks.engine_rows import Clock
from server.grammar.compiler import Grammars
from server.grammar.json_schema import Schema
from server.grammar.source import Part
from server.settings import Settings

VOCABULARY = 151_936  # Qwen3's logits; its tokenizer has 151,669 tokens
PERSON: Schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "email": {"type": "string", "format": "email"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "role": {"enum": ["reader", "writer", "owner"]},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "email", "age", "role", "tags"],
    "additionalProperties": False,
}
ENDLESS: Schema = {"type": "array", "items": PERSON, "minItems": 100_000}
"""No row ends early, so that both sides of a comparison make as many steps with as many rows."""


def requests(rows: int, tokens: int, grammars: Sequence[Grammar | None]) -> list[Request]:
    """Rows of 64 prompt tokens, drawn at temperature 0.7; the grammars go round."""
    return [
        Request(
            str(row),
            tuple(range(100, 164)),
            Sampling(max_tokens=tokens, seed=row, temperature=0.7),
            time_limit=600.0,
            grammar=grammars[row % len(grammars)],
        )
        for row in range(rows)
    ]


def sampler_step(rows: int, steps: int, grammars: Sequence[Grammar | None], device: torch.device) -> float:
    """Seconds a step of the sampler alone takes, on noise."""
    sampler = Sampler(requests(rows, steps, grammars), VOCABULARY, device)
    noise = torch.randn(rows, VOCABULARY, device=device, generator=torch.Generator(device).manual_seed(0))
    started = time.perf_counter()
    for _ in range(steps):
        sampler(noise.clone()).tolist()
    return (time.perf_counter() - started) / steps


def model_step(engine: Engine, rows: int, steps: int, grammars: Sequence[Grammar | None]) -> float:
    """Seconds a decode step of the whole model takes, prompts left out."""
    clock = Clock()
    batch = [Row(request, stream=None, arrived=0.0) for request in requests(rows, steps, grammars)]  # type: ignore[arg-type]
    engine.run(batch, clock)
    full = [at for at, count in clock.steps if count == rows]
    return (full[-1] - full[0]) / (len(full) - 1)


def compare(measure: Callable[[Sequence[Grammar | None]], float], grammar: Grammar, repeats: int) -> list[list[float]]:
    """Seconds a step, all repeats: without grammars, with one on one row in four, with one on every row."""
    kinds: list[list[Grammar | None]] = [[None], [grammar, None, None, None], [grammar]]
    for kind in kinds:
        measure(kind)
    found: list[list[float]] = [[] for _ in kinds]
    for _ in range(repeats):
        for kind, seconds in zip(kinds, found, strict=True):
            seconds.append(measure(kind))
    return found


def compiled(folder: str) -> Grammar:
    """The endless schema for a folder's tokenizer."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)  # type: ignore[assignment]
    return asyncio.run(Grammars(tokenizer).of(Part(ENDLESS, strict=True, param="")))


def table(title: str, found: list[list[float]]) -> Table:
    shown = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("rows with a grammar", "ms a step (median)", "least", "most", "added"):
        shown.add_column(column, justify="right")
    plain = statistics.median(found[0])
    for name, seconds in zip(("none", "one in four", "all"), found, strict=True):
        middle = statistics.median(seconds)
        cells = [f"{value * 1000:.2f}" for value in (middle, min(seconds), max(seconds))]
        shown.add_row(name, *cells, f"{middle / plain - 1:+.1%}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.structured", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or .gguf file; none: the demo model")
    parser.add_argument("--tokenizer", help="folder of the tokenizer for the first table; none: the model's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--dummy", action="store_true", help="random weights of the folder's config.json")
    parser.add_argument("--engine", choices=["packed", "generate"], default="packed")
    parser.add_argument("--rows", default="32", help="numbers of rows, separated by commas")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    load_format: checkpoint.LoadFormat = "dummy" if asked.dummy else "auto"
    folder = checkpoint.locate(asked.model, load_format, Path(str(Settings.model_fields["cache_dir"].default)))
    loaded = model.load(folder, device=asked.device, dtype=asked.dtype, load_format=load_format)
    numbers = [int(rows) for rows in asked.rows.split(",")]
    engine: Engine
    if asked.engine == "packed":
        engine = PackedEngine(loaded, num_slots=max(numbers), max_draft_tokens=0)
    else:
        engine = PaddedEngine(loaded, token_budget=max(numbers) * (64 + asked.steps) * 2)
    grammar = compiled(folder)
    wide = compiled(asked.tokenizer) if asked.tokenizer else grammar
    console, steps = Console(), asked.steps
    size = f"{engine.info.parameters / 1e6:,.0f} M parameters in {engine.info.dtype}"
    for rows in numbers:
        if asked.engine == "generate":
            alone = compare(partial(sampler_step, rows, steps, device=loaded.device), wide, asked.repeats)
            console.print(table(f"sampler alone, {rows} rows of {VOCABULARY:,} logits, {engine.info.device}", alone))
        whole = compare(partial(model_step, engine, rows, steps), grammar, asked.repeats)
        console.print(table(f"model, {size}, {rows} rows, {engine.info.device}", whole))


if __name__ == "__main__":
    main()
