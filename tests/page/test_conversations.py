"""Laws of the page's conversations: they are kept in the browser, have branches, and can be gone on with."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import pytest
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from batching.types import Request
from tests.live import BYTES, END, Live, byte_tokenizer, live, scripted, tokens_of
from tests.page.browser import DESK, PHONE, Browser, half_said
from tests.server.test_app import babble, remembering

pytestmark = pytest.mark.browser


def counted() -> Callable[[Request, int], int]:
    """The first request is answered "answer 1", the next "answer 2"."""
    numbers: dict[str, int] = {}

    def script(request: Request, position: int) -> int:
        text = tokens_of(f"answer {numbers.setdefault(request.id, len(numbers) + 1)}")
        return text[position] if position < len(text) else END

    return script


@pytest.fixture
def service() -> Iterator[Live]:
    with live(scripted(counted())) as found:
        yield found


def prompt(request: Request) -> str:
    return str(BYTES.decode(list(request.prompt)))


def ask(page: Browser, *questions: str) -> None:
    for question in questions:
        before = len(page.all(".answer"))
        page.say(question)
        page.answered(before + 1)


def answers(page: Browser, *expected: str) -> None:
    page.wait(lambda: page.texts(".answer:not([aria-busy]) .said") == list(expected), f"the answers are {expected}")


def reload(page: Browser) -> None:
    page.driver.refresh()
    page.wait(lambda: page.state() == "ready", "the page is there again")


def edit(page: Browser, text: str) -> None:
    """Write the last question anew."""
    page.press("Edit")
    page.all(".editor textarea")[0].send_keys(Keys.CONTROL, "a")
    page.all(".editor textarea")[0].send_keys(text, Keys.ENTER)


# Kept in the browser


def test_a_conversation_is_kept_and_gone_on_with(page: Browser) -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen, "Hello!"))) as service:
        page.open(service.url)
        page.id("system").send_keys("Be brief.")
        ask(page, "Hi")
        reload(page)
        assert page.texts(".mine, .said") == ["Hi", "Hello!"]
        assert "first token after" in page.text(".answer .foot")
        assert page.id("system").get_attribute("value") == "Be brief."
        ask(page, "And?")
        assert page.texts(".mine, .said") == ["Hi", "Hello!", "And?", "Hello!"]
    shown = "<system>Be brief.<|end|><user>Hi<|end|><assistant>Hello!<|end|><user>And?<|end|><assistant>"
    assert prompt(seen[-1]) == shown


def test_what_was_written_before_the_page_was_left_is_kept(page: Browser) -> None:
    with half_said(page):
        reload(page)
        assert page.texts(".mine, .said") == ["Hi", "xxx"]
        assert "Continue" in page.text(".answer .foot")


def test_conversations_are_listed_opened_renamed_and_deleted(page: Browser, service: Live) -> None:
    page.open(service.url)
    ask(page, "First question and more of it")
    page.id("new-chat").click()
    assert page.texts(".mine, .said") == []
    ask(page, "Second")
    assert page.texts("#conversations .name") == ["Second", "First question and more of it"]
    page.press("First question and more of it")
    assert page.texts(".said") == ["answer 1"]
    field = rename(page)
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("Lighthouses", Keys.ENTER)
    page.wait(lambda: "Lighthouses" in page.texts("#conversations .name"), "it has its new name")
    ask(page, "More")
    reload(page)
    assert page.texts("#conversations .name") == ["Lighthouses", "Second"]
    assert page.texts(".said") == ["answer 1", "answer 3"]
    page.press("Delete", "#kept")
    page.driver.switch_to.alert.dismiss()
    assert len(page.texts("#conversations .name")) == 2
    page.press("Delete", "#kept")
    page.driver.switch_to.alert.accept()
    page.wait(lambda: page.texts("#conversations .name") == ["Second"], "it is gone")
    assert page.texts(".mine, .said") == []
    reload(page)
    assert page.texts("#conversations .name") == ["Second"]


def test_what_was_written_before_another_conversation_was_opened_is_kept(page: Browser) -> None:
    with half_said(page) as service:
        page.id("new-chat").click()
        page.press("Hi", "#conversations")
        assert page.texts(".mine, .said") == ["Hi", "xxx"]
        page.say("More")
        service.engine.release(2)
        reload(page)
        assert page.texts(".mine, .said")[:2] == ["Hi", "xxx"]


def rename(page: Browser) -> WebElement:
    """The field for the conversation's new name."""
    page.press("Rename")
    field = page.all("#conversations input")[0]
    page.wait(lambda: page.js("return document.activeElement === arguments[0]", field), "the name can be written")
    return field


def test_a_name_is_written_while_an_answer_ends(page: Browser) -> None:
    with live(scripted("Hello!", stepped=True)) as service:
        page.open(service.url)
        page.say("Hi")
        service.wait_running()
        field = rename(page)
        field.send_keys("Light")
        service.engine.release(100)
        page.answered()
        field.send_keys("houses", Keys.ENTER)
        assert page.texts("#conversations .name") == ["Lighthouses"]
        assert page.id("question").get_attribute("value") == ""
        reload(page)
        assert page.texts("#conversations .name") == ["Lighthouses"]
        assert page.texts(".mine, .said") == ["Hi", "Hello!"]


def test_what_is_clicked_while_a_name_is_written_happens_and_the_name_is_kept(
    page: Browser, service: Live, tmp_path: Path
) -> None:
    page.open(service.url)
    ask(page, "First")
    page.id("new-chat").click()
    ask(page, "Second")
    for before, after in (("Second", "Lighthouses"), ("First", "Boats")):
        other = next(each for each in page.texts("#conversations .name") if each != before)
        rename(page).send_keys(Keys.CONTROL, "a", Keys.NULL, after)
        page.press(other, "#conversations")
        assert page.texts(".mine") == ["First" if before == "Second" else "Second"]
        assert after in page.texts("#conversations .name")
    rename(page).send_keys(Keys.CONTROL, "a", Keys.NULL, "Ships")
    assert exported(page, tmp_path, "Export")["conversations"][0]["title"] == "Ships"
    ask(page, "More")
    reload(page)
    assert page.texts("#conversations .name") == ["Ships", "Boats"]


def test_escape_leaves_the_name_and_not_the_answer(page: Browser) -> None:
    with half_said(page):
        rename(page).send_keys("Never", Keys.ESCAPE)
        assert page.texts("#conversations .name") == ["Hi"]
        assert page.all(".answer[aria-busy]")


COMPOSING = """
const [field, key, how] = arguments;
field.dispatchEvent(new KeyboardEvent("keydown", { key, ...how, bubbles: true }));
"""


@pytest.mark.parametrize("how", [{"isComposing": True}, {"keyCode": 229}], ids=["others", "Safari"])
def test_keys_of_an_input_method_end_nothing(how: dict[str, Any], page: Browser) -> None:
    """As those who write Chinese, Japanese or Korean press them to choose or leave a word."""
    with half_said(page) as service:
        page.js(COMPOSING, page.id("question"), "Escape", how)
        assert page.all(".answer[aria-busy]")
        for key in ("Enter", "Escape"):
            field = rename(page)
            page.js(COMPOSING, field, key, how)
            field.send_keys(Keys.ESCAPE)
        page.id("stop").click()
        service.wait_ended()
        page.answered()
        page.press("Edit")
        for key in ("Enter", "Escape"):
            page.js(COMPOSING, page.all(".editor textarea")[0], key, how)
        assert page.all(".editor textarea")
        page.id("question").send_keys("half a word")
        page.js(COMPOSING, page.id("question"), "Enter", how)
        assert page.texts(".mine") == []


def test_a_deleted_conversation_stays_deleted_though_its_answer_was_on_its_way(page: Browser) -> None:
    with half_said(page) as service:
        page.press("Delete", "#kept")
        page.driver.switch_to.alert.accept()
        service.wait_ended()
        page.wait(lambda: page.id("send").is_displayed(), "the answer is stopped")
        assert page.texts("#conversations .name") == []


def test_what_another_tab_keeps_is_listed(page: Browser, service: Live) -> None:
    page.open(service.url)
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.open(service.url)
    ask(page, "From the other tab")
    page.driver.close()
    page.driver.switch_to.window(first)
    page.wait(lambda: page.texts("#conversations .name") == ["From the other tab"], "the first tab lists it")


def test_two_tabs_that_write_in_one_conversation_keep_what_both_wrote(page: Browser) -> None:
    with half_said(page) as service:
        first = page.driver.current_window_handle
        page.driver.switch_to.new_window("tab")
        page.look(DESK, "light")
        page.open(service.url)
        page.press("Hi", "#conversations")
        page.say("More")
        service.wait_queued(1)
        page.id("stop").click()
        page.wait(lambda: page.id("send").is_displayed(), "it is stopped")
        page.driver.close()
        page.driver.switch_to.window(first)
        page.id("stop").click()
        page.answered()
        reload(page)
        assert page.texts(".mine, .said") == ["Hi", "xxx"]
        page.press(LATER)
        assert page.texts(".mine, .said") == ["More"]


def test_a_tab_stays_in_its_branch_while_another_begins_one(page: Browser, service: Live) -> None:
    page.open(service.url)
    ask(page, "Hi", "More")
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.look(DESK, "light")
    page.open(service.url)
    page.press("Hi", "#conversations")
    edit(page, "Less")
    answers(page, "answer 1", "answer 3")
    page.driver.close()
    page.driver.switch_to.window(first)
    page.wait(lambda: "2" in page.text(".turn .branches"), "the first tab has the branch")
    assert page.texts(".mine") == ["Hi", "More"]


FILL = """
for (let size = 2 ** 22; size >= 1; size /= 2) {
  try { localStorage["x" + size] = "x".repeat(size); } catch {}
}
"""


def test_a_full_browser_is_told(page: Browser, service: Live) -> None:
    page.open(service.url)
    page.js(FILL)
    ask(page, "Hi")
    assert "no room left" in page.text("#kept-note")
    assert page.texts(".said") == ["answer 1"]
    page.js("localStorage.clear()")
    ask(page, "And now?")
    assert page.text("#kept-note") == ""


def test_what_a_full_browser_cannot_keep_is_listed_exported_and_kept_once_there_is_room(
    page: Browser, service: Live, tmp_path: Path
) -> None:
    page.open(service.url)
    page.js(FILL)
    ask(page, "First")
    page.id("new-chat").click()
    ask(page, "Second")
    page.press("First", "#conversations")
    [found] = exported(page, tmp_path, "Export")["conversations"]
    assert [each["content"] for each in found["messages"]] == ["First", "answer 1"]
    page.press("Second", "#conversations")
    page.js("localStorage.clear()")
    page.press("Delete", "#kept")
    page.driver.switch_to.alert.accept()
    assert page.text("#kept-note") == ""
    reload(page)
    assert page.texts("#conversations .name") == ["First"]


FORBID = """
for (const name of ["localStorage", "sessionStorage"]) {
  Object.defineProperty(window, name, { get() { throw new DOMException("denied", "SecurityError"); } });
}
"""


def test_where_the_browser_forbids_storage_conversations_last_as_long_as_the_page(page: Browser) -> None:
    """As where somebody blocks all cookies."""
    added = page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": FORBID})
    try:
        with live(scripted(counted()), api_keys=("sesame",)) as service:
            page.driver.get(service.url)
            page.wait(lambda: page.id("asks-key").is_displayed(), "it asks for the key")
            page.id("key").send_keys("sesame", Keys.ENTER)
            page.wait(lambda: page.state() == "ready", "the key is used")
            assert "forbids storage" in page.text("#kept-where")
            ask(page, "First")
            page.id("new-chat").click()
            ask(page, "Second")
            page.press("First")
            assert page.texts(".mine, .said") == ["First", "answer 1"]
            page.id("system").send_keys("Speak like a keeper.")
            page.press("Save as preset")
            assert page.id("delete-preset").is_displayed()
            assert any("401" in complaint for complaint in page.complaints())
            page.driver.get(f"{service.url}/docs")
            page.wait(lambda: bool(page.all(".opblock")), "the operations are there")
    finally:
        page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


# Files


def exported(page: Browser, folder: Path, label: str) -> dict[str, Any]:
    """The one file that a button saves."""
    behaviour = {"behavior": "allow", "downloadPath": str(folder)}
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    page.press(label, "#kept")
    page.wait(lambda: bool(list(folder.glob("*.json"))), "a file is saved")
    [file] = folder.glob("*.json")
    found: dict[str, Any] = orjson.loads(file.read_bytes())
    return found


def test_an_exported_conversation_comes_back_when_it_is_imported(page: Browser, service: Live, tmp_path: Path) -> None:
    page.open(service.url)
    ask(page, "One")
    page.id("new-chat").click()
    ask(page, "Two")
    document = exported(page, tmp_path, "Export all")
    assert [each["title"] for each in document["conversations"]] == ["Two", "One"]
    page.js("localStorage.clear()")
    reload(page)
    [file] = tmp_path.iterdir()
    for _ in range(2):  # the second time it is all there already
        page.id("import-file").send_keys(str(file))
        page.wait(lambda: page.texts("#conversations .name") == ["Two", "One"], "they are listed")
        page.wait(lambda: "imported" in page.text("#toast"), "it is told")
        page.js("document.getElementById('toast').textContent = ''")
    page.press("One")
    assert page.texts(".mine, .said") == ["One", "answer 1"]


MESSAGE = {"role": "user", "content": "<img src=x onerror=alert(1)>", "parent": -1}
CONVERSATION = {"id": "a", "title": "<b>t</b>", "system": "", "changed": 1, "messages": [MESSAGE], "tip": 0}
DAMAGED: list[dict[str, Any]] = [
    {"id": 1},
    {"tip": 1},
    {"tip": 0.5},
    {"messages": {}},
    {"messages": [None]},
    {"messages": [MESSAGE | {"parent": 0}]},
    {"messages": [MESSAGE | {"role": "system"}]},
    {"messages": [MESSAGE | {"speed": "fast"}]},
    {"messages": [MESSAGE | {"content": None}]},
]


def test_a_file_of_something_else_is_refused_and_a_hostile_one_stays_text(
    page: Browser, service: Live, tmp_path: Path
) -> None:
    page.open(service.url)
    file = tmp_path / "import.json"

    def offer(value: Any) -> None:
        file.write_bytes(value if isinstance(value, bytes) else orjson.dumps(value))
        page.id("import-file").send_keys(str(file))

    def told() -> str:
        page.wait(lambda: page.alert() is not None, "it is told")
        return page.dismissed()

    document = {"format": "microbatch conversations", "version": 1}
    for wrong in (b"{", b"null", {"format": "other"}, document | {"version": 2, "conversations": []}):
        offer(wrong)
        assert told() == "This file has no exported conversations."
    for change in DAMAGED:
        offer(document | {"conversations": [CONVERSATION | {"id": "whole"}, CONVERSATION | change]})
        assert told() == "Conversation 2 of this file is damaged; nothing was imported."
    assert page.texts("#conversations .name") == []
    offer(document | {"conversations": [CONVERSATION]})
    page.wait(lambda: page.texts("#conversations .name") == ["<b>t</b>"], "it is listed")
    page.press("<b>t</b>")
    assert page.texts(".mine") == [MESSAGE["content"]]


# Branches


EARLIER, LATER = "\u2039", "\u203a"


def test_a_regenerated_answer_is_another_branch(page: Browser) -> None:
    seen: list[Request] = []
    script = counted()

    def remembered(request: Request, position: int) -> int:
        if position == 0:
            seen.append(request)
        return script(request, position)

    with live(scripted(remembered)) as service:
        page.open(service.url)
        ask(page, "Hi", "More")
        page.press("Regenerate", ".answer:nth-child(2)")
        answers(page, "answer 3")
        assert prompt(seen[2]) == prompt(seen[0])
        assert page.texts(".answer .branches") == [f"{EARLIER} 2 / 2 {LATER}"]
        page.press(EARLIER)
        assert page.texts(".mine, .said") == ["Hi", "answer 1", "More", "answer 2"]
        page.press(LATER, ".answer:nth-child(2)")
        ask(page, "Else")
        reload(page)
        assert page.texts(".mine, .said") == ["Hi", "answer 3", "Else", "answer 4"]
    assert prompt(seen[3]).endswith("<assistant>answer 3<|end|><user>Else<|end|><assistant>")


def test_an_edited_question_is_another_branch(page: Browser, service: Live) -> None:
    page.open(service.url)
    ask(page, "Hi", "More")
    page.press("Edit", ".turn:nth-child(3)")
    page.press("Cancel")
    edit(page, "Less")
    answers(page, "answer 1", "answer 3")
    assert page.texts(".mine") == ["Hi", "Less"]
    page.press(EARLIER, ".turn")
    assert page.texts(".mine, .said") == ["Hi", "answer 1", "More", "answer 2"]
    assert page.axe("#part-chat") == []


def test_the_keyboard_stays_where_it_was(page: Browser, service: Live) -> None:
    focused = "const now = document.activeElement; return now.getAttribute('aria-label') || now.innerText"
    page.open(service.url)
    ask(page, "Hi")
    for number in (2, 3):
        page.press("Regenerate")
        answers(page, f"answer {number}")
    for key, answer, button in ((0, 2, "Earlier version"), (0, 1, "Later version"), (1, 2, "Later version")):
        page.all(".branches button")[key].send_keys(Keys.ENTER)
        answers(page, f"answer {answer}")
        assert page.js(focused) == button
    page.press("Edit")
    page.all(".editor textarea")[0].send_keys(Keys.ESCAPE)
    assert page.js(focused) == "Edit"
    rename(page).send_keys("Lighthouses", Keys.ENTER)
    assert page.js(focused) == "Lighthouses"


def test_an_answer_that_fails_leaves_the_earlier_one(page: Browser) -> None:
    with live() as service:
        page.open(service.url)
        ask(page, "Hi")
        page.say("refuse me")
        page.wait(lambda: bool(page.texts(".answer .note")), "it is refused")
        edit(page, "Now")
        answers(page, "Hello!", "Hello!")
        reload(page)
        assert page.texts(".mine, .said") == ["Hi", "Hello!", "Now", "Hello!"]
        page.press(EARLIER)
        assert page.texts(".mine") == ["Hi", "refuse me"]
        page.press("Ask again")
        page.wait(lambda: bool(page.texts(".answer .note")), "it is refused again")
        assert any("400" in complaint for complaint in page.complaints())


# Length


WHOLE = "Hello, world"


def rest(request: Request, position: int) -> int:
    """What is missing of the answer that the prompt ends with."""
    begun = prompt(request).rpartition("<assistant>")[2]
    text = tokens_of(WHOLE.removeprefix(begun))
    return text[position] if position < len(text) else END


def test_an_answer_that_was_cut_goes_on_where_it_stopped(page: Browser) -> None:
    seen: list[Request] = []

    def remembered(request: Request, position: int) -> int:
        if position == 0:
            seen.append(request)
        return rest(request, position)

    with live(scripted(remembered)) as service:
        page.open(service.url)
        page.id("max-tokens").send_keys("5")
        page.say("Hi")
        answers(page, "Hello")
        assert "Stopped at the token limit" in page.text(".answer .foot")
        page.press("Continue")
        answers(page, "Hello, wor")
        page.press("Continue")
        answers(page, WHOLE)
        assert "Stopped" not in page.text(".answer .foot")
        assert "13 tokens" in page.text(".answer .foot")
        assert "Continue" not in page.text(".answer .foot")
        assert len({request.sampling.max_tokens for request in seen}) == 1
        reload(page)
        assert page.texts(".mine, .said") == ["Hi", WHOLE]
    assert prompt(seen[1]) == prompt(seen[0]) + "Hello"


def test_a_continuation_that_is_stopped_is_said_to_be_stopped(page: Browser) -> None:
    with live(scripted(babble, stepped=True)) as service:
        page.open(service.url)
        page.id("max-tokens").send_keys("3")
        page.say("Hi")
        service.engine.release(3)
        page.wait(lambda: page.text("#toast") == "Answered, 3 tokens", "it is cut")
        page.press("Continue")
        service.engine.release(1)
        page.wait(lambda: page.text(".said") == "xxxx", "it goes on")
        page.id("stop").click()
        page.answered()
        assert page.text("#toast") == "Stopped"


def test_an_answer_after_a_thought_goes_on_outside_of_one(page: Browser) -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen, "Hm.\n</think>\nHello")), thinking=True) as service:
        page.open(service.url)
        page.id("max-tokens").send_keys("15")
        ask(page, "Hi")
        assert page.text(".said") == "He"
        reload(page)
        page.press("Continue")
        page.wait(lambda: len(seen) == 2, "it goes on")
        page.answered()
    assert prompt(seen[0]).endswith("<assistant><think>")
    assert prompt(seen[1]).endswith("<assistant>He")


ALWAYS_THINKS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)


def test_an_answer_of_a_model_that_always_thinks_goes_on_outside_of_a_thought(page: Browser) -> None:
    seen: list[Request] = []
    script = remembering(seen, "Hm.\n</think>\nHello")
    with live(scripted(script), tokenizer=byte_tokenizer(ALWAYS_THINKS)) as service:
        page.open(service.url)
        page.id("max-tokens").send_keys("15")
        ask(page, "Hi")
        page.press("Continue")
        page.wait(lambda: len(seen) == 2, "it goes on")
        page.answered()
    assert prompt(seen[1]).endswith("<user>Hi<|end|><assistant>He")


def test_an_answer_that_was_cut_after_a_space_goes_on_after_it(page: Browser) -> None:
    with live(scripted(rest)) as service:
        page.open(service.url)
        page.id("max-tokens").send_keys("7")
        ask(page, "Hi")
        page.press("Continue")
        answers(page, WHOLE)


def test_as_much_is_asked_for_as_fits(page: Browser) -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen, "Hello!")), default_max_tokens=5, max_output_tokens=300) as service:
        page.open(service.url)
        ask(page, "Hi")
    assert [request.sampling.max_tokens for request in seen] == [300]


# System prompts


def test_system_prompts_are_chosen_saved_and_deleted(page: Browser, service: Live) -> None:
    def names() -> list[str]:
        return [each.strip() for each in page.texts("#preset option")]

    page.open(service.url)
    ours = names()
    assert ours[0] == "None"
    page.driver.find_element("css selector", "#preset optgroup option").click()
    assert page.id("system").get_attribute("value")
    assert not page.id("save-preset").is_displayed()
    page.id("system").clear()
    page.id("system").send_keys("Speak like a keeper.")
    page.press("Save as preset")
    assert names() == [*ours, "Speak like a keeper."]
    page.id("system").clear()
    reload(page)
    page.all("#preset option")[-1].click()
    assert page.id("system").get_attribute("value") == "Speak like a keeper."
    page.press("Delete preset")
    assert names() == ["Your own", *ours[1:]]


def save_presets(page: Browser, *texts: str) -> None:
    for text in texts:
        page.id("system").clear()
        page.id("system").send_keys(text)
        page.press("Save as preset")


@pytest.mark.parametrize("text", ["Answer the question of the user, but as if you were old.", "Two  spaces."])
def test_a_saved_system_prompt_can_be_chosen_whatever_spaces_its_name_has(
    text: str, page: Browser, service: Live
) -> None:
    page.open(service.url)
    save_presets(page, text)
    assert page.id("delete-preset").is_displayed()
    page.all("#preset option")[0].click()
    assert page.id("system").get_attribute("value") == ""
    page.all("#preset option")[-1].click()
    assert page.id("system").get_attribute("value") == text
    count = len(page.all("#preset option"))
    page.press("Delete preset")
    assert len(page.all("#preset option")) == count - 1


def test_saved_system_prompts_that_begin_alike_do_not_replace_each_other_nor_ours(page: Browser, service: Live) -> None:
    texts = ["Speak like a keeper.\nIn French.", "Speak like a keeper.\nIn German.", "Brief"]
    page.open(service.url)
    ours = len(page.all("#preset option"))
    save_presets(page, *texts)
    assert [name.strip() for name in page.texts("#preset option")[ours:]] == [
        "Speak like a keeper.",
        "Speak like a keeper. (2)",
        "Brief (2)",
    ]
    for place, text in enumerate(texts, ours):
        page.all("#preset option")[place].click()
        assert page.id("system").get_attribute("value") == text


def test_system_prompts_that_another_tab_saves_are_there_and_stay(page: Browser, service: Live) -> None:
    page.open(service.url)
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.look(DESK, "light")
    page.open(service.url)
    save_presets(page, "From the other tab.")
    page.driver.close()
    page.driver.switch_to.window(first)
    page.wait(lambda: page.texts("#preset option")[-1].strip() == "From the other tab.", "the first tab offers it")
    save_presets(page, "From the first tab.")
    reload(page)
    assert [name.strip() for name in page.texts("#preset option")[-2:]] == [
        "From the other tab.",
        "From the first tab.",
    ]


def test_a_full_browser_that_cannot_save_a_system_prompt_says_so(page: Browser, service: Live) -> None:
    page.open(service.url)
    page.js(FILL)
    save_presets(page, "Speak like a keeper.")
    assert page.dismissed() == "This browser has no room left to keep this. Export or delete some conversations."
    assert page.id("save-preset").is_displayed()


def test_a_regenerated_answer_is_told_the_system_prompt_that_is_set_now(page: Browser) -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen, "Hello!"))) as service:
        page.open(service.url)
        ask(page, "Hi")
        page.id("system").send_keys("Speak like a keeper.")
        page.press("Regenerate")
        page.wait(lambda: len(page.all(".branches")) == 1, "there is another answer")
        assert "keeper" not in prompt(seen[0])
        assert "<system>Speak like a keeper." in prompt(seen[1])
        reload(page)
        assert page.id("system").get_attribute("value") == "Speak like a keeper."


# Where one is


def test_one_may_write_at_once(page: Browser, service: Live) -> None:
    def focused() -> bool:
        return bool(page.js("return document.activeElement.id === 'question'"))

    page.open(service.url)
    page.wait(focused, "the message can be written")
    page.open(service.url, "live")
    assert not focused()
    page.id("new-chat").click()
    page.wait(focused, "and after New chat from another part")


def test_enter_on_a_phone_starts_a_new_line(page: Browser, service: Live) -> None:
    page.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        page.look(PHONE, "light")
        page.open(service.url)
        page.say("one")
        page.id("question").send_keys("two")
        page.press("Send")
        answers(page, "answer 1")
        page.press("Edit")
        page.all(".editor textarea")[0].send_keys(Keys.ENTER, "three")
        page.press("Send", ".editor")
        answers(page, "answer 2")
        assert page.texts(".mine") == ["one\ntwo\nthree"]
        page.id("options").click()
        assert "Enter sends" not in page.text("#options")
    finally:
        page.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def test_a_reader_who_scrolls_up_is_left_there_and_can_jump_down(page: Browser) -> None:
    with live(scripted("word\n\n" * 100, stepped=True)) as service:
        page.look(PHONE, "light")
        page.open(service.url)
        page.say("Hi")
        service.wait_running()
        service.engine.release(300)
        page.wait(lambda: page.js("return scrollY") > 500, "the page follows the answer")
        assert not page.id("jump").is_displayed()
        page.js("scrollTo({ top: 0, behavior: 'instant' })")
        page.wait(lambda: page.id("jump").is_displayed(), "one may jump")
        service.engine.release(1000)
        page.answered()
        assert page.js("return scrollY") == 0
        page.id("jump").click()
        page.wait(lambda: page.js("return scrollY + innerHeight + 1 >= document.documentElement.scrollHeight"), "down")
        assert not page.id("jump").is_displayed()


def waiting(page: Browser, requests: str) -> None:
    words = f"Queued, {requests} waiting"
    page.wait(lambda: page.text(".answer .foot") == words, f"it says: {words}")


def test_one_who_waits_is_told_why(page: Browser) -> None:
    with live(scripted("Hello!", stepped=True), max_batch_size=1) as service, ThreadPoolExecutor() as pool:
        page.open(service.url)
        others = [pool.submit(service.chat) for _ in range(3)]
        service.wait_running()
        service.wait_queued(2)
        page.say("Hi")
        waiting(page, "3 requests")
        for left in ("2 requests", "1 request"):
            service.engine.release(len("Hello!") + 1)
            waiting(page, left)
        service.engine.release(len("Hello!") + 1)
        page.wait(lambda: page.text(".answer .foot") == "Prefill", "its prompt is computed")
        service.engine.release(2)
        page.wait(lambda: page.text(".answer .foot") == "Generating", "its answer is written")
        service.engine.release(100)
        answers(page, "Hello!")
        assert all(other.result().status_code == 200 for other in others)
        page.wait(lambda: service.service.live.listeners == 0, "nobody listens any more")
