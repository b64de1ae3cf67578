"""Laws of whole runs of the load tool, against scripted servers and the service itself."""

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from benchmarks.client import words_of
from benchmarks.load import capacity_of, main, parse, run_loop
from benchmarks.loops import ClosedLoop, Loop, OpenLoop
from benchmarks.run import Level, Run, RunFigures, Settings, load_run
from benchmarks.summary import Targets
from tests.benchmarks import figures
from tests.benchmarks.scripted import ScriptedServer, serving
from tests.live import live, scripted

REQUIRED = ["--url", "http://127.0.0.1:1", "--model", "m"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--concurrency", "0"],
        ["--output-tokens", "9:3"],
        ["--output-tokens", "9"],
        ["--workload", "x"],
        ["--rate", "0"],
        ["--rate", "nan"],
        ["--body", "[1]"],
        ["--share", "1.5"],
        ["--quotation", "1.5"],
        ["--find-capacity"],
        ["--rate", "1", "--find-capacity", "--ttft-target-ms", "9"],
        ["--requests-per-level", "0"],
        ["--level-limit", "0"],
        ["--find-capacity", "--ttft-target-ms", "9", "--level-limit", "9"],
        ["--find-capacity", "--ttft-target-ms", "9", "--requests-per-level", "8,8,8"],
        ["--first-rate", "2", "--ttft-target-ms", "9"],
        ["--share", "0.9", "--rate", "1", "--ttft-target-ms", "9"],
        ["--duration", "60"],
        ["--duration", "60", "--rate", "1,2", "--requests-per-level", "8"],
        ["--burstiness", "0.5", "--concurrency", "8"],
        ["--prompt-tokens", "9:9", "--prompts", "mine.jsonl"],
        ["--language", "zh", "--prompts", "mine.jsonl"],
    ],
)
def test_flags_that_make_no_sense_end_with_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(REQUIRED + flags)
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_a_level_has_two_requests_a_client_or_what_arrives_in_its_duration_and_at_least_eight() -> None:
    settings, _ = parse([*REQUIRED, "--concurrency", "1,4,32", "--rate", "0.1,3", "--duration", "20"])
    assert settings.loops() == [ClosedLoop(1), ClosedLoop(4), ClosedLoop(32), OpenLoop(0.1), OpenLoop(3)]
    assert [requests for _, requests in settings.levels()] == [8, 8, 64, 8, 60]


def test_each_level_may_have_requests_of_its_own() -> None:
    settings, _ = parse([*REQUIRED, "--concurrency", "1,4", "--rate", "3", "--requests-per-level", "2,9,5"])
    assert [requests for _, requests in settings.levels()] == [2, 9, 5]
    assert settings.total() == 16 + 3 * settings.warm_up
    settings, _ = parse([*REQUIRED, "--concurrency", "8,8", "--requests-per-level", "8,16"])
    assert settings.levels() == [(ClosedLoop(8), 8), (ClosedLoop(8), 16)]
    settings, _ = parse([*REQUIRED, "--concurrency", "1,4", "--requests-per-level", "3"])
    assert [requests for _, requests in settings.levels()] == [3, 3]


def test_requests_for_some_levels_only_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse([*REQUIRED, "--concurrency", "1,4,8", "--requests-per-level", "2,9"])
    assert caught.value.code == 2
    assert "requests-per-level has 2 numbers for 3 levels" in capsys.readouterr().err


def test_levels_are_the_workloads_own_unless_some_are_asked_for() -> None:
    assert parse([*REQUIRED, "--workload", "ragflow-ingest"])[0].loops() == [ClosedLoop(10)]
    assert parse([*REQUIRED, "--rate", "2", "--burstiness", "0.5"])[0].loops() == [OpenLoop(2, 0.5)]


def test_ranges_take_the_place_of_the_workloads_own() -> None:
    settings, _ = parse([*REQUIRED, "--prompt-tokens", "5:5", "--output-tokens", "3:4"])
    jobs = settings.source().draw(20, seed=0)
    assert {job.prompt_tokens for job in jobs} == {5}
    assert {job.max_tokens for job in jobs} == {3, 4}


def test_lengths_in_a_prompt_file_give_way_to_those_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "max_tokens": 77}')
    flags = [*REQUIRED, "--prompts", str(file)]
    assert parse(flags)[0].source().draw(1, seed=0)[0].max_tokens == 77
    assert parse([*flags, "--output-tokens", "5:5"])[0].source().draw(1, seed=0)[0].max_tokens == 5


def test_a_prompt_file_that_is_not_there_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*REQUIRED, "--prompts", "/nowhere.json"]) == 2
    assert "/nowhere.json" in capsys.readouterr().err


def load(server: ScriptedServer, folder: Path, *flags: str) -> tuple[int, RunFigures, list[dict[str, Any]]]:
    out, lines = folder / "run.json", folder / "records.jsonl"
    files = ["--json", str(out), "--records", str(lines)]
    with serving(server) as url:
        code = main(["--url", url, "--model", "tiny", "--warm-up", "0", *files, *flags])
    return code, load_run(out), [orjson.loads(line) for line in lines.read_bytes().splitlines()]


def test_a_run_without_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = ScriptedServer()
    levels = ["--concurrency", "1,3", "--rate", "500", "--requests-per-level", "6", "--warm-up", "2"]
    flags = ["--output-tokens", "4:9", "--ignore-eos", "--api-key", "secret", "--tpot-target-ms", "60000"]
    code, found, records = load(server, tmp_path, *levels, *flags)
    assert code == 0
    assert [(level.kind, level.load, level.label) for level in found.levels] == [
        ("closed", 1, "1 client"),
        ("closed", 3, "3 clients"),
        ("open", 500, "500/s"),
    ]
    for level in found.levels:
        assert (level.summary.requests, level.summary.errors, level.summary.goodput) == (6, {}, 1.0)
        assert sum(level.tokens_by_second) == pytest.approx(level.summary.output_tokens)
        assert len(level.ttft) == 6
        assert level.server is None
    assert [record["phase"] for record in records] == (["warm-up"] * 2 + ["measured"] * 6) * 3
    for answer in records:
        assert answer["completion_tokens"] == answer["max_tokens"] == len(answer["chunks"])
        assert 0 < answer["chunks"][0] <= answer["chunks"][-1] <= answer["latency"]
    assert len({body["messages"][0]["content"] for body in server.bodies}) == len(server.bodies) == 24
    assert all(body["ignore_eos"] and body["model"] == "tiny" for body in server.bodies)
    assert set(server.authorizations) == {"Bearer secret"}
    assert "secret" not in (tmp_path / "run.json").read_text()
    shown = capsys.readouterr().out
    assert "first token ms" in shown
    assert "What the server counted" not in shown


def test_files_are_written_into_folders_that_were_not_there(tmp_path: Path) -> None:
    files = tmp_path / "runs" / "a.json", tmp_path / "records" / "a.jsonl"
    with serving(ScriptedServer()) as url:
        flags = ["--concurrency", "1", "--json", str(files[0]), "--records", str(files[1])]
        assert main(["--url", url, "--model", "tiny", *flags]) == 0
    assert load_run(files[0]).levels[0].summary.requests == 8
    assert len(files[1].read_text().splitlines()) == 9


@pytest.mark.parametrize("flag", ["--json", "--records"])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = ScriptedServer()
    with serving(server) as url:
        assert main(["--url", url, "--model", "tiny", flag, str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert server.bodies == []


def test_fields_that_not_every_server_knows_are_sent_when_asked_for(tmp_path: Path) -> None:
    server = ScriptedServer()
    once = ["--concurrency", "1", "--requests-per-level", "1"]
    load(server, tmp_path, *once)
    load(server, tmp_path, *once, "--body", '{"top_k": 3, "temperature": 1}')
    assert "ignore_eos" not in server.bodies[0]
    assert (server.bodies[0]["temperature"], server.bodies[1]["temperature"], server.bodies[1]["top_k"]) == (0, 1, 3)
    assert server.authorizations == [None, None]


def test_a_conversation_is_named_in_the_header_that_was_asked_for() -> None:
    server = ScriptedServer(cached_tokens=3)
    with serving(server) as url:
        settings = Settings(url, "tiny", concurrency=(1,), requests_per_level=(8,), workload="conversations", warm_up=0)
        runs = [Run(replace(settings, session_header=header)) for header in (None, "x-session-id")]
        for run in runs:
            run_loop(run.measure_all())
    jobs = [job.conversation for job in settings.source().draw(8, seed=0)]
    assert server.sessions == [None] * 8 + jobs
    assert [run.figures().levels[0].summary.cached_tokens for run in runs] == [24, 24]


def test_failures_are_told_apart_and_end_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = ScriptedServer("500", "cut", "error frame", "no finish", "short", "hang", "500")
    flags = ["--concurrency", "2", "--requests-per-level", "10", "--timeout", "2", "--ignore-eos"]
    code, found, records = load(server, tmp_path, *flags)
    assert code == 1
    assert found.levels[0].summary.errors == {
        "http 500": 2,
        "connection": 1,
        "error frame": 1,
        "protocol": 1,
        "incomplete": 1,
        "timeout": 1,
    }
    assert sum(answer["error"] is None for answer in records) == 3
    first = [answer["chunks"][0] for answer in records if answer["error"] is None]
    assert found.levels[0].ttft == sorted(first)
    assert "2 clients: 2 x http 500: broken" in capsys.readouterr().out


def test_a_refusal_is_told_in_the_server_s_own_words() -> None:
    assert words_of(b'{"error": {"message": "The queue is full.", "code": 429}}') == "The queue is full."
    for other in (b"broken", b"[1]", b'{"error": "x"}', b"\xff", b"1"):
        assert words_of(other) == other.decode(errors="replace")


def test_levels_that_would_take_too_long_are_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found, _ = load(ScriptedServer(), tmp_path, "--concurrency", "1,2,3", "--level-limit", "1e-9")
    assert code == 0
    assert [level.label for level in found.levels] == ["1 client"]
    assert list(found.left_out) == ["2 clients", "3 clients"]
    assert all("at the pace of 1 client" in reason for reason in found.left_out.values())
    assert "3 clients: left out, because it would take" in capsys.readouterr().out


def test_no_level_follows_one_with_failures_where_levels_are_limited(tmp_path: Path) -> None:
    code, found, _ = load(ScriptedServer("500"), tmp_path, "--concurrency", "1,2", "--level-limit", "1000")
    assert code == 1
    assert found.left_out == {"2 clients": "1 of 8 requests failed at 1 client"}


def test_all_levels_are_measured_where_none_is_limited(tmp_path: Path) -> None:
    _, found, _ = load(ScriptedServer("500"), tmp_path, "--concurrency", "1,2")
    assert len(found.levels) == 2
    assert found.left_out == {}


@pytest.mark.parametrize("flags", [["--concurrency", "1,2,3"], ["--find-capacity", "--ttft-target-ms", "1e9"]])
def test_an_interrupted_run_shows_and_writes_the_levels_that_it_measured(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = Run.measure

    async def interrupted(run: Run, loop: Loop, requests: int) -> Level:
        if run.levels:
            raise KeyboardInterrupt
        return await measure(run, loop, requests)

    monkeypatch.setattr(Run, "measure", interrupted)
    code, found, records = load(ScriptedServer(), tmp_path, *flags, "--requests-per-level", "2")
    assert (code, len(found.levels), len(records)) == (130, 1, 2)
    shown = capsys.readouterr()
    assert found.levels[0].label in shown.out
    assert "capacity" not in shown.out
    assert "interrupted" in shown.err


def test_a_failed_warm_up_ends_with_1(tmp_path: Path) -> None:
    flags = ["--concurrency", "1", "--requests-per-level", "1", "--warm-up", "1"]
    code, found, _ = load(ScriptedServer("500"), tmp_path, *flags)
    assert code == 1
    assert found.levels[0].summary.errors == {}


def test_a_server_that_is_not_there_is_a_connection_failure(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    out = tmp_path / "run.json"
    assert main(["--url", f"http://127.0.0.1:{port}/v1", "--model", "m", "--json", str(out)]) == 1
    assert [level.summary.errors for level in load_run(out).levels] == [{"connection": n} for n in (8, 16, 64)]


def test_the_capacity_of_a_server_that_answers_all_but_never_in_time_is_not_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--find-capacity", "--first-rate", "1000", "--ttft-target-ms", "1e-9", "--requests-per-level", "1"]
    code, found, records = load(ScriptedServer(), tmp_path, *flags)
    assert code == 1
    assert found.capacity is None
    assert [level.load for level in found.levels] == pytest.approx([1000 / 2**probe for probe in range(16)], abs=1e-3)
    assert not any(record["error"] for record in records)
    assert "capacity: none was found, with 95% of requests" in capsys.readouterr().out


def test_a_search_that_ended_says_that_requests_were_alone() -> None:
    found = figures.run(replace(figures.level(OpenLoop(0.25)), seconds=200.0), targets=Targets(ttft=1.0))
    assert capacity_of(found, 0.95) == (
        "none was found, with 95% of requests within the targets: at 0.25/s, where requests are alone, 25% are"
    )


def test_a_server_that_holds_at_every_rate_tried_has_no_capacity_as_the_highest_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--find-capacity", "--first-rate", "100", "--ttft-target-ms", "1e9", "--requests-per-level", "1"]
    code, found, _ = load(ScriptedServer(), tmp_path, *flags)
    assert (code, found.capacity, len(found.levels)) == (1, None, 16)
    assert "capacity: none was found: even at 3.2768e+06/s" in capsys.readouterr().out


def test_the_services_own_figures_are_those_of_the_measured_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.json"
    flags = ["--concurrency", "4", "--requests-per-level", "12", "--warm-up", "5", "--ignore-eos", "--json", str(out)]
    with live(scripted(), max_batch_size=2) as server:
        code = main(["--url", server.url, "--model", server.get("/v1/models").json()["data"][0]["id"], *flags])
    assert code == 0
    found = load_run(out)
    assert found.server["device"] == "scripted"
    (level,) = found.levels
    assert level.server is not None
    assert level.server.batch_size is not None
    assert level.server.batch_size * level.server.batches == pytest.approx(12)
    assert level.server.batch_size <= 2
    assert level.server.padding is not None
    assert 0 <= level.server.padding < 1
    assert level.server.gauges
    assert sum(level.tokens_by_second) == pytest.approx(level.summary.output_tokens)
    assert "What the server counted" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{}", '{"format": "other"}'])
def test_a_file_that_is_no_run_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json is not a run that benchmarks\.load wrote"):
        load_run(file)
