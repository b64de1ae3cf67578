"""Laws of the page's "Ask many": questions asked together share a batch, and the timeline says so."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from batching.engine import Steps
from batching.events import MemoryHeld, Outcome, RowEnded, StateChanged
from batching.stream import Row
from batching.types import Request
from tests.fakes import ScriptedEngine
from tests.live import END, Live, live, scripted, tokens_of
from tests.page.browser import Browser
from tests.server.test_app import babble

pytestmark = pytest.mark.browser


def numbered(request: Request, position: int) -> int:
    """Each row says its number, and as often as it says: 1, 22, 333."""
    number = int(request.id.rpartition(".")[2]) if "." in request.id else 0
    text = tokens_of(f"row {number}" + "!" * number)
    return text[position] if position < len(text) else END


class JoiningEngine(ScriptedEngine):
    """Lets rows join the batch that runs. Every step has to be released."""

    def run(self, rows: Sequence[Row], steps: Steps) -> None:
        self.batches.append([row.request.id for row in rows])
        running = dict.fromkeys(rows, 0)
        while running:
            assert self._gate is not None
            self._gate.acquire()
            over = steps.emit(list(running), [self._script(row.request, at) for row, at in running.items()])
            running = {row: at + 1 for (row, at), ended in zip(running.items(), over, strict=True) if not ended}
            running |= dict.fromkeys(steps.admit(), 0)


def ask(page: Browser, service: Live) -> None:
    page.open(service.url, "many")
    page.id("ask").click()


def column(page: Browser, number: int) -> list[str]:
    return page.texts(f"#times tbody td:nth-child({number})")


def test_twelve_questions_at_once_share_one_batch(page: Browser) -> None:
    with live(scripted(numbered, stepped=True)) as service:
        ask(page, service)
        service.wait_running(12)
        page.wait(lambda: page.texts(".mark") == ["batch 1: 12"], "the batch is in the timeline")
        assert len(page.all(".lane .read")) == 12
        assert page.all(".lane .write") == []
        service.engine.release(3)
        page.wait(lambda: page.texts(".card .said") == ["row"] * 12, "each card has its first letters")
        page.wait(lambda: len(page.all(".lane .write")) == 12, "each answer is being written")
        page.all("#shown summary")[0].click()
        assert column(page, 4) == column(page, 4)[:1] * 12
        service.engine.release(100)
        page.wait(lambda: "12 of 12 answered, one batch" in page.text("#summary"), "all are complete")
        [batch] = service.engine.batches
        assert len(batch) == 12
        answers = [f"row {number}{'!' * number}" for number in range(12)]
        page.wait(lambda: page.texts(".card .said") == answers, "each card has its own answer")
        assert column(page, 6) == ["1 (12 rows)"] * 12
        assert column(page, 5) == [str(len(answer) + 1) for answer in answers]
        assert all(" · batch of 12" in foot for foot in page.texts(".card .foot"))
        assert page.axe() == []


def test_the_timeline_shows_the_times_that_the_server_measured(page: Browser) -> None:
    with live(scripted(numbered, stepped=True), max_batch_size=2) as service:
        page.open(service.url, "many")
        page.id("questions").clear()
        page.id("questions").send_keys("a\nb\nc\n\n")
        assert page.id("ask").text == "Ask 3 questions at once"
        page.id("ask").click()
        service.wait_running(2)
        service.wait_queued(1)
        page.wait(lambda: page.texts(".mark") == ["batch 1: 2"], "the first batch is in the timeline")
        page.wait(lambda: len(page.all(".lane .read")) == 2, "two are read")
        service.engine.release(100)
        page.wait(lambda: "3 of 3 answered, 2 batches" in page.text("#summary"), "all are complete")
        page.all("#shown summary")[0].click()
        assert column(page, 6) == ["1 (2 rows)", "1 (2 rows)", "2 (1 row)"]
        for shown, measured in zip(column(page, 3), [row.ttft for row in by_id(service)], strict=True):
            assert measured is not None
            assert milliseconds(shown) == pytest.approx(measured * 1000, abs=11)
        for shown, row in zip(column(page, 4), by_id(service), strict=True):
            assert milliseconds(shown) == pytest.approx(row.duration * 1000, abs=11)


def by_id(service: Live) -> list[RowEnded]:
    return sorted(service.ended(), key=lambda row: row.id)


def milliseconds(shown: str) -> float:
    number, unit = shown.split()
    return float(number) * {"ms": 1, "s": 1000}[unit]


def test_rows_that_join_a_running_batch_are_marked(page: Browser) -> None:
    engine = JoiningEngine(numbered, stepped=True, info=replace(scripted().info, joins=True))
    with live(engine, max_batch_size=3) as service:
        page.open(service.url, "many")
        page.js("document.getElementById('questions').value = 'a\\nb\\nc\\nd'")
        page.id("ask").click()
        page.wait(lambda: page.texts(".mark") == ["batch 1: 3"], "the first three are in the timeline")
        engine.release(len("row 0") + 1)
        page.wait(lambda: " ".join(page.texts(".mark")).strip() == "batch 1: 3 +1", "the fourth has joined them")
        engine.release(100)
        page.wait(lambda: "4 of 4 answered, one batch" in page.text("#summary"), "all are complete")
        page.all("#shown summary")[0].click()
        assert column(page, 6) == ["1 (3 rows)"] * 4
        assert len(engine.batches) == 1


DRAW = """
const [joined, done] = arguments;
document.getElementById("shown").hidden = false;
const rows = joined.map((at, place) => ({
    place, question: "?", batch: 7, at, queued: 0, started: at, first: at + 1, ended: at + 2,
}));
import("/page/timeline.js").then(({ drawLanes }) => {
    drawLanes(document.getElementById("lanes"), rows, 0, 100);
    const marks = [...document.querySelectorAll(".mark")];
    done(marks.map((each) => [each.innerText, each.offsetLeft, each.offsetLeft + each.offsetWidth]));
}, done);
"""


def test_rows_that_join_soon_after_others_share_a_label(page: Browser) -> None:
    with live() as service:
        page.open(service.url, "many")
        marks = page.driver.execute_async_script(DRAW, [0, 0, 0, 0.5, 50, 51, 51, 90])
        assert [text for text, _, _ in marks] == ["batch 7: 3 +1", "", "+3", "", "+1"]
        labels = [(left, right) for text, left, right in marks if text]
        assert all(right <= left for (_, right), (left, _) in pairwise(labels))


def test_stop_cancels_all_of_them(page: Browser) -> None:
    with live(scripted(babble, stepped=True)) as service:
        ask(page, service)
        service.wait_running(12)
        service.engine.release(2)
        page.wait(lambda: page.texts(".card .said") == ["xx"] * 12, "each card has two letters")
        page.id("ask-stop").click()
        assert {row.outcome for row in service.wait_ended(12)} == {Outcome.CANCELLED}
        page.wait(lambda: page.id("ask").is_enabled(), "one may ask again")
        cards = ".card .foot"
        page.wait(lambda: all(foot.endswith("cancelled") for foot in page.texts(cards)), "each card says that it ended")
        page.wait(lambda: page.text("#summary").startswith("0 of 12 answered, one batch"), "none was answered")


def test_no_questions_or_too_many_are_told_before_they_are_sent(page: Browser) -> None:
    with live() as service:
        page.open(service.url, "many")
        for lines in ("\n", "a\n" * 65):
            page.js("document.getElementById('questions').value = arguments[0]", lines)
            page.id("ask").click()
            assert "1 to 64" in page.text("#many-note")
        assert all(isinstance(event, MemoryHeld | StateChanged) for event in service.events)


REFRESH = "import('/page/status.js').then(({ refresh }) => refresh()).then(arguments[0])"


def test_a_refusal_is_told_and_stays(page: Browser) -> None:
    with live(queue_size=11) as service:
        ask(page, service)
        page.wait(lambda: "exceeds the queue limits" in page.text("#many-note"), "the refusal is shown")
        page.driver.execute_async_script(REFRESH)
        assert "exceeds the queue limits" in page.text("#many-note")
        assert page.id("many-note").aria_role == "alert"
        assert any("400" in complaint for complaint in page.complaints())


def test_a_round_that_is_refused_does_not_show_the_times_of_the_one_before(page: Browser) -> None:
    with live(scripted(numbered), max_body_mib=1) as service:
        ask(page, service)
        page.wait(lambda: "12 of 12 answered" in page.text("#summary"), "all are complete")
        page.js("document.getElementById('document').value = 'x'.repeat(2 ** 20)")
        page.js("document.getElementById('questions').value = 'One?'")
        page.id("ask").click()
        page.wait(lambda: page.id("many-note").is_displayed(), "it is told")
        assert "No answer" in page.text(".card .foot")
        assert page.text("#summary") == ""
        assert page.all("#lanes .lane, #times td") == []
        assert any("413" in complaint for complaint in page.complaints())
