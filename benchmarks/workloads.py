"""What is asked: how long prompts and answers are, and the seeded text that fills the prompts.

A prompt of N tokens is N words of the list: 1.0006 tokens a word, measured with Qwen3's and SmolLM2's
tokenizers. The server's chat template comes on top.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from benchmarks.words import WORDS

Law = Callable[[Random], int]


@dataclass(frozen=True, slots=True)
class Job:
    """One request to be sent. `serial` is unique in a run; lengths are in tokens."""

    serial: int
    prompt: str
    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """How many tokens a prompt has and how many are asked for, each as a law to draw from."""

    prompt_tokens: Law
    output_tokens: Law


def uniform(low: int, high: int) -> Law:
    """Whole numbers from low to high, both included, each as likely."""
    return lambda random: random.randint(low, high)


def lognormal(median: int, sigma: float, low: int, high: int) -> Law:
    """exp(normal(ln median, sigma)), rounded down, then clipped to low..high."""
    return lambda random: min(high, max(low, int(random.lognormvariate(math.log(median), sigma))))


WORKLOADS = {
    "short": Workload(uniform(20, 60), uniform(32, 64)),
    "mixed-64": Workload(lognormal(1400, 0.5, 200, 4000), uniform(16, 256)),
}


def draw(workload: Workload, count: int, *, seed: int, first: int = 0) -> list[Job]:
    """`count` jobs with serials from `first` on.

    Lengths depend on the seed alone, so every level of a run asks for the same work. Text depends on the seed
    and the serial, so no two jobs of a run begin alike and a prefix cache finds nothing.
    """
    random = Random(seed)
    prompts = [workload.prompt_tokens(random) for _ in range(count)]
    outputs = [workload.output_tokens(random) for _ in range(count)]
    return [
        Job(serial, text(seed, serial, prompt), prompt, output)
        for serial, (prompt, output) in enumerate(zip(prompts, outputs, strict=True), start=first)
    ]


def text(seed: int, serial: int, words: int) -> str:
    """The serial number, which makes the prompt distinct, then `words` random words."""
    chosen = Random(f"{seed}/{serial}").choices(WORDS, k=words)
    return f"{serial}. {' '.join(chosen)}"
