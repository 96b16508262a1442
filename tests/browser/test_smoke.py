"""One look at the page on every run; all other tests with a browser take long."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Browser

from tests.support.browser import Tab
from tests.support.operated import lifecycle, open_deployment


def test_a_browser_opens_the_admin_port(tmp_path: Path, browser: Browser) -> None:
    """The worker's port answers, and nothing that it sends does what is forbidden."""
    with (
        open_deployment(tmp_path) as deployment,
        Tab(browser, deployment.worker.admin) as tab,
    ):
        deployment.send(*lifecycle("vs_1", "created", "processing", "verified"))
        deployment.bury(*lifecycle("vs_2", "created"))
        tab.open("/")
