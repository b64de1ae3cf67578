"""Laws of the page at `/docs`: it asks this service, with the key that it was given, and nobody else."""

from collections.abc import Iterator

import pytest
from selenium.webdriver.common.keys import Keys

from tests.live import Live, live
from tests.page.browser import DESK, PHONE, Browser

pytestmark = pytest.mark.browser

ANSWER = ".live-responses-table .response-col_status"
BODY = ".live-responses-table .response-col_description pre"


@pytest.fixture
def locked() -> Iterator[Live]:
    with live(api_keys=("sesame",)) as service:
        yield service


def show(page: Browser, service: Live) -> None:
    page.driver.get(f"{service.url}/docs")
    page.wait(lambda: page.text("h1, h2").startswith("microbatch"), "the document is drawn")


def send(page: Browser, operation: str) -> None:
    """Open an operation and send its example as it is."""
    page.all(f"#operations-OpenAI-{operation} .opblock-summary-control")[0].click()
    page.wait(lambda: len(page.all("button.execute")) == 1, "it can be sent")
    page.all("button.execute")[0].click()
    page.wait(lambda: "Code" in page.texts(ANSWER), "it is answered")


def test_it_sends_the_examples(page: Browser) -> None:
    with live() as service:
        show(page, service)
        assert not page.all(".authorize")
        send(page, "chat_completions")
        assert page.texts(ANSWER) == ["Code", "200"]
        assert "Hello!" in page.text(BODY)


def test_it_sends_them_with_the_key_that_it_is_given(page: Browser, locked: Live) -> None:
    show(page, locked)
    page.all(".btn.authorize")[0].click()
    page.wait(lambda: len(page.all(".auth-container input")) == 1, "it asks for the key")
    page.all(".auth-container input")[0].send_keys("sesame", Keys.ENTER)
    page.all(".btn-done")[0].click()
    send(page, "models")
    assert page.texts(ANSWER) == ["Code", "200"]
    assert '"scripted"' in page.text(BODY)
    assert page.js("return [localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_it_has_the_key_that_the_page_was_given_in_this_tab(page: Browser, locked: Live) -> None:
    page.driver.get(locked.url)
    page.wait(lambda: page.id("asks-key").is_displayed(), "the page asks for the key")
    page.id("key").send_keys("sesame", Keys.ENTER)
    page.wait(lambda: page.state() == "ready", "the key is right")
    assert all("401" in complaint for complaint in page.complaints())
    show(page, locked)
    send(page, "models")
    assert page.texts(ANSWER) == ["Code", "200"]


def test_it_leads_back_to_the_page_where_there_is_one(page: Browser) -> None:
    with live() as service:
        show(page, service)
        page.driver.find_element("link text", "Chat and live view").click()
        page.wait(lambda: page.state() == "ready", "the page is there")
    with live(page=False) as service:
        show(page, service)
        assert page.texts("header a") == ["openapi.json"]


@pytest.mark.parametrize(("size", "scheme"), [(DESK, "light"), (PHONE, "dark")])
def test_everyone_can_use_it(page: Browser, locked: Live, size: tuple[int, int], scheme: str) -> None:
    page.look(size, scheme)
    show(page, locked)
    assert page.js("return document.documentElement.classList.contains('dark-mode')") == (scheme == "dark")
    for operation in ("responses_one_delete", "chat_completions"):
        page.all(f"#operations-OpenAI-{operation} .opblock-summary-control")[0].click()
    page.js("document.querySelector('.json-schema-2020-12-expand-deep-button').click()")
    page.wait(lambda: len(page.all("button.execute")) == 2, "both can be sent")
    assert page.axe() == []
    page.all(".btn.authorize")[0].click()
    page.wait(lambda: len(page.all(".auth-container input")) == 1, "it asks for the key")
    assert page.axe(".dialog-ux") == []


def test_operations_open_by_keyboard(page: Browser) -> None:
    with live() as service:
        show(page, service)
        page.js("document.querySelector('#operations-OpenAI-models .opblock-summary-control').focus()")
        page.driver.switch_to.active_element.send_keys(Keys.ENTER)
        page.wait(lambda: len(page.all("button.execute")) == 1, "it is open")
        assert page.js("return location.hash") == "#/OpenAI/models"
