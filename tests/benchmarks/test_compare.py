"""Laws of the comparison: what is refused, and a real one of two servers on a tiny model."""

import asyncio
import os
import re
import signal
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import models
from benchmarks.client import Record
from benchmarks.compare import check_same, chosen, main
from benchmarks.contenders import Contender, ContenderError, engines_in, serving
from benchmarks.loops import ClosedLoop
from benchmarks.models import Model
from benchmarks.run import load_run
from server.settings import parse
from tests.benchmarks import scripted
from tests.benchmarks.figures import level, run
from tests.benchmarks.scripted import ScriptedServer
from tests.benchmarks.test_serial_server import save_model, save_tokenizer

SHORT = ["--concurrency", "2", "--requests-per-level", "4", "--prompt-tokens", "5:9", "--output-tokens", "3:6"]


def test_equal_runs_may_be_compared() -> None:
    check_same({name: run(level(ClosedLoop(2))) for name in "ab"})


def test_one_run_is_no_comparison() -> None:
    with pytest.raises(ValueError, match="fewer than two"):
        check_same({"a": run(level(ClosedLoop(2)))})


@pytest.mark.parametrize("other", [[level(ClosedLoop(2), jobs="other")], []])
def test_runs_of_different_work_are_not_compared(other: list[object]) -> None:
    with pytest.raises(ValueError, match="b and a were given different work"):
        check_same({"a": run(level(ClosedLoop(2))), "b": run(*other)})  # type: ignore[arg-type]


def test_a_run_may_lack_levels_of_the_first_one_but_not_the_other_way_round() -> None:
    one, more = level(ClosedLoop(1)), level(ClosedLoop(8), jobs="more")
    check_same({"a": run(one, more), "b": run(more), "c": run(one)})
    with pytest.raises(ValueError, match="b and a were given different work"):
        check_same({"a": run(one), "b": run(one, more)})


def counting(record: Record, prompt_tokens: int) -> Record:
    return replace(record, prompt_tokens=prompt_tokens)


def test_servers_that_count_other_tokens_in_a_prompt_are_not_compared() -> None:
    one = level(ClosedLoop(2))
    other = replace(one, records=[*one.records[:3], counting(one.records[3], 8)])
    with pytest.raises(ValueError, match="b counts 8 tokens in a prompt where a counts 7"):
        check_same({"a": run(one), "b": run(other)})
    failed = replace(one, records=[*one.records[:3], replace(counting(one.records[3], 0), error="timeout")])
    check_same({"a": run(one), "b": run(failed)})


@pytest.mark.parametrize(
    ("shown", "engines"),
    [
        ("  --engine auto|generate|packed     which (auto)", ["generate", "packed"]),
        ("  --engine auto|generate", ["generate"]),
        ("  --engineer a|b", []),
        ("  --port N", []),
    ],
)
def test_engines_are_those_that_the_service_names(shown: str, engines: list[str]) -> None:
    assert engines_in(shown) == engines


def test_the_service_s_help_names_its_engines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert engines_in(capsys.readouterr().out) == ["packed", "generate"]


def test_a_server_that_ends_before_it_is_ready_is_told_with_its_log(tmp_path: Path) -> None:
    broken = Contender("broken", "m", (sys.executable, "-c", "print('no weights'); raise SystemExit(3)"))

    async def start() -> None:
        async with serving(broken, tmp_path / "log"):
            raise AssertionError("it never was ready")

    with pytest.raises(ContenderError, match=r"broken ended with 3 before it was ready; see .*log"):
        asyncio.run(start())
    assert (tmp_path / "log").read_text() == "no weights\n"


def test_a_comparison_that_is_ended_ends_the_server_it_started(tmp_path: Path) -> None:
    """The server here never answers; it says that it runs by its line in the log."""
    log = tmp_path / "log"
    idle = "import signal; print('running', flush=True); signal.pause()"
    silent = Contender("silent", "m", (sys.executable, "-c", idle, str(tmp_path)))

    async def start() -> None:
        async with serving(silent, log):
            raise AssertionError("it never was ready")

    async def end_it() -> None:
        while not log.exists() or log.read_text() != "running\n":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    async def both() -> None:
        starting = asyncio.create_task(start())
        await end_it()
        await starting

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(both())
    assert not any(str(tmp_path) in command for command in commands())


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that run already need no folder."""
    monkeypatch.setattr("benchmarks.compare.take_model", lambda told: fake_model(told))


def fake_model(told: dict[str, object]) -> Model:
    for name in ("model", "name", "load_format", "device", "dtype", "server_args", "cache_dir"):
        told.pop(name)
    return Model("nowhere", "tiny")


def compare_external(out: Path, *servers: ScriptedServer, flags: tuple[str, ...] = ()) -> int:
    with ExitStack() as stack:
        urls = [stack.enter_context(scripted.serving(server)) for server in servers]
        named = [part for number, url in enumerate(urls) for part in ("--external", f"server{number}={url}")]
        return main(["--contenders", "", *named, *SHORT, "--out", str(out), *flags])


@pytest.mark.usefixtures("no_model")
def test_servers_that_run_already_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = ScriptedServer(), ScriptedServer()
    assert compare_external(tmp_path, one, other) == 0
    assert sorted(map(str, one.bodies)) == sorted(map(str, other.bodies))
    assert all(body["ignore_eos"] for body in one.bodies)
    shown = capsys.readouterr().out
    assert re.search(r"server0 +0 .* 1\.00 ", shown)
    assert re.search(r"server1 +0 .* \d+\.\d\d ", shown)


@pytest.mark.usefixtures("no_model")
def test_a_server_may_be_spared_levels_and_is_asked_the_same_at_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = ScriptedServer(), ScriptedServer()
    flags = ("--concurrency", "1,3,2", "--requests-per-level", "2,3,4", "--levels", "server1=3,2")
    assert compare_external(tmp_path, one, other, flags=flags) == 0
    assert sorted(map(str, one.bodies[3:])) == sorted(map(str, other.bodies))
    first, second = (load_run(tmp_path / f"server{number}.json").levels for number in (0, 1))
    assert [level.summary.requests for level in first] == [2, 3, 4]
    assert [level.jobs for level in first[1:]] == [level.jobs for level in second]
    alone, *shared = re.split(r"\d clients? *\n", capsys.readouterr().out)[1:]
    assert "server1" not in alone
    assert all(re.search(r"server1 +0 .* \d+\.\d\d ", shown) for shown in shared)


@pytest.mark.usefixtures("no_model")
def test_a_comparison_that_is_ended_shows_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third server is started here; it never is ready, and ends the comparison as `timeout` does."""
    ends = f"import os, signal; os.kill({os.getpid()}, signal.SIGTERM); signal.pause()"
    silent = Contender("silent", "tiny", (sys.executable, "-c", ends))
    monkeypatch.setattr("benchmarks.compare.chosen", lambda *told: [*chosen(*told), silent])
    assert compare_external(tmp_path, ScriptedServer(), ScriptedServer()) == 1
    found = capsys.readouterr()
    assert re.search(r"server1 +0 .* \d+\.\d\d ", found.out)
    assert "ended before all was measured" in found.err


@pytest.mark.usefixtures("no_model")
def test_another_model_is_refused_before_anything_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = ScriptedServer(), ScriptedServer(model="large")
    assert compare_external(tmp_path, one, other) == 2
    assert "server1 serves large, not tiny: different models are not compared" in capsys.readouterr().err
    assert one.bodies == []


@pytest.mark.usefixtures("no_model")
def test_another_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_external(tmp_path, ScriptedServer(), ScriptedServer(prompt_tokens=8)) == 2
    found = capsys.readouterr()
    assert "another model or chat template" in found.err
    assert "ratio" not in found.out


@pytest.mark.usefixtures("no_model")
def test_a_server_with_incomplete_answers_has_no_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_external(tmp_path, ScriptedServer(), ScriptedServer("", "short")) == 1
    shown = capsys.readouterr().out
    assert re.search(r"server1 +1 .* - ", shown)
    assert "server1, 2 clients: 1 x incomplete" in shown


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--contenders", "microbatch,nobody"], "there is no contender nobody, only microbatch, serial"),
        (["--contenders", "serial"], "two contenders"),
        (["--contenders", "serial,serial"], "two contenders"),
        (["--external", "a=nowhere"], "is not the URL"),
        (["--prompts", "/nowhere.json"], "/nowhere.json"),
        (
            ["--concurrency", "1,2", "--levels", "microbatch=1"],
            "levels of microbatch: name a contender behind the first",
        ),
        (["--concurrency", "1,2", "--levels", "serial=3"], "levels of serial: name"),
        (["--concurrency", "2,2"], "each level once"),
        (["--duration", "60"], "--duration has no effect without --rate"),
        (["--levels", "serial"], "invalid named_counts value: 'serial'"),
        (["--concurrency", "1,2,3", "--requests-per-level", "4,5"], "requests-per-level has 2 numbers for 3 levels"),
    ],
)
def test_flags_that_make_no_comparison_end_with_2(
    flags: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*flags, "--out", str(tmp_path)])
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err


def test_random_weights_need_a_folder() -> None:
    with pytest.raises(models.ModelError, match=r"config\.json"):
        models.folder_of(None, "dummy", "auto", Path("nowhere"))


def test_this_service_and_the_serial_server_are_compared_on_random_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "shape"
    save_tokenizer(folder)
    save_model(folder)
    (folder / "model.safetensors").unlink()
    place = ["--device", "cpu", "--dtype", "float32", "--cache-dir", str(tmp_path), "--out", str(tmp_path)]
    model = ["--model", str(folder), "--load-format", "dummy", "--server-args", "--token-budget 4096"]
    code = main([*model, *place, *SHORT, "--contenders", "microbatch,serial"])
    assert code == 0, "".join(path.read_text() for path in tmp_path.glob("*.log"))
    ours, serial = (load_run(tmp_path / f"{name}.json") for name in ("microbatch", "serial"))
    assert [level.jobs for level in ours.levels] == [level.jobs for level in serial.levels]
    assert [level.summary.prompt_tokens for level in ours.levels] == [
        level.summary.prompt_tokens for level in serial.levels
    ]
    assert ours.server
    assert not serial.server
    assert (tmp_path / "random-shape-float32" / "model.safetensors").exists()
    assert re.search(r"microbatch +0 .* 1\.00 ", capsys.readouterr().out)
    assert not any(str(folder.parent) in command for command in commands())


def commands() -> list[str]:
    """The command lines of all processes but this one."""
    others = [path for path in Path("/proc").glob("[0-9]*") if path.name != str(os.getpid())]
    return [found for path in others if (found := command(path))]


def command(process: Path) -> str:
    try:
        return (process / "cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
