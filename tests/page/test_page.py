"""Laws of the page around its parts: state, key, restart, live charts, and that everyone can use it."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from batching.events import State
from server.model.defaults import Defaults
from server.version import VERSION
from tests.live import Live, live, scripted
from tests.page.browser import DESK, PHONE, Browser, half_said
from tests.server.test_app import babble

pytestmark = pytest.mark.browser

NONE = "\u2013"
PARTS = ("chat", "many", "live", "state")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as executor:
        yield executor


def port(service: Live) -> int:
    return int(service.url.rpartition(":")[2])


def value(page: Browser, title: str) -> list[str]:
    """The numbers of the chart with this title."""
    script = """
    const chart = [...document.querySelectorAll(".chart")].find((each) => each.innerText.startsWith(arguments[0]));
    return [...chart.querySelectorAll(".values b")].map((each) => each.innerText);
    """
    found: list[str] = page.js(script, title)
    return found


def labels(page: Browser) -> list[str]:
    """What each chart says to those who do not see it."""
    script = "return [...document.querySelectorAll('.chart:not([hidden]) .plot')].map((each) => each.ariaLabel)"
    found: list[str] = page.js(script)
    return found


# State


def test_it_says_how_far_loading_is_and_then_takes_questions(page: Browser) -> None:
    with live(ready=False) as service:
        page.open(service.url, "state")
        assert page.state() == "starting"
        assert "The model is loading" in page.text("#words")
        assert page.text("#loading-step") == "Loading weights: 3 of 12"
        assert page.js("return document.getElementById('progress').position") == 0.25
        assert page.axe() == []
        page.go("chat")
        assert "The model is loading" in page.text("#chat-note")
        assert not page.id("send").is_enabled()
        service.loader.may_load.set()
        page.wait(lambda: page.state() == "ready", "it is ready")
        assert page.id("send").is_enabled()
        assert page.text("#chat-note") == ""
        page.go("state")
        assert not page.id("loading").is_displayed()


def test_the_state_is_read_out_when_it_changes_and_not_again_and_again(page: Browser) -> None:
    with live() as service:
        page.open(service.url, "state")
        page.js(
            "window.said = 0; new MutationObserver(() => said++).observe(document.getElementById('words'), "
            "{ childList: true, characterData: true, subtree: true })"
        )
        refresh = "import('/page/status.js').then(({ refresh }) => refresh()).then(arguments[0])"
        page.driver.execute_async_script(refresh)
        assert page.js("return said") == 0
        assert page.text("#words") == "Ready."


def test_it_says_what_runs_and_within_which_limits(page: Browser) -> None:
    defaults = Defaults(temperature=0.6, top_k=20)
    with live(
        default_max_tokens=99, queue_size=77, request_timeout_s=600, name=("one", "two"), defaults=defaults
    ) as service:
        page.open(service.url, "state")
        runs, limits = page.text("#runs"), page.text("#limits")
        for fact in ("one, two", "scripted", "none", "generate: padded batches", VERSION, f"torch {version('torch')}"):
            assert fact in runs
        for fact in (
            "4,096 tokens for prompt and answer",
            "99 tokens if a request",
            "at most 77 requests",
            "10 minutes",
            "for more requests",
        ):
            assert fact in limits
        assert page.texts("#sampling > div") == ["Temperature\n0.6", "Top-p\n1", "Top-k\n20"]
        assert page.js("return document.getElementById('temperature').placeholder") == "0.6"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(170, "170 seconds"), (300, "5 minutes"), (9000, "150 minutes")],
)
def test_a_time_limit_is_not_rounded(seconds: int, words: str, page: Browser) -> None:
    with live(request_timeout_s=seconds, drain_timeout_s=seconds) as service:
        page.open(service.url, "state")
        limits = page.text("#limits")
    assert f"{words} from when a request is queued" in limits
    assert f"may take {words} more" in limits


def test_it_names_no_batch_window_where_requests_join_at_any_time(page: Browser) -> None:
    engine = scripted()
    engine.info = replace(engine.info, joins=True)
    with live(engine) as service:
        page.open(service.url, "state")
        assert "join a running batch" in page.text("#runs")
        assert "Batch window" not in page.text("#limits")


def test_it_says_that_the_service_stops_and_that_it_is_gone(page: Browser) -> None:
    with live(scripted(babble, stepped=True)) as service:
        page.open(service.url)
        page.say("Hi")
        service.wait_running()
        service.engine.release()
        page.wait(lambda: page.text(".said") == "x", "it answers")
        page.go("live")
        page.wait(lambda: value(page, "Requests") == ["1", "0"], "the row is in the chart")
        service.drain()
        page.wait(lambda: page.state() == "draining", "it drains")
        page.go("state")
        assert "Accepted requests are finished" in page.text("#words")
    page.wait(lambda: page.state() == "unreachable", "it is gone")
    assert "Server unreachable, retrying" in page.text("#words")


def test_the_live_part_says_that_too_many_watch_and_goes_on_when_there_is_a_place(
    page: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    with live() as service:
        with monkeypatch.context() as full:
            full.setattr("server.observe.live.MOST_LISTENERS", 0)
            page.open(service.url, "live")
            page.wait(lambda: "close another tab" in page.text("#live-note"), "it says why nothing moves")
        page.wait(lambda: not page.id("live-note").is_displayed(), "its events come")
        assert all("429" in complaint for complaint in page.complaints())


def test_it_survives_a_restart_of_the_server(page: Browser) -> None:
    with half_said(page) as service:
        service.drain()
        page.go("live")
        service.wait_state(State.DRAINING)
    page.answered()
    page.wait(lambda: page.state() == "unreachable", "the page sees that it is gone")
    with live(scripted("Here again."), listen_on=port(service)) as service:
        page.wait(lambda: page.state() == "ready", "the page sees that it is back")
        page.wait(lambda: not page.id("live-note").is_displayed(), "its events come again")
        page.go("chat")
        page.say("Still there?")
        page.answered(2)
        assert page.texts(".said")[-1] == "Here again."
        page.go("live")
        page.wait(lambda: "answered" in page.text("#latest tbody"), "the live part tells of it")


# The key


def test_it_asks_for_the_key_and_keeps_it_in_the_tab(page: Browser) -> None:
    with live(api_keys=("sesame",)) as service:
        page.driver.get(service.url)
        page.wait(lambda: page.id("asks-key").is_displayed(), "it asks for the key")
        assert page.axe() == []
        page.id("key").send_keys("wrong", Keys.ENTER)
        page.wait(lambda: page.text("#key-why") == "Invalid API key.", "it asks again")
        page.id("key").send_keys("sesame", Keys.ENTER)
        page.wait(lambda: page.state() == "ready", "the key is right")
        page.say("Hi")
        page.answered()
        assert page.text(".said") == "Hello!"
        page.go("live")
        page.wait(lambda: "answered" in page.text("#latest tbody"), "the live part has the key too")
        assert page.js("return [JSON.stringify(localStorage).includes('sesame'), document.cookie]") == [False, ""]
        assert "sesame" not in str(page.asked())
        page.driver.refresh()
        page.wait(lambda: page.state() == "ready", "the tab still has it")
        assert not page.id("asks-key").is_displayed()
        tab = page.driver.current_window_handle
        page.driver.switch_to.new_window("tab")
        page.driver.get(service.url)
        page.wait(lambda: page.id("asks-key").is_displayed(), "another tab does not")
        page.id("key-later").click()
        page.wait(lambda: page.state() == "locked", "it goes on without")
        page.driver.close()
        page.driver.switch_to.window(tab)
        assert all("401" in complaint for complaint in page.complaints())


def test_one_who_gives_no_other_key_can_write_on(page: Browser) -> None:
    with live(api_keys=("sesame",)) as service:
        page.driver.get(service.url)
        page.wait(lambda: page.id("asks-key").is_displayed(), "it asks for the key")
        page.id("key").send_keys("sesame", Keys.ENTER)
        page.wait(lambda: page.state() == "ready", "the key is right")
        page.js("sessionStorage.setItem('microbatch-key', 'revoked')")
        page.say("Hi")
        page.wait(lambda: page.id("asks-key").is_displayed(), "it asks for another key")
        page.id("key-later").click()
        page.wait(lambda: bool(page.texts(".answer .note")), "the question is refused")
        page.id("question").send_keys("More")
        assert page.id("question").get_attribute("value") == "More"
        assert all("401" in complaint for complaint in page.complaints())


def test_a_key_may_have_any_characters(page: Browser) -> None:
    """Such as those of a keyboard that writes another script."""
    with live(api_keys=("schlüssel-ключ",)) as service:
        page.driver.get(service.url)
        page.wait(lambda: page.id("asks-key").is_displayed(), "it asks for the key")
        page.id("key").send_keys("ыуыфьу", Keys.ENTER)
        page.wait(lambda: page.text("#key-why") == "Invalid API key.", "it asks again")
        page.id("key").send_keys("schlüssel-ключ", Keys.ENTER)
        page.wait(lambda: page.state() == "ready", "the key is right")
        assert all("401" in complaint for complaint in page.complaints())


# Live


def test_live_shows_what_the_batcher_does(page: Browser, pool: ThreadPoolExecutor) -> None:
    with live(scripted("Hello!", stepped=True), max_batch_size=3) as service:
        page.open(service.url, "live")
        asked = [pool.submit(service.chat, headers={"x-request-id": f"r{n}"}) for n in range(5)]
        service.wait_running()
        waiting = 5 - len(service.engine.batches[0])
        service.wait_queued(waiting)
        running = str(len(service.engine.batches[0]))
        page.wait(lambda: value(page, "Requests") == [running, str(waiting)], "both numbers are shown")
        service.engine.release(1000)
        assert all(answer.result().status_code == 200 for answer in asked)
        page.wait(lambda: value(page, "Requests") == ["0", "0"], "all is quiet")
        page.wait(lambda: len(page.texts("#latest tbody tr")) == 5, "each request is in the table")
        assert sorted(page.texts("#latest td:nth-child(10)")) == [f"r{n}" for n in range(5)]
        assert set(page.texts("#latest td:nth-child(8)")) == {"7"}
        assert all(re.fullmatch(r"[\d.]+ m?s", each) for each in value(page, "Time to first token"))
        shown = page.js("return [...document.querySelectorAll('.chart:not([hidden])')].map((each) => each.innerText)")
        assert [text.partition("\n")[0] for text in shown][:3] == ["Requests", "Output", "Prefill"]
        assert all("highest" in label for label in labels(page)[:4])
        page.driver.find_element("css selector", "#span option[value='300']").click()
        page.wait(lambda: "over 5 minutes" in labels(page)[0], "the longer time is shown")


def test_values_are_told_where_one_points(page: Browser) -> None:
    with live() as service:
        assert service.chat().status_code == 200
        page.open(service.url, "live")
        page.wait(lambda: len(page.all(".u-over")) >= 4, "the charts are drawn")
        page.wait(lambda: value(page, "Requests") == ["0", "0"], "the latest values are told")
        assert "ago" not in page.text(".chart .values")
        ActionChains(page.driver).move_to_element(page.all(".u-over")[0]).perform()
        page.wait(lambda: page.text(".chart .values").count("30 s ago") >= 4, "every chart tells of the same moment")
        assert value(page, "Requests") == [NONE, NONE]
        names = page.texts(".chart:nth-child(4) .value")
        assert [name.split()[-1] for name in names] == ["p50", "p95"]


def test_a_panel_without_anything_to_show_says_so_or_is_not_there(page: Browser) -> None:
    with live() as service:
        page.open(service.url, "live")
        page.wait(lambda: value(page, "Requests") == ["0", "0"], "the charts are drawn")
        titles = page.texts(".chart:not([hidden]) figcaption")
        assert titles == ["Requests", "Output", "Prefill", "Time to first token, last 30 s"]
        assert page.texts(".chart:not([hidden]) .empty:not([hidden])") == ["No answers in this time."]
        service.chat()
        page.wait(lambda: page.texts(".chart:not([hidden]) .empty:not([hidden])") == [], "there is something now")


def test_on_a_phone_live_is_short_and_no_id_widens_it(page: Browser) -> None:
    with live() as service:
        for number in range(12):
            service.chat(headers={"x-request-id": f"{number}-{'i' * 100}"})
        page.look(PHONE, "light")
        page.open(service.url, "live")
        page.wait(lambda: len(page.texts("#latest tbody tr")) == 12, "the requests are told")
        assert page.js("return document.documentElement.scrollHeight") <= 2.5 * PHONE[1]
        within, around = page.js("const { parentElement: box } = latest; return [box.scrollWidth, box.clientWidth]")
        assert within <= around
        assert page.texts("#latest th")[0] == "Ended"


def test_live_shows_the_whole_id_of_a_request_so_that_it_can_be_found_in_the_log(page: Browser) -> None:
    with live() as service:
        page.open(service.url)
        page.say("Hi")
        page.answered()
        assert service.chat().status_code == 200
        page.go("live")
        page.wait(lambda: len(page.texts("#latest tbody tr")) == 2, "the requests are told")
        widths = page.js(
            "return [...document.querySelectorAll('.id')].map((each) => [each.scrollWidth, each.clientWidth])"
        )
        assert all(whole <= shown for whole, shown in widths)
        assert page.texts(".id") == [row.id for row in reversed(service.ended())]


def test_only_the_live_part_listens(page: Browser) -> None:
    with live() as service:
        page.open(service.url)
        for part in PARTS:
            page.go(part)
            expected = int(part == "live")
            page.wait(lambda expected=expected: service.service.live.listeners == expected, f"{expected} listen")  # type: ignore[misc]


# Everyone


SIZES = {"desk": DESK, "phone": PHONE}
LOOKS = {f"{name}, {scheme}": (size, scheme) for name, size in SIZES.items() for scheme in ("light", "dark")}
ANSWER = """Some *text*, `code` and a https://example.org/link.

- [x] done

| a | b |
| - | -: |
| 1 | 2 |

```python
# A comment
def area(side: float = 2.5) -> str:
    return f"{side ** 2}"
```"""


@pytest.mark.parametrize(("size", "scheme"), LOOKS.values(), ids=LOOKS)
def test_every_part_is_accessible_and_fits(page: Browser, size: tuple[int, int], scheme: str) -> None:
    with live(scripted(ANSWER)) as service:
        page.look(size, scheme)
        page.open(service.url)
        page.say("Hi")
        page.answered()
        page.press("Regenerate")
        page.wait(lambda: len(page.all(".branches")) == 1, "there are two answers")
        page.js("document.getElementById('kept').open = document.getElementById('options').open = true")
        page.go("many")
        page.id("ask").click()
        page.wait(lambda: "12 of 12 answered" in page.text("#summary"), "all are complete")
        for part in PARTS:
            page.go(part)
            page.wait(lambda part=part: page.id(f"part-{part}").is_displayed(), part)  # type: ignore[misc]
            assert page.axe() == [], (part, size, scheme)
            assert page.js("return document.documentElement.scrollWidth <= innerWidth"), (part, size)


def test_all_of_it_is_reached_by_keyboard(page: Browser) -> None:
    with live() as service:
        page.open(service.url)
        reached = set()
        for _ in range(30):
            ActionChains(page.driver).send_keys(Keys.TAB).perform()
            reached.add(page.js("const now = document.activeElement; return now.id || now.hash || now.innerText"))
        parts = {"#main", "#chat", "#many", "#live", "#state"}
        assert parts | {"new-chat", "question", "send", "preset", "system", "seed", "thinking", "import"} <= reached
        page.open(service.url, "state")
        for _ in range(3):
            ActionChains(page.driver).send_keys(Keys.TAB).perform()
        ActionChains(page.driver).send_keys(Keys.ENTER).perform()
        page.wait(lambda: page.id("part-many").is_displayed(), "the second part is shown")
        assert page.js("return document.title").startswith("Ask many")
        assert page.all("nav [aria-current=page]")[0].text == "Ask many"


@pytest.mark.parametrize("part", PARTS)
def test_the_link_to_the_content_stays_in_the_part(page: Browser, part: str) -> None:
    with live() as service:
        page.open(service.url, part)
        page.js("document.querySelector('.skip').focus()")
        ActionChains(page.driver).send_keys(Keys.ENTER).perform()
        page.wait(lambda: page.js("return document.activeElement.id") == "main", "the content has the focus")
        assert page.id(f"part-{part}").is_displayed()


@pytest.mark.parametrize("part", PARTS)
def test_a_part_opens_at_its_top(page: Browser, part: str) -> None:
    with live() as service:
        page.look((1280, 400), "light")
        page.open(service.url, part)
        page.wait(lambda: page.id(f"part-{part}").is_displayed(), "it is shown")
        top, head = page.js(
            "return [document.getElementById(arguments[0]).getBoundingClientRect().top,"
            "document.querySelector('header').getBoundingClientRect().bottom]",
            f"part-{part}",
        )
        assert page.js("return scrollY") == 0
        assert top >= head


def test_a_new_conversation_forgets_the_old_one(page: Browser) -> None:
    with live() as service:
        page.open(service.url)
        page.say("Hi")
        page.answered()
        page.id("new-chat").click()
        assert page.all(".answer") == []
        assert page.id("empty").is_displayed()
        page.say("Hi")
        page.answered()
        prompts = [event.prompt_tokens for event in service.ended()]
        assert prompts[0] == prompts[1]
