"""A headless Chromium that opens pages from the disk, and says what they ask for and complain of."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

try:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait
except ModuleNotFoundError:
    webdriver = None

REQUIRED = "AGREPA_TESTS_NEED_CHROMIUM"  # set in CI: there a missing browser is a failure
_FLAGS = (  # root has no sandbox, and the browser must not call home
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--mute-audio"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


class Page:
    """A page in the browser."""

    def __init__(self, driver: "webdriver.Chrome"):
        self.driver = driver

    def open(self, path: Path, query: str = "") -> None:
        self.driver.get(path.absolute().as_uri() + query)

    def look(self, width: int, *, dark: bool) -> None:
        """Give the window a width, and the user's wish for colours."""
        sizes = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
        wish = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [wish]})

    def run(self, script: str, *arguments: object) -> object:
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str, *arguments: object) -> object:
        """Wait until a script returns something true, and return that."""
        return WebDriverWait(self.driver, 20, 0.02).until(lambda driver: driver.execute_script(script, *arguments))

    def until(self, true: Callable[[], bool]) -> None:
        """Wait until a function of this process returns true."""
        WebDriverWait(self.driver, 20, 0.02).until(lambda _: true())

    def click(self, selector: str, number: int = 0) -> None:
        self.driver.find_elements(By.CSS_SELECTOR, selector)[number].click()

    def type(self, selector: str, text: str) -> None:
        self.driver.find_element(By.CSS_SELECTOR, selector).send_keys(text)

    def press(self, key: str) -> None:
        """Press a key: a character, or a name of selenium's Keys such as ARROW_RIGHT."""
        self.type("body", getattr(Keys, key, key))

    def complaints(self) -> list[str]:
        """Errors and warnings of the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]

    def requests(self) -> list[str]:
        """What pages from the disk asked for since the last call, but themselves and what they hold in themselves."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [
            one["request"]["url"][:100]
            for one in sent
            if one["documentURL"].startswith("file:")
            and one["request"]["url"] != one["documentURL"]
            and not one["request"]["url"].startswith(("data:", "blob:"))
        ]


@contextmanager
def open_browser(folder: Path) -> Iterator[Page]:
    """Yield a browser with an empty profile in `folder`/profile; it saves downloads into `folder`."""
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, place in programs.items() if place is None]
    if missing or webdriver is None:
        apt = f"no {' and no '.join(missing)}: apt-get install chromium chromium-driver"
        reason = apt if missing else "no selenium: pip install 'agrepa_fast[test]'"
        if REQUIRED in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    for flag in (*_FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(programs["chromedriver"]))
    try:
        yield Page(driver)
    finally:
        driver.quit()
