"""Laws of the report: what is on the page, and that its charts show the runs' figures."""

import base64
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest

from benchmarks.batching_sweep import flags_of, tables
from benchmarks.charts import charts, latency_against_throughput, panels, queue_over_time, setting_chart
from benchmarks.loops import ClosedLoop
from benchmarks.report import main, page
from server.settings import parse
from tests.benchmarks.figures import level, run, run_figures

PNG = b"\x89PNG\r\n\x1a\n"
ALL_CHARTS = ["latency-throughput", "first-token", "tokens-over-time", "batch-over-time", "queue-over-time"]


def save(folder: Path, *labels: str) -> list[str]:
    paths = [folder / f"run{number}.json" for number in range(len(labels))]
    for path, label in zip(paths, labels, strict=True):
        path.write_bytes(orjson.dumps(run_figures(label)))
    return [str(path) for path in paths]


def test_a_report_is_one_page_that_needs_nothing_else_and_its_pictures(tmp_path: Path) -> None:
    out = tmp_path / "report"
    assert main([*save(tmp_path, "before", "after"), "--out", str(out)]) == 0
    html = (out / "report.html").read_text()
    embedded = [base64.b64decode(picture) for picture in re.findall(r"data:image/png;base64,([^\"]+)", html)]
    assert embedded == [(out / f"{name}.png").read_bytes() for name in ALL_CHARTS]
    assert all(picture.startswith(PNG) for picture in embedded)
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert "secret" not in html


def test_the_page_says_what_the_figures_depend_on() -> None:
    run = run_figures("mine")
    html = page([run], [])
    for fact in (run.started, run.versions["python"], "short", "first token 2000 ms", str(run.machine["processor"])):
        assert fact in html
    assert "What the server counted" in html
    assert "What the server counted" not in page([run_figures("other", server=None)], [])


def test_labels_are_text_and_not_markup() -> None:
    assert "<b>mine" not in page([run_figures("<b>mine")], [])


def test_the_page_warns_of_unequal_work_and_of_failures() -> None:
    html = page([run_figures("a"), run_figures("b", jobs="other")], [])
    assert "had different work at 2 clients" in html
    assert "had different work" not in page([run_figures("a"), run_figures("b")], [])


def test_a_level_that_a_run_has_twice_is_no_unequal_work() -> None:
    repeated = run(level(ClosedLoop(2), jobs="first"), level(ClosedLoop(2), jobs="second")).figures()
    assert "had different work" not in page([repeated], [])
    assert "had different work at 2 clients" in page([repeated, run_figures("other")], [])


def test_the_page_says_in_words_what_failed_and_what_was_left_out() -> None:
    run = replace(run_figures("a", error="http 429", detail="The queue is full."), left_out={"9 clients": "it is late"})
    html = page([run], [])
    assert "a: 4 of 4 requests failed at 2 clients (http 429). One was told: The queue is full." in html
    assert "a: 9 clients left out, because it is late." in html
    silent = page([run_figures("a", error="timeout")], [])
    assert "4 of 4 requests failed at 2 clients (timeout)." in silent
    assert "One was told" not in silent


def test_runs_of_one_name_are_told_apart_by_their_files(tmp_path: Path) -> None:
    assert main([*save(tmp_path, "same", "same"), "--out", str(tmp_path)]) == 0
    html = (tmp_path / "report.html").read_text()
    assert "same (run0)" in html
    assert "same (run1)" in html


def test_servers_without_metrics_have_no_charts_of_them() -> None:
    assert [chart.name for chart in charts([run_figures("a")])] == ALL_CHARTS
    assert [chart.name for chart in charts([run_figures("a", server=None)])] == ALL_CHARTS[:3]


def test_a_level_whose_requests_all_failed_can_be_drawn() -> None:
    failed = run_figures("a", error="connection")
    assert [chart.name for chart in charts([failed, run_figures("b")])] == ALL_CHARTS


def test_latency_is_drawn_against_throughput() -> None:
    run = run_figures("a")
    first, whole = latency_against_throughput([run]).axes
    for axes, name in ((first, "ttft"), (whole, "latency")):
        assert (axes.get_xlabel(), axes.get_ylabel()[-3:]) == ("output tokens/s", ", s")
        for each, line in zip(run.levels, axes.lines[::2], strict=True):
            assert np.asarray(line.get_xdata()).tolist() == [each.summary.output_tokens_per_second]
            assert np.asarray(line.get_ydata()).tolist() == [getattr(each.summary, name)["p50"]]


def test_each_level_has_a_panel_with_a_line_for_each_run() -> None:
    figure = panels([run_figures("a"), run_figures("b")], queue_over_time, "seconds", "requests waiting")
    assert [axes.get_title() for axes in figure.axes] == ["2 clients", "0.5/s"]
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == ["a", "b"]
        assert [np.asarray(line.get_ydata()).tolist() for line in axes.lines] == [[1, 4], [1, 4]]


def test_a_run_without_metrics_has_no_line_in_their_charts() -> None:
    runs = [run_figures("a"), run_figures("b", server=None)]
    for axes in panels(runs, queue_over_time, "seconds", "requests waiting").axes:
        assert [line.get_label() for line in axes.lines] == ["a"]


def test_a_sweep_shows_every_value_at_every_load() -> None:
    slow = run_figures("window 0")
    fast = replace(slow, label="window 5", levels=[replace(level, seconds=1.0) for level in slow.levels])
    assert [(found.title, found.row_count) for found in tables([slow, fast])] == [("2 clients", 2), ("0.5/s", 2)]
    throughput = setting_chart("batch-window-ms", ("0", "5"), [slow, fast]).axes[0]
    assert [line.get_label() for line in throughput.lines] == ["2 clients", "0.5/s"]
    assert np.asarray(throughput.lines[0].get_xdata()).tolist() == ["0", "5"]


@pytest.mark.parametrize("text", [None, "{}"])
def test_what_is_no_run_ends_with_2(tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.json"
    if text is not None:
        file.write_text(text)
    assert main([str(file), "--out", str(tmp_path)]) == 2
    assert "other.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "value", "found"),
    [
        ("max-batch-size", "8", 8),
        ("speculation", "off", "off"),
        ("batch-invariant", "true", True),
        ("batch-invariant", "false", False),
    ],
)
def test_any_setting_can_be_varied_also_a_switch(setting: str, value: str, found: object) -> None:
    settings = parse(list(flags_of(setting, value)))
    assert getattr(settings, setting.replace("-", "_")) == found
