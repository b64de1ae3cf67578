"""The load tool's report, as a browser shows it."""

from pathlib import Path

import pytest

from benchmarks.client import Record
from benchmarks.loops import ClosedLoop
from benchmarks.report import page as report
from benchmarks.run import Level
from tests.benchmarks.figures import SERVER, run
from tests.page.browser import Browser


@pytest.mark.browser
def test_the_tables_fit_a_laptop_s_screen_however_long_answers_took(page: Browser, tmp_path: Path) -> None:
    records = [
        Record(number, 200, 0.0, 0.0, [100.0 + number, 3000.0 + number], 9000.0 + number, 9, 200, "length")
        for number in range(20)
    ]
    level = Level(ClosedLoop(1000), "same", seconds=9999.0, cpu_share=1.0, records=records, server=SERVER)
    (tmp_path / "report.html").write_text(report([run(level, label="smollm2-135m-instruct").figures()], []))
    page.look((1440, 900), "light")
    page.driver.get((tmp_path / "report.html").as_uri())
    widths = page.js("return [...document.querySelectorAll('table')].map((each) => each.getBoundingClientRect().right)")
    assert len(widths) == 3
    assert max(widths) <= 1440
    page.asked()  # the file itself
