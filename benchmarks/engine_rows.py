"""Rows for the engine benchmark, and what watches them: no streams, no event loop."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from batching.engine import NO_LOGPROBS, Engine
from batching.stream import Row
from batching.types import PromptLogprob, Request, Sampling, TokenLogprob
from benchmarks.workloads import WORKLOADS

CONTEXT = 1536


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths of one request, in tokens."""

    prompt: int
    output: int


def shapes_of(workload: str, count: int) -> list[Shape]:
    """The lengths that the load tools ask for, with their seed."""
    return [Shape(prompt, output) for prompt, output in WORKLOADS[workload].lengths(count, seed=0)]


def rows_of(shapes: Sequence[Shape], vocabulary: int, seed: int = 0, **settings: Any) -> list[Row]:
    """Rows of random tokens that never stop early. No two prompts share a prefix."""
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

    def emit_prompt(self, row: Row, start: int, logprobs: Sequence[PromptLogprob | None]) -> bool:
        return row.over

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
    """Seconds to run them to completion. Raises AssertionError if a row lacks tokens."""
    clock = Clock()
    started = time.perf_counter()
    engine.run(rows, clock)
    seconds = time.perf_counter() - started
    assert all(row.num_output_tokens == row.request.sampling.max_tokens for row in rows)
    return seconds, clock
