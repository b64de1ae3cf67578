"""A limit for the time between tokens: passes get as much of prompts as keeps to it, whatever the device."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.packed import engine as packed
from batching.packed.attention import Chunk
from batching.packed.cpu_runner import CPURunner
from batching.packed.engine import PackedEngine
from batching.packed.gap_limit import GapLimit
from batching.packed.runner import RunningSequence
from tests.batching.conftest import request
from tests.batching.packed.test_engine import Run
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@given(
    step=st.floats(0.001, 0.02),
    per_token=st.floats(1e-6, 1e-3),
    limit=st.floats(0.03, 0.2),
    in_flight=st.integers(1, 2),
)
def test_passes_keep_to_the_limit_once_their_cost_is_known(
    step: float, per_token: float, limit: float, in_flight: int
) -> None:
    clock = Clock()
    gap = GapLimit(limit, clock)
    gap.begin()
    passes = [0, *[None] * 20]  # None: as many prompt tokens as there is room for
    launched: list[int] = []
    gaps: list[float] = []
    for asked in passes:
        tokens = gap.room(100_000, 8) if asked is None else asked
        gap.launched(tokens)
        launched.append(tokens)
        if len(launched) >= in_flight:
            clock.now += step + launched[len(gaps)] * per_token
            gaps.append(step + launched[len(gaps)] * per_token)
            gap.read()
    assert launched[1] == 8, "nothing was known"
    fitting = (limit - step) / per_token
    assert max(gaps) <= limit + 8 * per_token + 1e-9
    assert launched[-1] >= min(100_000, 0.9 * fitting) - 1


def test_the_time_between_batches_is_no_pass() -> None:
    clock = Clock()
    gap = GapLimit(0.1, clock)
    clock.now = 1000.0
    gap.begin()
    gap.launched(100)
    clock.now += 0.1
    gap.read()
    assert gap.room(1000, 1) == pytest.approx(100, abs=1)


def test_chunks_beside_rows_that_decode_are_as_large_as_the_limit_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, chunks = Clock(), list[tuple[int, int]]()
    forward = CPURunner.forward

    def timed(
        runner: Any,
        decoding: Sequence[RunningSequence],
        parts: Sequence[tuple[RunningSequence, Chunk]] = (),
        num_draft_tokens: int = 0,
    ) -> None:
        tokens = sum(chunk.num_tokens for _, chunk in parts)
        chunks.append((len(decoding), tokens))
        clock.now += 0.01 + 0.001 * tokens
        forward(runner, decoding, parts, num_draft_tokens)

    monkeypatch.setattr(CPURunner, "forward", timed)
    monkeypatch.setattr(packed, "GapLimit", lambda seconds: GapLimit(seconds, clock))
    engine = PackedEngine(tiny_model(), num_slots=4, prefill_chunk=64, max_gap=0.05, max_draft_tokens=0)
    asked = [
        request(tuple(range(5)), max_tokens=40),
        *(request((9, *range(n, n + 180)), max_tokens=3) for n in (10, 300)),
    ]
    run = Run(engine, asked, first=1, joining=lambda: len(chunks) == 10)
    assert [len(answer) for answer in run.answers] == [40, 3, 3]
    beside_rows = [tokens for decoding, tokens in chunks if decoding and tokens]
    assert beside_rows[0] == 8, "an eighth of a chunk, while nothing is known"
    assert max(beside_rows) <= 40
    assert beside_rows.count(40) >= 2


def test_prompts_go_on_beside_more_rows_than_a_pass_has_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding, forward = list[int](), CPURunner.forward

    def counted(
        runner: Any,
        rows: Sequence[RunningSequence],
        parts: Sequence[tuple[RunningSequence, Chunk]] = (),
        num_draft_tokens: int = 0,
    ) -> None:
        decoding.append(len(rows))
        forward(runner, rows, parts, num_draft_tokens)

    monkeypatch.setattr(CPURunner, "forward", counted)
    engine = PackedEngine(tiny_model(), num_slots=24, prefill_chunk=16, max_gap=100.0, max_draft_tokens=0)
    Run(engine, [request((7,), max_tokens=100) for _ in range(24)])
    assert max(decoding) == 24
