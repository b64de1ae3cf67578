"""Laws of the page's chat, in a real browser."""

import shlex
import subprocess
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from selenium.webdriver.common.keys import Keys

from batching.events import Outcome
from batching.types import Request
from tests.live import BYTES, SMALL, live, process, scripted, text_of
from tests.page.browser import PHONE, Browser, half_said
from tests.server.test_app import remembering

pytestmark = pytest.mark.browser

ANSWER = """# A *title*

Some `code`, **bold**, ~~gone~~, a [link](https://example.org/a?b=c) and https://example.org/bare.

1. one
2. two
   - nested
     - deeper
- [x] done
- [ ] to do

| a | b | c |
| - | :-: | -: |
| 1 | **2** | 3 |

```python
print("<b>hi</b>")
```"""

HOSTILE = """<script>document.title = "hurt"</script> <img src=x onerror="document.title='hurt'">

**<iframe src="javascript:parent.document.title='hurt'"></iframe>** `<svg onload=alert(1)>`

[one](javascript:alert(1)) [two](data:text/html,<script>alert(1)</script>) [three](//evil.example)
[four](https://good.example" onclick="alert(1)) [five](JaVaScRiPt:alert(1)) [six](vbscript:x) <https://good.example/'>

# <style>body { display: none }</style>

- <a href="javascript:alert(1)" style="position: fixed">x</a>

| <b onmouseover=alert(1)>h</b> | b |
| --- | --- |
| <form action="https://evil.example"> | <base href="https://evil.example"> |

```html"><img src=x onerror=alert(1)>
</code></pre><script>alert(1)</script>
"""

HARMLESS = {
    *(
        "P",
        "BR",
        "HR",
        "EM",
        "STRONG",
        "S",
        "CODE",
        "PRE",
        "A",
        "UL",
        "OL",
        "LI",
        "BLOCKQUOTE",
        "DIV",
        "SPAN",
        "BUTTON",
    ),
    *("TABLE", "THEAD", "TBODY", "TR", "TH", "TD", "H3", "H4", "H5", "H6"),
}

RENDER = """
const [texts, done] = arguments;
import("/page/markdown.js").then(({ show }) => done(texts.map((text) => {
  const target = document.createElement("div");
  show(target, text);
  const all = [...target.querySelectorAll("*")];
  const attributes = all.flatMap((each) => [...each.attributes].map(({ name, value }) => [name, value]));
  return { html: target.innerHTML, text: target.textContent, tags: all.map((each) => each.tagName), attributes };
})), (error) => done(String(error)));
"""


READ = """
window.read = "";
const decode = TextDecoderStream;
window.TextDecoderStream = function () {
  const decoder = new decode();
  const noted = new TransformStream({ transform: (text, out) => { window.read += text; out.enqueue(text); } });
  return { writable: decoder.writable, readable: decoder.readable.pipeThrough(noted) };
};
"""
"""Notes what the page reads of streams."""


def rendered(page: Browser, *texts: str) -> list[dict[str, Any]]:
    """What the page makes of texts of a model: the HTML, the text, the tags and the attributes of each."""
    found = page.driver.execute_async_script(RENDER, texts)
    assert isinstance(found, list), found
    return found


def curl(page: Browser) -> str:
    """What the latest answer's "Copy as curl" puts into the clipboard."""
    page.driver.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})
    page.press("Copy as curl", ".answer:last-child")
    page.wait(lambda: page.text("#toast") == "Copied", "it is copied")
    return str(page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])"))


def test_a_copy_leaves_the_keyboard_on_its_button_where_pages_have_no_clipboard(page: Browser) -> None:
    """As on plain HTTP from another machine."""
    with live(scripted("one\n\n    two")) as service:
        page.open(service.url)
        page.driver.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})
        page.js(
            "window.real = navigator.clipboard; Object.defineProperty(navigator, 'clipboard', { value: undefined })"
        )
        page.say("Hi")
        page.answered()
        page.all(".answer .foot button")[0].send_keys(Keys.ENTER)
        page.wait(lambda: page.text("#toast") == "Copied", "it is copied")
        assert page.driver.execute_async_script("real.readText().then(arguments[0])") == "one\n\n    two"
        assert page.js("return document.activeElement.innerText") == "Copy"


def prompt(request: Request) -> str:
    """The text that the model was given."""
    return str(BYTES.decode(list(request.prompt)))


def test_an_answer_is_shown_as_it_is_written(page: Browser) -> None:
    with live(scripted("Hello **world**", stepped=True)) as service:
        page.open(service.url)
        page.say("Hi")
        service.wait_running()
        service.engine.release(5)
        page.wait(lambda: page.text(".said") == "Hello", "five letters are there")
        assert page.all(".answer[aria-busy]")
        assert page.id("stop").is_displayed()
        assert not page.id("send").is_displayed()
        service.engine.release(100)
        page.answered()
        assert page.text(".said") == "Hello world"
        assert page.text(".said strong") == "world"
        facts = page.text(".answer .foot span")
        assert "first token after" in facts
        assert "16 tokens" in facts
        assert "tokens/s" in facts
        assert page.js("return document.activeElement.id") == "question"


def test_an_answer_that_is_silent_for_long_is_shown_like_any_other(page: Browser) -> None:
    with live(scripted("Hello!", stepped=True), first_byte_s=0.02) as service:
        page.open(service.url)
        page.driver.execute_script(READ)
        page.say("Hi")
        page.wait(lambda: ": ping" in page.js("return window.read"), "a comment keeps the stream open")
        service.engine.release(100)
        page.answered()
        assert page.text(".said") == "Hello!"


def test_stop_cancels_the_row_and_keeps_what_was_written(page: Browser) -> None:
    with half_said(page) as service:
        page.id("stop").click()
        [row] = service.wait_ended()
        assert row.outcome is Outcome.CANCELLED
        page.answered()
        assert page.text(".said") == "xxx"
        assert "Stopped" in page.text(".answer .foot")


def test_what_is_set_is_what_is_asked_for_also_by_curl(page: Browser) -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen, "it's ok"))) as service:
        page.open(service.url)
        values = {"system": "Be brief.", "temperature": "0.5", "top-p": "0.9", "seed": "7", "max-tokens": "20"}
        for name, value in values.items():
            page.id(name).send_keys(value)
        page.say("What's up?")
        page.answered()
        page.say("And now?")
        page.answered(2)
        answer = subprocess.run(shlex.split(curl(page)), capture_output=True, text=True, check=True).stdout
    first, second, again = seen
    assert prompt(first) == "<system>Be brief.<|end|><user>What's up?<|end|><assistant>"
    assert prompt(second).endswith("<assistant>it's ok<|end|><user>And now?<|end|><assistant>")
    assert (again.prompt, again.sampling) == (second.prompt, second.sampling)
    sampling = first.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.max_tokens) == (0.5, 0.9, 7, 20)
    chunks = [line.removeprefix("data: ") for line in answer.split("\n\n")]
    assert chunks[-2:] == ["[DONE]", ""]
    assert text_of([orjson.loads(chunk) for chunk in chunks[:-2]]) == "it's ok"


def test_a_value_out_of_its_range_is_not_sent(page: Browser) -> None:
    with live() as service:
        page.open(service.url)
        page.id("temperature").send_keys("3")
        page.say("Hi")
        assert page.js("return document.activeElement.id") == "temperature"
        assert page.all(".answer") == []
        page.id("temperature").clear()
        page.say("")
        page.answered()


def test_a_thought_is_folded(page: Browser) -> None:
    template = str(BYTES.chat_template)
    thought = "Let me see.\n</think>\nIt is 4."
    with live(scripted(thought)) as service:
        assert "<think>" in template
        page.open(service.url)
        page.js("document.getElementById('thinking').value = 'true'")
        page.say("2 + 2?")
        page.answered()
        assert page.text(".said") == "It is 4."
        assert page.text(".thought summary") == "Thought"
        [folded] = page.all(".thought > div")
        assert not folded.is_displayed()
        page.all(".thought summary")[0].click()
        assert folded.text == "Let me see."


def test_a_refusal_is_told_and_can_be_tried_again(page: Browser) -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen, "Hello!"))) as service:
        page.open(service.url)
        page.say("refuse me")
        page.answered()
        assert "chat template refuses the messages" in page.text(".answer .note")
        page.press("Try again")
        page.wait(
            lambda: service.sample("microbatch_rejected_requests_total", reason="bad_request") == 2, "tried again"
        )
        page.answered()
        assert page.texts(".mine") == ["refuse me"]
        assert any("400" in complaint for complaint in page.complaints())
        page.say("Hi")
        page.wait(lambda: page.texts(".said") == ["Hello!"], "another question is answered")
    [request] = seen
    assert prompt(request) == "<user>Hi<|end|><assistant>"


def test_markdown_becomes_elements(page: Browser) -> None:
    with live(scripted(ANSWER)) as service:
        page.open(service.url)
        page.say("Hi")
        page.answered()
        assert page.texts(".said h3 em") == ["title"]
        assert page.texts(".said s") == ["gone"]
        assert page.texts(".said ol > li > ul > li > ul > li") == ["deeper"]
        assert page.texts(".said li.task") == ["☑ done", "☐ to do"]
        assert page.texts(".said td strong") == ["2"]
        assert page.js(f"return {ALIGNMENTS}") == ["start", "center", "right"]
        assert page.texts(".said pre code") == ['print("<b>hi</b>")']
        assert page.texts(".said .hljs-string") == ['"<b>hi</b>"']
        links = [link.get_attribute("href") for link in page.all(".said a")]
        assert links == ["https://example.org/a?b=c", "https://example.org/bare"]
        assert {link.get_attribute("rel") for link in page.all(".said a")} == {"noopener noreferrer"}
        assert page.js(f"return {SIZES}") == ["14px", "14px"]
        assert page.axe() == []


def test_each_block_runs_in_the_direction_of_its_script_and_code_from_left_to_right(page: Browser) -> None:
    answer = "English.\n\nשבת (שבת).\n\n- שבת\n\n  ```\n  שבת = 1\n  ```"
    with live(scripted(answer)) as service:
        page.open(service.url)
        page.say("שבת")
        page.answered()
        found = page.js(
            "return [...document.querySelectorAll(arguments[0])].map((e) => getComputedStyle(e).direction)", BLOCKS
        )
        assert found == ["rtl", "ltr", "rtl", "rtl", "ltr"]


def test_a_table_that_is_too_wide_for_a_phone_is_scrolled_and_breaks_no_word(page: Browser) -> None:
    row = "| discipline | committee | functional | paradigm | appeared |\n"
    with live(scripted(row + "| - | - | - | - | - |\n" + row)) as service:
        page.look(PHONE, "light")
        page.open(service.url)
        page.say("Hi")
        page.answered()
        heights = page.js("return [...document.querySelectorAll('.said th')].map((each) => each.clientHeight)")
        assert max(heights) < 40
        assert page.js(
            "const { scrollWidth, clientWidth } = document.querySelector('.wide'); return scrollWidth > clientWidth"
        )
        assert page.js("return document.documentElement.scrollWidth <= innerWidth")


BLOCKS = ".mine, .said > p, .said > ul, .said pre"
ALIGNMENTS = "[...document.querySelectorAll('.said td')].map((each) => getComputedStyle(each).textAlign)"
SIZES = "[...document.querySelectorAll('.said code')].map((each) => getComputedStyle(each).fontSize)"


def test_blocks_that_stay_the_same_keep_their_elements(page: Browser) -> None:
    """So that text which somebody has selected stays selected while more is written."""
    with live() as service:
        page.open(service.url)
        script = r"""
        const done = arguments[0];
        import("/page/markdown.js").then(({ show }) => {
          const target = document.createElement("div");
          show(target, "one\n\n- two\n\nthr");
          const before = [...target.children];
          show(target, "one\n\n- two\n\nthree\n\nfour");
          done([...target.children].map((each) => before.includes(each)));
        });
        """
        assert page.driver.execute_async_script(script) == [True, True, False, False]


def test_what_a_model_writes_stays_text(page: Browser) -> None:
    with live(scripted(f"{HOSTILE}</think>{HOSTILE}")) as service:
        page.open(service.url)
        page.js("document.getElementById('thinking').value = 'true'")
        page.say(HOSTILE.replace("\n", " "))
        page.answered()
        assert page.js("return document.title").startswith("Chat ")
        shown = page.js("return document.getElementById('turns').textContent")
        for piece in ("<script>document.title", '<img src=x onerror="', "<iframe src=", "<base href=", "</code></pre>"):
            assert shown.count(piece) == 3 * HOSTILE.count(piece) > 0, piece
        links = page.js("return [...document.querySelectorAll('#turns a')].map((each) => each.protocol)")
        assert set(links) == {"https:"}
        [found] = rendered(page, HOSTILE)
        assert set(found["tags"]) <= HARMLESS
        assert {name for name, _ in found["attributes"]} <= ATTRIBUTES


ATTRIBUTES = {"href", "rel", "target", "class", "type", "tabindex", "role", "aria-label", "start", "dir"}
MARKS = "abc <>&\"'`*_~#-+|()[]!:/\\\n\t1.>=" + "\u202e\u0000é"


def test_any_text_becomes_harmless_elements(page: Browser) -> None:
    texts = st.lists(st.text(MARKS, max_size=200), min_size=50, max_size=50)

    @settings(max_examples=20, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(texts)
    def law(texts: list[str]) -> None:
        for found in rendered(page, *texts):
            assert set(found["tags"]) <= HARMLESS
            assert {name for name, _ in found["attributes"]} <= ATTRIBUTES
            targets = [value for name, value in found["attributes"] if name == "href"]
            assert all(target.startswith(("http://", "https://")) for target in targets)

    with live() as service:
        page.open(service.url)
        law()


def test_long_lines_of_marks_do_not_stop_the_page(page: Browser) -> None:
    with live() as service:
        page.open(service.url)
        marks = ["`", "``` ", "*", "**a ", "_", "[", "](", "> ", "- ", "|", "# ", "*_", "~~", "https://", "  "]
        for found in rendered(page, *(mark * 4000 for mark in marks), "\n".join(["> " * 500] * 20)):
            assert set(found["tags"]) <= HARMLESS


@pytest.mark.model
def test_the_real_model_answers_in_the_page(page: Browser) -> None:
    with process(*SMALL) as service:
        service.wait_listening()
        page.open(service.url)
        page.wait(lambda: page.state() == "ready", "the model is loaded")
        page.id("temperature").send_keys("0")
        page.id("max-tokens").send_keys("12")
        page.say("What is the capital of France? Answer in one word.")
        page.answered()
        assert "Paris" in page.text(".said")
        page.go("live")
        page.wait(lambda: "answered" in page.text("#latest tbody"), "the live part tells of it")
        service.terminate()
        page.wait(lambda: page.state() == "unreachable", "the page sees that it is gone")
        assert service.wait() == 0
