"""What speculation brings: decode speed by how much of what it drafts is right, and whole answers that quote.

    python -m benchmarks.speculation --model FOLDER --dummy --part scripted --rows 1,16,64
    python -m benchmarks.speculation --part quotes --rows 1

`scripted` (CUDA only) makes each drafted token right with a given probability, by changing the draft after the token
that it is compared with was sampled: what is timed is the product's own step. `quotes` asks the questions of the
workload rag-quote. One table on standard output; ratios are of this run, speculation off being measured in it, too.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from batching import checkpoint, model
from batching.engine import NO_LOGPROBS
from batching.packed.engine import PackedEngine
from batching.packed.speculation import MAX_DRAFT_TOKENS
from batching.stream import Row
from batching.types import Request, Sampling, TokenLogprob
from benchmarks.engine_rows import Clock, Shape, rows_of
from benchmarks.quotes import questions
from server.settings import Settings

RAGFLOW = {"temperature": 0.1, "top_p": 0.3, "presence_penalty": 0.4, "frequency_penalty": 0.7}
CHANCES = 0.3, 0.51, 0.6, 0.77, 0.95
"""Of each drafted token to be right. With three tokens a draft 0.51, 0.77 and 0.95 accept 30, 60 and 90% of them."""


class Window(Clock):
    """`Steps` that times the tokens given while all rows decode: from the last one's first token to the first end."""

    def __init__(self, rows: Sequence[Row]) -> None:
        super().__init__()
        self._missing = set(rows)
        self._began: float | None = None
        self._ended: float | None = None
        self._tokens = 0

    def emit(
        self, rows: Sequence[Row], tokens: Sequence[int], logprobs: Mapping[int, TokenLogprob] = NO_LOGPROBS
    ) -> list[bool]:
        over = super().emit(rows, tokens, logprobs)
        now = time.perf_counter()
        if self._began is not None and self._ended is None:
            self._tokens += len(rows)
            self._ended = now if any(over) else None
        self._missing.difference_update(rows)
        if self._began is None and not self._missing:
            self._began = now
        return over

    @property
    def tokens_per_second(self) -> float:
        assert self._began is not None
        assert self._ended is not None
        return self._tokens / (self._ended - self._began)


class Feed(Clock):
    """`Steps` that keep `width` rows running until all have their answers, and note how long each took."""

    def __init__(self, rows: Sequence[Row], width: int) -> None:
        super().__init__()
        self._later = list(rows)
        self._width = width
        self._running: dict[Row, float] = {}
        self.seconds: dict[Row, float] = {}
        self.tokens: dict[Row, list[int]] = {row: [] for row in rows}

    def admit(self) -> list[Row]:
        joining = [self._later.pop(0) for _ in range(min(self._width - len(self._running), len(self._later)))]
        self._running |= dict.fromkeys(joining, time.perf_counter())
        return joining

    def emit(
        self, rows: Sequence[Row], tokens: Sequence[int], logprobs: Mapping[int, TokenLogprob] = NO_LOGPROBS
    ) -> list[bool]:
        for row, token in zip(rows, tokens, strict=True):
            if not row.over:
                self.tokens[row].append(token)
                row.push(token)
            if row.over and row in self._running:
                self.seconds[row] = time.perf_counter() - self._running.pop(row)
        return [row.over for row in rows]


@contextmanager
def scripted(chance: Tensor) -> Iterator[None]:
    """Engines that are built inside draft for every row, and each token is right with this probability [1]."""
    from batching.packed import triton_sampling as subject

    original = subject.advance
    drafted, right, unit = subject.NUM_DRAFTED.value, subject.RATE.value, subject.PROSPECT_UNIT.value

    def advance(
        sampled: Tensor, slots: Tensor, int_params: Tensor, float_params: Tensor, counts: Tensor, drafts: Tensor,
        history: Tensor, out: Tensor, *, drafting: bool, block: int = 1024,
    ) -> None:  # fmt: skip
        at, number = slots.long(), drafts.shape[1]
        # What was not sampled, because nothing was drafted there, can be anything.
        first = sampled.view(len(slots), -1)[:, :number].clamp(0, counts.shape[1] - 2)
        luck = torch.rand(first.shape, device=first.device) < chance
        drafts[at, : first.shape[1]] = torch.where(luck, first, first + 1).int()
        original(sampled, slots, int_params, float_params, counts, drafts, history, out, drafting=drafting, block=block)
        left = int_params[at, subject.MAX_TOKENS.value] - int_params[at, subject.NUM_OUTPUT_TOKENS.value] - 1
        int_params[at, drafted] = left.clamp(0, number)
        rate = float_params[at, right]
        prospect = sum(rate**power for power in range(1, number + 1)) / unit
        out[:, subject.OUT_PROSPECT.value] = prospect.long()

    subject.advance = advance
    try:
        yield
    finally:
        subject.advance = original


def free() -> None:
    """Give back the memory of an engine that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def shares(rows: Sequence[Row]) -> tuple[float, float]:
    """Tokens a step of a row, and the accepted share of what was drafted."""
    tokens, accepted, drafted = (
        sum(getattr(row, name) for row in rows)
        for name in ("num_output_tokens", "num_accepted_tokens", "num_drafted_tokens")
    )
    return tokens / (tokens - accepted), accepted / drafted if drafted else 0.0


class Scripted:
    """Decode speed with `context` tokens in the cache."""

    def __init__(self, build: Callable[[int], PackedEngine], counts: Sequence[int], context: int, tokens: int) -> None:
        self._build, self._counts, self._context, self._tokens = build, counts, context, tokens
        self._off: dict[int, float] = {}

    def run(self) -> None:
        print(f"decode, {self._context} tokens of context: tok/s, times as fast as off, tokens a step, accepted")
        self._measure("off", self._build(0))
        free()
        self._measure("auto, nothing to quote", self._build(MAX_DRAFT_TOKENS))
        free()
        chance = torch.zeros(1, device="cuda")
        with scripted(chance):
            engine = self._build(MAX_DRAFT_TOKENS)
        for each in CHANCES:
            chance.fill_(each)
            self._measure(f"each token right with {each}", engine)

    def _measure(self, name: str, engine: PackedEngine) -> None:
        for count in self._counts:
            rows = rows_of([Shape(self._context, self._tokens)] * count, engine.info.vocab_size, seed=count)
            window = Window(rows)
            engine.run(rows, window)
            speed = window.tokens_per_second
            off = self._off.setdefault(count, speed)
            steps, accepted = shares(rows)
            print(
                f"  {name:34} {count:3} rows {speed:8.0f} {speed / off:6.3f}x {steps:6.2f} {accepted:7.3f}", flush=True
            )


def equal(some: Sequence[list[int]], others: Sequence[list[int]]) -> float:
    """The share of answers that are the same."""
    return sum(one == other for one, other in zip(some, others, strict=True)) / len(some)


def asked(tokenizer: Any, count: int, sampling: Mapping[str, Any], stops: frozenset[int]) -> list[Row]:
    """The questions of rag-quote as rows."""
    rows = []
    for number, messages in enumerate(questions(count)):
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        settings = Sampling(max_tokens=200, seed=number, stop_token_ids=stops, **sampling)
        request = Request(str(number), tuple(prompt), settings, time_limit=600.0)
        rows.append(Row(request, stream=None, arrived=0.0))  # type: ignore[arg-type]
    return rows


def quotes(build: Callable[[int], PackedEngine], tokenizer: Any, counts: Sequence[int], number: int) -> None:
    """Whole answers, greedy and with RAGFlow's sampling."""
    print(
        "rag-quote: answer p50, tok/s; with speculation off, auto; ratio of p50; tokens a step; accepted; same tokens"
    )
    answers: dict[tuple[str, int, int], tuple[float, float, list[Row], list[list[int]]]] = {}
    for limit in (0, MAX_DRAFT_TOKENS):
        engine = build(limit)
        for name, sampling in (("greedy", {"temperature": 0.0}), ("RAGFlow's sampling", RAGFLOW)):
            for count in counts:
                rows = asked(tokenizer, number, sampling, engine.info.stop_token_ids)
                feed = Feed(rows, count)
                began = time.perf_counter()
                engine.run(feed.admit(), feed)
                took = time.perf_counter() - began
                given = list(feed.tokens.values())
                middle = statistics.median(feed.seconds.values())
                answers[name, count, limit] = middle, sum(map(len, given)) / took, rows, given
        del engine
        free()
    for name, count in {key[:2]: None for key in answers}:
        (off, slow, _, plain), (on, fast, rows, given) = (
            answers[name, count, limit] for limit in (0, MAX_DRAFT_TOKENS)
        )
        same, as_before = (equal(plain, others) for others in (given, answers[name, counts[0], 0][3]))
        steps, accepted = shares(rows)
        print(
            f"  {name:20} {count:3} rows {1000 * off:7.0f} {1000 * on:7.0f} ms {slow:7.0f} {fast:7.0f} tok/s "
            f"{off / on:6.3f}x {steps:5.2f} {accepted:6.3f} {same:6.3f} {as_before:6.3f}"
        )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculation", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder, or GGUF file; the demo model if not given")
    parser.add_argument("--dummy", action="store_true", help="random weights")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--part", choices=["scripted", "quotes"], default="quotes")
    parser.add_argument("--rows", default="1", help="how many run at once, several with commas")
    parser.add_argument("--context", type=int, default=4800, help="scripted: tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=256, help="scripted: tokens of each answer")
    parser.add_argument("--questions", type=int, default=200, help="quotes: how many")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    told = parser.parse_args()
    load_format: checkpoint.LoadFormat = "dummy" if told.dummy else "auto"
    folder = checkpoint.locate(told.model, load_format, Path(str(Settings.model_fields["cache_dir"].default)))
    counts = [int(count) for count in told.rows.split(",")]

    def build(max_draft_tokens: int) -> PackedEngine:
        loaded: PreTrainedModel = model.load(folder, device=told.device, dtype=told.dtype, load_format=load_format)
        return PackedEngine(
            loaded,
            num_slots=max(counts),
            gpu_memory_utilization=told.gpu_memory_utilization,
            max_draft_tokens=max_draft_tokens,
        )

    if told.part == "scripted":
        Scripted(build, counts, told.context, told.tokens).run()
    else:
        quotes(build, AutoTokenizer.from_pretrained(folder), counts, told.questions)


if __name__ == "__main__":
    main()
