"""Debian's Chromium, driven by Selenium, and what every look at the page is held to."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson
import pytest
from selenium import webdriver
from selenium.common.exceptions import NoAlertPresentException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.live import ROOT, Live, eventually, live, scripted
from tests.server.test_app import babble

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
AXE = ROOT / ".browser" / "node_modules" / "axe-core" / "axe.min.js"
GONE = re.compile(r"net::ERR_(CONNECTION_REFUSED|CONNECTION_RESET|EMPTY_RESPONSE|INCOMPLETE_CHUNKED_ENCODING)")
PHONE, DESK = (390, 844), (1280, 860)
RUN_AXE = """
const [part, done] = arguments;
axe.run(part).then((found) => done(found.violations), (error) => done(String(error)));
"""


def needed(path: str | Path | None, what: str) -> Path:
    """The path of something that `make browser` installs. Without it a test is skipped, and fails where CI is true."""
    if path is not None and Path(path).exists():
        return Path(path)
    reason = f"{what} is not installed: make browser"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


class Browser:
    """One tab."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str, part: str = "chat") -> None:
        """Load one part of the page, and wait until the page knows the service's state."""
        self.driver.get("about:blank")  # else a change of the part alone loads nothing
        self.driver.get(f"{url}/#{part}")
        self.wait(lambda: self.state() != "connecting", "the page knows the state")

    def look(self, size: tuple[int, int], scheme: str) -> None:
        """Become a screen of this size, in light or dark."""
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},  # what is clicked must not be on its way
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def go(self, part: str) -> None:
        self.all(f'nav a[href="#{part}"]')[0].click()

    def state(self) -> str:
        return self.id("pill").get_attribute("data-state") or "connecting"

    def id(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """What the elements say together."""
        return "\n".join(self.texts(selector))

    def texts(self, selector: str) -> list[str]:
        """In one step, because elements may be drawn anew at any time."""
        script = "return [...document.querySelectorAll(arguments[0])].map((each) => each.innerText)"
        found: list[str] = self.driver.execute_script(script, selector)
        return found

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        eventually(condition, what, pause=0.05)  # each look is a message to the browser

    def say(self, text: str) -> None:
        """Ask in the chat, by keyboard."""
        self.id("question").send_keys(text, Keys.ENTER)

    def press(self, label: str, within: str = "body") -> None:
        """Click the last button with this label that is seen."""
        buttons = [each for each in self.all(f"{within} button") if each.is_displayed() and each.text == label]
        buttons[-1].click()

    def alert(self) -> str | None:
        """What a dialog of the browser's own says, if there is one."""
        try:
            return str(self.driver.switch_to.alert.text)
        except NoAlertPresentException:
            return None

    def dismissed(self) -> str:
        """Close that dialog; what it said."""
        shown = self.driver.switch_to.alert
        text = str(shown.text)
        shown.dismiss()
        return text

    def answered(self, count: int = 1) -> None:
        self.wait(lambda: len(self.all(".answer:not([aria-busy])")) >= count, f"{count} answers are complete")

    def complaints(self) -> list[str]:
        """Errors in the console since the last call, but for those of asking a server that has stopped."""
        logs: list[dict[str, Any]] = self.driver.get_log("browser")
        errors = [entry["message"] for entry in logs if entry["level"] == "SEVERE"]
        return [error for error in errors if not GONE.search(error)]

    def asked(self) -> list[str]:
        """Addresses of all that was asked for since the last call."""
        messages = [orjson.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]

    def axe(self, part: str = "html") -> list[str]:
        """What axe-core finds in a part of the page that is serious or worse."""
        self.js(needed(AXE, "axe-core").read_text())
        found = self.driver.execute_async_script(RUN_AXE, part)
        assert isinstance(found, list), found
        serious = [rule for rule in found if rule["impact"] in ("serious", "critical")]
        return [f"{rule['id']}: {[node['html'][:120] for node in rule['nodes']]}" for rule in serious]


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a profile of its own, which is gone afterwards."""
    chromium = needed(shutil.which("chromium"), "Chromium")
    chromedriver = needed(shutil.which("chromedriver"), "Chromium's driver")
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = str(chromium)
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(str(chromedriver)))
        try:
            driver.set_script_timeout(60)
            yield Browser(driver)
        finally:
            driver.quit()


@contextlib.contextmanager
def half_said(page: Browser) -> Iterator[Live]:
    """A server in the middle of the answer to the page's first question: three letters have come, no more do so."""
    with live(scripted(babble, stepped=True)) as service:
        page.open(service.url)
        page.say("Hi")
        service.wait_running()
        service.engine.release(3)
        page.wait(lambda: page.text(".said") == "xxx", "three letters are there")
        yield service
