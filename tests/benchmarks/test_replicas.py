"""What `benchmarks.replicas` says of its measurements, and the files that it starts HAProxy and Ray with."""

from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import orjson
import pytest

from benchmarks.load import run_loop
from benchmarks.ray_serve import configuration
from benchmarks.replicas import COLUMNS, Comparison, cells, parse
from tests.benchmarks.scripted import ScriptedServer, serving

SHORT = ["--clients", "2", "--rounds", "2", "--prompt-tokens", "1700:1750", "--output-tokens", "2:3"]


async def measure(comparison: Comparison, servers: list[SplitResult]) -> None:
    for number, server in enumerate(servers, start=1):
        await comparison.chats(f"server {number}", server, number)


def test_each_row_is_compared_with_the_first_of_its_load_and_written_at_once(tmp_path: Path) -> None:
    comparison = parse([*SHORT, "--out", str(tmp_path)])
    with serving(ScriptedServer(cached_tokens=1)) as url:
        run_loop(measure(comparison, [urlsplit(url)] * 2))
    one, two = comparison.rows
    assert (one.clients, two.clients) == (2, 4)
    assert one.figures.summary.requests == 4
    assert two.figures.summary.requests == 8
    assert one.ratio == 1
    pace = one.figures.summary.requests_per_second
    assert two.ratio == pytest.approx(two.figures.summary.requests_per_second / pace)
    assert len(orjson.loads((tmp_path / "replicas.json").read_bytes())) == 2
    shown = dict(zip(COLUMNS, cells(one), strict=True))
    assert shown["prompts\nreused"] == "14%"  # one of seven tokens
    assert shown["ratio"] == "1.00"


def test_there_is_no_ratio_where_answers_are_missing(tmp_path: Path) -> None:
    comparison = parse([*SHORT, "--out", str(tmp_path)])
    good, bad = ScriptedServer(), ScriptedServer(*["500"] * 100)
    with serving(good) as url, serving(bad) as broken:
        run_loop(measure(comparison, [urlsplit(url), urlsplit(broken)]))
    assert [row.ratio for row in comparison.rows] == [1, None]
    assert dict(zip(COLUMNS, cells(comparison.rows[1]), strict=True))["ratio"] == "-"


@pytest.mark.parametrize("flags", [["--parts", "nginx"], ["--replicas", "1"]])
def test_flags_that_make_no_sense_end_with_2(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(flags)
    assert ended.value.code == 2


@pytest.mark.parametrize(("device", "gpus"), [("cpu", 0), ("auto", 1)])
def test_replicas_of_ray_have_the_services_settings_and_a_gpu_each(device: str, gpus: int) -> None:
    variables = {"MICROBATCH_DEVICE": device, "MICROBATCH_NAME": "m"}
    read = configuration(80, 2, variables)
    [deployment] = next(one["deployments"] for one in read["applications"] if one["name"] == "microbatch")
    assert deployment["num_replicas"] == 2
    assert "autoscaling_config" not in deployment
    assert deployment["ray_actor_options"]["num_gpus"] == gpus
    assert deployment["ray_actor_options"]["runtime_env"]["env_vars"] == variables
    assert read["http_options"]["host"] == "127.0.0.1"
