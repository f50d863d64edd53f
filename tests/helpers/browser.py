"""A real browser for the tests of pages: Chromium through Playwright; where there is none, the tests skip."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
"""It runs as root in containers, and asks nobody for anything that a page does not ask for."""


@contextmanager
def browser() -> Iterator["Browser"]:
    """Chromium as Debian and others install it; the test that wants it is skipped where it or Playwright is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"there is no browser here: none of {', '.join(NAMES)}")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=OPTIONS)
        try:
            yield opened
        finally:
            opened.close()
