"""A real browser for the tests of pages: Debian's chromium, headless, through selenium."""

import shutil
from importlib.util import find_spec
from pathlib import Path


CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PATIENCE = 120.0  # seconds until a page shows what is waited for


def missing() -> str | None:
    """Why pages cannot be tested here, or None if they can."""
    for package in ("gradio", "selenium"):
        if find_spec(package) is None:
            return f"{package} is not installed"
    for name, path in (("chromium", CHROMIUM), ("chromedriver", DRIVER)):
        if path is None:
            return f"there is no {name} (Debian: apt-get install chromium chromium-driver)"
    return None


class Browser:
    """One window of chromium."""

    def __init__(self, folder: Path):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", f"user-data-dir={folder}"):
            options.add_argument(f"--{flag}")
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))  # named: none is looked for
        self.width(1280)

    def width(self, pixels: int, height: int = 900) -> None:
        """Give the page this width, which may be less than chromium's least window."""
        size = {"width": pixels, "height": height, "deviceScaleFactor": 1, "mobile": pixels < 700}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def open(self, url: str) -> None:
        self.driver.get(url)

    @property
    def text(self) -> str:
        """All text that can be seen."""
        return self.driver.execute_script("return document.body.innerText")

    def find(self, css: str):
        return self.driver.find_element("css selector", css)

    def there(self, css: str):
        """Return an element as soon as it is there."""
        return self.wait(lambda: self.find(css))

    def find_all(self, css: str) -> list:
        return self.driver.find_elements("css selector", css)

    @property
    def overflow(self) -> int:
        """By how many pixels the page is wider than its window."""
        return self.driver.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )

    def wait(self, holds, what: str = "what is waited for"):
        """Wait until `holds()` is true, and return it; elements that the page replaces meanwhile are looked for again."""
        from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        ignored = (NoSuchElementException, StaleElementReferenceException)
        return WebDriverWait(self.driver, PATIENCE, 0.05, ignored).until(
            lambda _: holds(), f"{what} does not come; at first the page shows:\n{self.text}"
        )

    def wait_for(self, text: str, css: str = "body") -> None:
        """Wait until the page, or an element of it, shows a text."""
        self.wait(lambda: text in self.find(css).text)

    def press(self, key: str) -> None:
        """Press a key while no field is written in."""
        self.find("body").send_keys(key)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write a PNG of the window, or of the whole page."""
        from base64 import b64decode

        found = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": whole})
        path.write_bytes(b64decode(found["data"]))

    def close(self) -> None:
        self.driver.quit()
