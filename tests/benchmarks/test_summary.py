"""Laws of the arithmetic: percentiles, rates, goodput, and what an answer's chunks come to."""

from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.client import AnswerError, Record, classify, note, split_events
from benchmarks.summary import Targets, goodput, percentile, summarise, tokens_by_second


def record(chunks: list[float], tokens: int, **fields: Any) -> Record:
    told = {"serial": 0, "max_tokens": tokens, "due": 0.0, "sent": 0.0, "latency": 9.0} | fields
    return Record(chunks=chunks, completion_tokens=tokens, **told)


@given(
    st.lists(st.floats(-1e9, 1e9, allow_nan=False), min_size=1, max_size=50),
    st.floats(0, 100, allow_nan=False),
)
def test_a_percentile_is_numpys_linear_one(values: list[float], percent: float) -> None:
    expected = float(np.percentile(values, percent, method="linear"))
    assert percentile(values, percent) == pytest.approx(expected, rel=1e-9, abs=1e-4)


def test_a_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 50)


def test_time_per_token_leaves_the_first_token_out() -> None:
    answer = record([1.0, 1.5, 3.0], tokens=5)
    assert answer.ttft == 1.0
    assert answer.gaps == [0.5, 1.5]
    assert answer.per_token == (3.0 - 1.0) / 4


@pytest.mark.parametrize(("chunks", "tokens"), [([], 0), ([1.0], 1), ([1.0], 8), ([1.0, 2.0], 1)])
def test_time_per_token_needs_two_chunks_and_two_tokens(chunks: list[float], tokens: int) -> None:
    assert record(chunks, tokens).per_token is None


def test_a_summary_leaves_failed_requests_out_of_the_figures() -> None:
    records = [record([1.0, 2.0], 10), record([3.0, 5.0], 20), record([50.0], 400, error="timeout")]
    found = summarise(records, 10.0, Targets())
    assert (found.requests, found.errors) == (3, {"timeout": 1})
    assert (found.requests_per_second, found.output_tokens_per_second) == (0.2, 3.0)
    assert found.ttft["p50"] == 2.0
    assert found.gap["p50"] == 1.5
    assert found.goodput is None


def test_a_level_without_answers_has_no_distributions() -> None:
    found = summarise([record([], 0, error="connection")], 1.0, Targets())
    assert (found.output_tokens_per_second, found.ttft, found.latency) == (0.0, {}, {})


def test_lateness_is_the_clients_own() -> None:
    found = summarise([record([1.0], 1, due=2.0, sent=2.5), record([1.0], 1, due=3.0, sent=3.5)], 1.0, Targets())
    assert found.lateness == 0.5


@pytest.mark.parametrize(
    ("targets", "good"),
    [
        (Targets(ttft=1.0), 2 / 5),
        (Targets(per_token=0.1), 3 / 5),
        (Targets(ttft=1.0, per_token=0.1), 1 / 5),
        (Targets(ttft=99.0, per_token=99.0), 4 / 5),
    ],
)
def test_goodput_is_the_share_of_all_requests_that_keep_every_target(targets: Targets, good: float) -> None:
    records = [
        record([1.0, 1.9], 10),  # 0.1 s a token
        record([0.5, 2.3], 10),  # 0.2 s a token
        record([2.0, 2.9], 10),
        record([3.0], 1),  # has no time per token
        record([0.1, 0.2], 10, error="error frame"),
    ]
    assert goodput(records, targets) == good
    assert summarise(records, 10.0, targets).goodput == good


def test_goodput_of_no_requests_is_none_of_them() -> None:
    assert goodput([], Targets(ttft=1.0)) == 0.0


@given(st.lists(st.tuples(st.floats(0, 20), st.lists(st.floats(0, 20), min_size=1), st.integers(1, 50)), max_size=9))
def test_tokens_by_second_add_up_to_all_tokens(answers: list[tuple[float, list[float], int]]) -> None:
    records = [record(sorted(chunks), tokens, due=due) for due, chunks, tokens in answers]
    found = tokens_by_second(records, seconds=40.0)
    assert len(found) == 40
    assert sum(found) == pytest.approx(sum(tokens for _, _, tokens in answers))


def test_a_token_counts_in_the_second_in_which_its_chunk_came() -> None:
    assert tokens_by_second([record([0.5, 1.25], 4, due=1.0)], seconds=3.0) == [0.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (AnswerError("http 503", "busy"), "http 503"),
        (TimeoutError(), "timeout"),
        (ConnectionRefusedError("refused"), "connection"),
        (OSError("no route"), "connection"),
    ],
)
def test_failures_are_counted_by_kind(error: Exception, kind: str) -> None:
    assert classify(error) == kind


@given(st.binary(max_size=200), st.integers(0, 200))
def test_events_do_not_depend_on_where_a_read_ends(data: bytes, cut: int) -> None:
    stream = b"data: a\r\n\r\n: ping\n\ndata:b\n\n" + data
    whole, _ = split_events(stream)
    first, rest = split_events(stream[:cut])
    second, _ = split_events(rest + stream[cut:])
    assert first + second == whole
    assert whole[:2] == [b"a", b"b"]


@pytest.mark.parametrize("event", [b"{", b"[]", b"7", b'{"choices": [3]}', b'{"usage": {"total_tokens": 1}}'])
def test_an_unreadable_chunk_is_a_protocol_error(event: bytes) -> None:
    with pytest.raises(AnswerError) as caught:
        note(event, 0.0, record([], 0))
    assert caught.value.kind == "protocol"


def test_only_chunks_with_text_count() -> None:
    answer = record([], 0)
    for at, delta in enumerate([{"role": "assistant", "content": ""}, {"content": "a"}, {}, {"reasoning": "b"}]):
        note(orjson.dumps({"choices": [{"delta": delta}]}), float(at), answer)
    assert answer.chunks == [1.0, 3.0]
