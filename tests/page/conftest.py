"""One browser for all tests of the page, each of which must leave no complaint and no request to elsewhere."""

import re
from collections.abc import Iterator

import pytest

from tests.page.browser import DESK, Browser, browser

OURS = re.compile(r"http://127\.0\.0\.1:\d+/|data:|about:|blob:")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture
def page(chromium: Browser) -> Iterator[Browser]:
    """The browser, for a test that reads with `complaints()` those that it expects."""
    chromium.look(DESK, "light")
    chromium.driver.get("about:blank")  # in place of the browser's own first page, or of the last test's
    chromium.complaints()
    chromium.asked()
    yield chromium
    assert chromium.complaints() == []
    assert [url for url in chromium.asked() if not OURS.match(url)] == []
