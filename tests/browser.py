"""A real browser for tests: Debian's Chromium, without a screen."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from playwright.sync_api import sync_playwright

from tests.tools import require

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser

# No sandbox: CI runs as root. Docker gives a container 64 MB of /dev/shm. The others keep Chromium from calling home.
_FLAGS = (
    *(
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ),
    *("--disable-component-update", "--disable-sync"),
)


@contextmanager
def chromium() -> Iterator[Browser]:
    """While inside, no asyncio code runs in this thread: Playwright's own loop does."""
    path = require("chromium", "chromium-browser", "google-chrome")  # the last two are Ubuntu's and Google's names
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(_FLAGS))
        try:
            yield browser
        finally:
            browser.close()
