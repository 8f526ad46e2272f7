"""A headless Chromium for the tests of the page, and the page as a person sees it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A driver of the Chromium on this machine, with a fresh profile; skips the test where there is none."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # With both paths given, selenium looks for nothing and downloads nothing.
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    try:
        yield started
    finally:
        started.quit()


class Page:
    """The page in a browser, by what is on it rather than by how it is made."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver = driver
        driver.get(address)
        self.until(lambda: self.rows() and self.text("model") != "…")

    def until(self, condition: Callable[[], Any], seconds: float = 30) -> Any:
        """Wait until ``condition()`` holds, and give what it gave."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, f"not within {seconds} s; errors: {self.driver.get_log('browser')}"
            time.sleep(0.02)
        return found

    def run(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(script, *values)

    def rows(self) -> list[dict[str, Any]]:
        """Every visible row, with what a screen reader is told of it."""
        return self.run(
            "return [...document.querySelectorAll('#tree [role=treeitem]')].map(li => ({"
            " name: li.querySelector('.name').textContent, label: li.getAttribute('aria-label'),"
            " level: +li.getAttribute('aria-level'), expanded: li.getAttribute('aria-expanded'),"
            " selected: li.getAttribute('aria-selected'), tabindex: li.tabIndex,"
            " place: [+li.getAttribute('aria-posinset'), +li.getAttribute('aria-setsize')],"
            " parent: li.parentElement.getAttribute('role'), refused: li.classList.contains('refused'),"
            " focused: li === document.activeElement}))"
        )

    def names(self) -> list[str]:
        return [row["name"] for row in self.rows()]

    def row(self, name: str, nth: int = 0) -> dict[str, Any]:
        return [row for row in self.rows() if row["name"] == name][nth]

    def click_row(self, name: str, part: str = ".class", nth: int = 0) -> None:
        """Click on a row, on its arrow (``.twist``) or on its button (``.fold``), where a mouse would."""
        rows = self.driver.find_elements("css selector", "#tree [role=treeitem]")
        row = [row for row, found in zip(rows, self.names(), strict=True) if found == name][nth]
        row.find_element("css selector", f":scope > .node > {part}").click()

    def click(self, id: str) -> None:
        self.driver.find_element("id", id).click()

    def text(self, id: str) -> str:
        return self.driver.find_element("id", id).text

    def keys(self, *keys: str) -> None:
        """Press keys wherever the focus is."""
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    @property
    def focused(self) -> str | None:
        """The name of the row that has the focus."""
        return next((row["name"] for row in self.rows() if row["focused"]), None)

    def method(self, name: str) -> None:
        self.run(
            "const m = document.getElementById('method'); m.value = arguments[0]; m.dispatchEvent(new Event('change'))",
            name,
        )

    def figures(self) -> tuple[str, str]:
        """(sites, parameters), once the server has answered for what is chosen now."""
        self.until(lambda: not self.run("return document.querySelector('.figures.busy')"))
        return self.text("sites"), self.text("parameters")

    def done(self) -> None:
        self.figures()
        self.click("done")
        self.until(lambda: self.run("return !document.getElementById('end').hidden"))
