"""Laws of the load tool: its arithmetic, its workloads, and whole runs against scripted servers."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from benchmarks.client import AnswerError, Record, classify, note, split_events
from benchmarks.load import main, parse
from benchmarks.summary import Level, percentile, summarise
from benchmarks.workloads import WORKLOADS, draw, text

REQUIRED = ["--url", "http://127.0.0.1:1", "--model", "m"]


def record(chunks: list[float], tokens: int, **fields: Any) -> Record:
    return Record(serial=0, max_tokens=tokens, sent=0.0, chunks=chunks, completion_tokens=tokens, latency=9.0, **fields)


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


def test_a_summary_leaves_failed_requests_and_the_warm_up_out_of_the_figures() -> None:
    records = [record([1.0, 2.0], 10), record([3.0, 5.0], 20), record([50.0], 400, error="timeout")]
    found = summarise(Level(3, 10.0, 0.1, records, warm_up=[record([70.0], 7)]))
    assert (found.requests, found.errors) == (3, {"timeout": 1})
    assert (found.requests_per_second, found.output_tokens_per_second) == (0.2, 3.0)
    assert found.ttft["p50"] == 2.0
    assert found.gap["p50"] == 1.5


def test_a_level_without_answers_has_no_distributions() -> None:
    found = summarise(Level(1, 1.0, 0.0, [record([], 0, error="connection")], warm_up=[]))
    assert (found.output_tokens_per_second, found.ttft, found.latency) == (0.0, {}, {})


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


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_the_same_seed_draws_the_same_jobs(name: str) -> None:
    assert draw(WORKLOADS[name], 20, seed=3) == draw(WORKLOADS[name], 20, seed=3)
    assert draw(WORKLOADS[name], 20, seed=3) != draw(WORKLOADS[name], 20, seed=4)


def test_mixed_64_is_the_workload_that_published_figures_use() -> None:
    jobs = draw(WORKLOADS["mixed-64"], 64, seed=0)
    assert sum(job.prompt_tokens for job in jobs) == 99_754
    assert sum(job.max_tokens for job in jobs) == 8_668


def test_levels_ask_for_the_same_lengths_in_other_words() -> None:
    first, second = (draw(WORKLOADS["short"], 30, seed=0, first=first) for first in (0, 30))
    assert [job.max_tokens for job in first] == [job.max_tokens for job in second]
    assert [job.prompt_tokens for job in first] == [job.prompt_tokens for job in second]
    assert len({job.prompt for job in first + second}) == 60


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(1, 30))
def test_prompts_are_distinct_however_short(one: int, other: int, words: int) -> None:
    assert (text(0, one, words) == text(0, other, words)) == (one == other)


@given(st.integers(1, 300))
def test_a_prompt_has_a_word_a_token(words: int) -> None:
    assert len(text(0, 5, words).split()) == 1 + words


@pytest.mark.parametrize(
    "flags",
    [["--concurrency", "0"], ["--output-tokens", "9:3"], ["--output-tokens", "9"], ["--workload", "x"]],
)
def test_flags_that_make_no_sense_end_with_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(REQUIRED + flags)
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_a_level_has_two_requests_a_client_and_at_least_eight() -> None:
    settings, _ = parse(REQUIRED)
    assert [settings.requests(concurrency) for concurrency in (1, 4, 32)] == [8, 8, 64]


def test_ranges_take_the_place_of_the_workloads_own() -> None:
    settings, _ = parse([*REQUIRED, "--prompt-tokens", "5:5", "--output-tokens", "3:4"])
    jobs = draw(settings.lengths(), 20, seed=0)
    assert {job.prompt_tokens for job in jobs} == {5}
    assert {job.max_tokens for job in jobs} == {3, 4}


class ScriptedServer:
    """Answers each chat as the script says: one word for each token, or the failure named next."""

    def __init__(self, *failures: str) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self._failures = list(failures)
        self.app = Starlette(routes=[Route("/v1/chat/completions", self.chat, methods=["POST"])])

    async def chat(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        self.bodies.append(body)
        self.authorizations.append(request.headers.get("authorization"))
        failure = self._failures.pop(0) if self._failures else ""
        if failure == "500":
            return Response("broken", 500)
        return StreamingResponse(self._events(body["max_tokens"], failure), media_type="text/event-stream")

    async def _events(self, tokens: int, failure: str) -> AsyncIterator[bytes]:
        for _ in range(tokens - (failure == "short")):
            yield frame(choices=[{"index": 0, "delta": {"content": "word "}, "finish_reason": None}])
        match failure:
            case "cut":
                raise ConnectionError("the script says so")
            case "hang":
                await asyncio.Event().wait()
            case "error frame":
                yield frame(error={"message": "out of memory"})
            case "no finish":
                yield b"data: [DONE]\n\n"
            case _:
                yield frame(choices=[{"index": 0, "delta": {}, "finish_reason": "length"}])
                yield frame(choices=[], usage={"prompt_tokens": 7, "completion_tokens": tokens - (failure == "short")})
                yield b"data: [DONE]\n\n"


def frame(**fields: Any) -> bytes:
    return b"data: " + orjson.dumps(fields) + b"\n\n"


@contextmanager
def serving(scripted: ScriptedServer) -> Iterator[str]:
    """The server's URL. The socket listens before the server runs, so no client comes too early."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(scripted.app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def load(scripted: ScriptedServer, out: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    with serving(scripted) as url:
        code = main(["--url", url, "--model", "tiny", "--warm-up", "0", "--json", str(out), *flags])
    return code, orjson.loads(out.read_bytes())


def test_a_run_without_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scripted = ScriptedServer()
    flags = ["--concurrency", "1,3", "--requests-per-level", "6", "--output-tokens", "4:9", "--warm-up", "2"]
    code, found = load(scripted, tmp_path / "run.json", *flags, "--ignore-eos", "--api-key", "secret")
    assert code == 0
    assert [level["concurrency"] for level in found["levels"]] == [1, 3]
    for level in found["levels"]:
        assert (level["summary"]["requests"], level["summary"]["errors"]) == (6, {})
        assert len(level["warm_up"]) == 2
        for answer in level["records"]:
            assert answer["completion_tokens"] == answer["max_tokens"] == len(answer["chunks"])
            assert 0 < answer["chunks"][0] <= answer["chunks"][-1] <= answer["latency"]
    assert len({body["messages"][0]["content"] for body in scripted.bodies}) == len(scripted.bodies) == 16
    assert all(body["ignore_eos"] and body["model"] == "tiny" for body in scripted.bodies)
    assert set(scripted.authorizations) == {"Bearer secret"}
    assert "secret" not in (tmp_path / "run.json").read_text()
    assert "TTFT ms" in capsys.readouterr().out


def test_fields_that_not_every_server_knows_are_not_sent_unasked(tmp_path: Path) -> None:
    scripted = ScriptedServer()
    load(scripted, tmp_path / "run.json", "--concurrency", "1", "--requests-per-level", "1")
    assert "ignore_eos" not in scripted.bodies[0]
    assert scripted.authorizations == [None]


def test_failures_are_told_apart_and_end_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scripted = ScriptedServer("500", "cut", "error frame", "no finish", "short", "hang", "500")
    flags = ["--concurrency", "2", "--requests-per-level", "10", "--timeout", "2", "--ignore-eos"]
    code, found = load(scripted, tmp_path / "run.json", *flags)
    assert code == 1
    assert found["levels"][0]["summary"]["errors"] == {
        "http 500": 2,
        "connection": 1,
        "error frame": 1,
        "protocol": 1,
        "incomplete": 1,
        "timeout": 1,
    }
    assert sum(answer["error"] is None for answer in found["levels"][0]["records"]) == 3
    assert "2 clients: 2 x http 500: broken" in capsys.readouterr().out


def test_a_failed_warm_up_ends_with_1(tmp_path: Path) -> None:
    flags = ["--concurrency", "1", "--requests-per-level", "1", "--warm-up", "1"]
    code, found = load(ScriptedServer("500"), tmp_path / "run.json", *flags)
    assert code == 1
    assert found["levels"][0]["summary"]["errors"] == {}


def test_a_server_that_is_not_there_is_a_connection_failure(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    out = tmp_path / "run.json"
    assert main(["--url", f"http://127.0.0.1:{port}/v1", "--model", "m", "--json", str(out)]) == 1
    levels = orjson.loads(out.read_bytes())["levels"]
    assert [level["summary"]["errors"] for level in levels] == [{"connection": n} for n in (8, 16, 64)]
