"""What an operator does at night: find a session, log in, replay a dead letter, watch it arrive."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, Request, expect

from tests.support.browser import Tab
from tests.support.depth import takes_long
from tests.support.operated import TOKEN, Deployment, lifecycle, open_deployment

pytestmark = takes_long

SHOP_PATH = "/dead-letters/shop%3Aopen"
# Several times as long as the page waits until it refreshes itself.
LONG_MS = 30_000


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Run a deployment."""
    with open_deployment(tmp_path_factory.mktemp("acting")) as opened:
        yield opened


@pytest.mark.parametrize("runs_scripts", [True, False], ids=["scripts", "no scripts"])
def test_a_dead_letter_is_found_and_replayed(
    deployment: Deployment, browser: Browser, runs_scripts: bool
) -> None:
    """From the search field to the timeline that shows the delivery, by clicks alone."""
    session = f"vs_replayed{runs_scripts:d}"
    deployment.bury(*lifecycle(session, "created"))
    with Tab(browser, deployment.worker.admin, runs_scripts=runs_scripts) as tab:
        main = tab.open("/").get_by_role("main")
        _search(tab.page, session)
        expect(main).to_contain_text("dead letter")
        tab.page.get_by_role("link", name="Log in").click()
        tab.log_in(TOKEN)
        _search(tab.page, session)
        main.get_by_role("link", name=re.compile("dead letter", re.IGNORECASE)).first.click()
        main.get_by_role("button", name="Replay it").click()
        main.get_by_role("button", name="Replay it").click()
        expect(tab.page).to_have_url(re.compile(r"/actions/[^/]+$"))
        _until(tab.page, "was replayed", runs_scripts=runs_scripts)
        assert deployment.count_dead_letters() == 0
        _search(tab.page, session)
        _until(tab.page, "replay", runs_scripts=runs_scripts)
        expect(main).not_to_contain_text("dead letter")


def test_the_page_refreshes_itself(deployment: Deployment, browser: Browser) -> None:
    """An event that arrives meanwhile appears; the page is not loaded anew."""
    first, second = lifecycle("vs_watched", "created", "processing")
    deployment.send(first)
    with Tab(browser, deployment.receiver.admin) as tab:
        page = tab.open("/sessions/vs_watched")
        page.evaluate("window.wasLoadedOnce = true")
        expect(page.get_by_role("main")).not_to_contain_text("processing")
        deployment.send(second)
        expect(page.get_by_role("main")).to_contain_text("processing")
        assert page.evaluate("window.wasLoadedOnce")


def test_what_is_in_use_is_left_alone(deployment: Deployment, browser: Browser) -> None:
    """Nothing is fetched while a form is filled in, or while the focus is in the page."""
    deployment.bury(*lifecycle("vs_filtered", "created"))
    with Tab(browser, deployment.worker.admin) as tab:
        fetched: list[str] = []
        tab.page.on("request", lambda sent: fetched.append(sent.url) if _is_refresh(sent) else None)
        tab.page.clock.install()
        field = tab.open(SHOP_PATH).get_by_label("Session", exact=True)
        field.fill("vs_")
        # What was fetched before that, on a slow machine, was rightly so.
        fetched.clear()
        tab.page.clock.run_for(LONG_MS)
        expect(field).to_have_value("vs_")
        assert fetched == []
        link = tab.open("/").get_by_role("main").get_by_role("link").first
        link.focus()
        fetched.clear()
        tab.page.clock.run_for(LONG_MS)
        assert fetched == []
        link.blur()
        with tab.page.expect_request(_is_refresh):
            tab.page.clock.run_for(LONG_MS)


def _is_refresh(request: Request) -> bool:
    return request.resource_type == "fetch"


def _search(page: Page, session: str) -> None:
    field = page.get_by_role("searchbox")
    field.fill(session)
    field.press("Enter")
    expect(page).to_have_url(re.compile(rf"/sessions/{session}$"))


def _until(page: Page, text: str, *, runs_scripts: bool) -> None:
    """Wait until the page shows a text; without scripts, the reader loads it again."""
    main = page.get_by_role("main")
    while not runs_scripts and text not in main.inner_text():
        page.reload()
    expect(main).to_contain_text(text)
