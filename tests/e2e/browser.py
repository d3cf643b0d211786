"""Chromium without a window, driven as a person would: look for something on the page, wait until it is there, click.

Everything that it writes lies below one directory, and no process of it outlives its block. Knows no page of Jupyter's.
"""

import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement

from e2e.host import descendants, eventually, processes

_T = TypeVar("_T")
LONG = 120.0
"""Seconds: far more than any answer of a page takes."""
_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # root may not have one
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
    "--window-size=1600,1200",
)


@dataclasses.dataclass(frozen=True)
class Browser:
    """One window."""

    driver: WebDriver
    directory: Path

    def open(self, address: str) -> None:
        """Go there."""
        self.driver.get(address)

    def find(self, css: str, text: str = "", seconds: float = LONG) -> WebElement:
        """The first visible element that this selector finds and that has the text in it, as soon as there is one."""
        return self._until(lambda: self._find(css, text), f"nothing visible is {css!r} with {text!r}", seconds)

    def text(self, css: str, text: str = "") -> str:
        """What such an element says."""
        return str(self._until(lambda: self._find(css, text).text, f"nothing visible is {css!r} with {text!r}"))

    def click(self, css: str, text: str = "") -> None:
        """Click such an element, also if the page is made anew meanwhile."""
        self._until(lambda: self._find(css, text).click(), f"{css!r} with {text!r} cannot be clicked")

    def double_click(self, css: str, text: str = "") -> None:
        """The same, twice."""

        def act() -> None:
            ActionChains(self.driver).double_click(self._find(css, text)).perform()

        self._until(act, f"{css!r} with {text!r} cannot be clicked")

    def has(self, css: str, text: str = "") -> bool:
        """Whether there is such an element at this moment."""
        with contextlib.suppress(WebDriverException):
            return self._find(css, text) is not None
        return False

    def inside(self, css: str) -> str:
        """The text of the page in a frame, as soon as there is some."""

        def read() -> str:
            self.driver.switch_to.frame(self._find(css, ""))
            try:
                found = self.driver.find_element(By.TAG_NAME, "body").text
            finally:
                self.driver.switch_to.default_content()
            if not found.strip():
                raise WebDriverException("the frame is empty")
            return str(found)

        return self._until(read, f"no text in {css!r}")

    def picture(self, name: str) -> Path:
        """How the window looks now."""
        path = self.directory / f"{name}.png"
        self.driver.save_screenshot(str(path))
        return path

    def _find(self, css: str, text: str) -> WebElement:
        for element in self.driver.find_elements(By.CSS_SELECTOR, css):
            if element.is_displayed() and text in element.text:
                return element
        raise WebDriverException(f"nothing visible is {css!r} with {text!r}")

    def _until(self, act: Callable[[], _T], words: str, seconds: float = LONG) -> _T:
        deadline = time.monotonic() + seconds
        while True:
            try:
                return act()
            except WebDriverException as error:
                if time.monotonic() > deadline:
                    raise AssertionError(f"{words}, within {seconds:.0f} s: {error.msg}") from error
            time.sleep(0.1)


@contextlib.contextmanager
def browser(directory: Path) -> Iterator[Browser]:
    """A new browser with a profile of its own. What fails in the block is told where to find a picture of it."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("there is no chromium or no chromedriver (Debian: chromium, chromium-driver)")
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as short:  # sockets: 107 bytes
        yield from _browse(directory, Path(short), chromium, chromedriver)


def _browse(directory: Path, short: Path, chromium: str, chromedriver: str) -> Iterator[Browser]:
    directory.mkdir(parents=True)
    for name in ("profile", "home", "tmp"):
        (short / name).mkdir()
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*_FLAGS, f"--user-data-dir={short / 'profile'}", f"--crash-dumps-dir={short / 'tmp'}"):
        options.add_argument(flag)
    service = webdriver.ChromeService(
        executable_path=chromedriver,
        log_output=str(directory / "chromedriver.log"),
        env={
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(short / "home"),
            "TMPDIR": str(short / "tmp"),
            "LANG": "C.UTF-8",
        },
    )
    driver = webdriver.Chrome(options=options, service=service)
    below = descendants(service.process.pid)
    one = Browser(driver, directory)
    try:
        yield one
    except BaseException as error:
        with contextlib.suppress(WebDriverException):
            error.add_note(f"the page: {one.picture('failed')}")
            (directory / "failed.html").write_text(driver.page_source, encoding="utf-8")
        raise
    finally:
        below |= descendants(service.process.pid)
        driver.quit()
        assert eventually(lambda: not below & processes().keys(), 30)
