"""One browser for each module, and pages of it that must do nothing that is forbidden."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser

from tests.support.browser import Tab, chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run a browser."""
    with chromium() as started:
        yield started


@pytest.fixture
def open_tab(browser: Browser) -> Iterator[Callable[..., Tab]]:
    """Return a function that opens a tab on an origin; at the end nothing bad may have happened."""
    opened: list[Tab] = []

    def make(origin: str, *, runs_scripts: bool = True) -> Tab:
        opened.append(Tab(browser, origin, runs_scripts=runs_scripts))
        return opened[-1]

    yield make
    for tab in opened:
        tab.close()
