"""Takes pictures of the dashboard: `python tests/coordinator/screenshot.py URL OUT.png`.

URL is the dashboard's with its fragment, e.g. 'http://127.0.0.1:8080/#token=SECRET&run=demo'.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox",
    "--headless=new",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find_browser() -> str | None:
    """The path of a Chromium, or None where none is installed."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A headless Chromium; raises RuntimeError where none is installed."""
    path = find_browser()
    if path is None:
        raise RuntimeError(f"none of {', '.join(_NAMES)} is on PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("out")
    parser.add_argument("--width", type=int, default=1360)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--theme", choices=["light", "dark"], default="light")
    parser.add_argument("--seconds", type=float, default=3.0, help="to wait for the page's values")
    asked = parser.parse_args()
    with open_browser() as browser:
        page = browser.new_page(
            viewport={"width": asked.width, "height": asked.height},
            color_scheme=asked.theme,
            device_scale_factor=2,
        )
        page.goto(asked.url)
        page.wait_for_selector("main h1")
        page.wait_for_timeout(asked.seconds * 1000)
        page.screenshot(path=asked.out, full_page=True)


if __name__ == "__main__":
    main()
