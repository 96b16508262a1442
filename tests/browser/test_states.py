"""What an operator sees in each state of a deployment, judged by axe-core and html-validate.

Each page fits a phone and a wide screen, in light and in dark. `TEST_SCREENSHOTS` keeps pictures.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.support.browser import LOOKS, Tab, axe_source, check_html
from tests.support.depth import takes_long
from tests.support.harness import NOW
from tests.support.operated import NAME, TOKEN, Deployment, Mode, lifecycle, open_deployment
from tests.support.waiting import wait_until

pytestmark = takes_long

_TOO_WIDE = """
[...document.querySelectorAll('.tiles dt, .tiles dd')]
    .filter(one => one.scrollWidth > one.clientWidth).map(one => one.innerText)
"""
SHOP_PATH = "/dead-letters/shop%3Aopen"


def healthy(deployment: Deployment, tab: Tab) -> Iterator[str]:
    """All is well, after an hour with traffic."""
    deployment.send(*lifecycle("vs_healthy", "created", "processing", "verified"))
    deployment.fill_last_hour()
    deployment.wait_until_counted()
    tab.open("/").get_by_role("heading", name="All is well").wait_for()
    yield "overview"
    for name in ("sessions", "dead-letters", "handlers", "endpoints"):
        tab.open(f"/{name}")
        yield name


def redis_gone(deployment: Deployment, tab: Tab) -> Iterator[str]:
    """Redis has ended."""
    os.kill(deployment.sandbox.server.pid, signal.SIGKILL)
    tab.open("/")
    tab.page.get_by_text("does not answer").first.wait_for()
    yield "overview"
    tab.open("/dead-letters", status=503)
    yield "dead-letters"


def handler_down(deployment: Deployment, tab: Tab) -> Iterator[str]:
    """A handler's destination refuses connections, and its circuit is open."""
    deployment.fill_last_hour()
    deployment.turn(Mode.DOWN)
    deployment.send(*(lifecycle(f"vs_{number}", "created")[0] for number in range(20)))
    with deployment.client() as client:
        wait_until(lambda: client.keys("*circuit*"))
    tab.open("/")
    yield "overview"
    tab.open("/handlers")
    yield "handlers"
    tab.open("/sessions/vs_1")
    yield "session"


def dead_letters(deployment: Deployment, tab: Tab) -> Iterator[str]:
    """A handler has given up on some transitions."""
    deployment.fill_last_hour()
    deployment.bury(*(lifecycle(f"vs_dead{number}", "created")[0] for number in range(60)))
    tab.open("/")
    yield "overview"
    tab.open("/dead-letters")
    yield "all"
    tab.open(SHOP_PATH)
    yield "handler"
    tab.page.locator(f'main a[href^="{SHOP_PATH}/"]').first.click()
    yield "letter"


def no_receiver(deployment: Deployment, tab: Tab) -> Iterator[str]:
    """The last receiver has stopped."""
    deployment.fill_last_hour()
    deployment.send(*lifecycle("vs_1", "created"))
    assert deployment.receiver.stop() == 0
    tab.open("/")
    yield "overview"


def session(deployment: Deployment, tab: Tab) -> Iterator[str]:
    """A result was reversed; copies and a late event arrived; a handler gave up and failed."""
    events = lifecycle("vs_reversed", "created", "processing", "verified", "requires_input")
    deployment.send(*events)
    deployment.send(events[0], events[2], outcomes=["duplicate"])
    late = lifecycle("vs_reversed", *["created"] * 5, "processing", began=NOW - 850)[5]
    deployment.send(late, outcomes=["late"])
    deployment.bury(*lifecycle("vs_reversed", *["created"] * 6, "verified", began=NOW - 600)[6:])
    tab.open("/sessions/vs_reversed")
    yield "session"
    for summary in tab.page.locator("main summary").all():
        summary.click()
    yield "opened"
    tab.open("/sessions/vs_unknown", status=404)
    yield "unknown"
    tab.open("/")
    tab.page.get_by_role("searchbox").fill("evt_reversed_2")
    tab.page.get_by_role("searchbox").press("Enter")
    tab.page.get_by_role("main").get_by_text("vs_reversed").first.wait_for()
    yield "found"
    tab.page.get_by_role("searchbox").fill("no reference of a session")
    tab.page.get_by_role("searchbox").press("Enter")
    tab.page.wait_for_load_state()
    yield "not-found"


def login(deployment: Deployment, tab: Tab) -> Iterator[str]:
    """The form, a wrong token, and who is logged in."""
    tab.open("/login")
    yield "form"
    tab.log_in("a token that is wrong")
    yield "refused"
    tab.log_in(TOKEN)
    tab.page.get_by_text(NAME).first.wait_for()
    yield "accepted"


def replay(deployment: Deployment, tab: Tab) -> Iterator[str]:
    """Dead letters are replayed: before, the question, while it runs, and after."""
    deployment.bury(lifecycle("vs_dead", "created")[0])
    deployment.copy_dead_letter("vs_dead", 20_000)
    tab.open("/login")
    tab.log_in(TOKEN)
    tab.page.get_by_text(NAME).first.wait_for()
    tab.open(SHOP_PATH)
    yield "before"
    main = tab.page.get_by_role("main")
    main.get_by_role("button", name="Drop all").click()
    main.get_by_role("heading", name="Drop 20,001").wait_for()
    yield "drop"
    tab.page.go_back()
    main.get_by_role("button", name="Replay all").click()
    main.get_by_role("heading", name="Replay 20,001").wait_for()
    yield "question"
    main.get_by_role("button", name="Replay them").click()
    main.get_by_role("progressbar").wait_for()
    yield "running"
    main.get_by_role("progressbar").wait_for(state="detached")
    yield "done"
    wait_until(lambda: deployment.count_dead_letters() == 0)
    tab.open(SHOP_PATH)
    yield "after"


STATES = (healthy, redis_gone, handler_down, dead_letters, no_receiver, session, login, replay)


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_state(
    state: Callable[[Deployment, Tab], Iterator[str]],
    tmp_path: Path,
    browser: Browser,
) -> None:
    """Every page of a state fits, is accessible and is valid HTML."""
    axe_source()
    with (
        open_deployment(tmp_path) as deployment,
        Tab(browser, deployment.worker.admin) as tab,
    ):
        deployment.wait_until_published()
        problems: list[str] = []
        pages: list[tuple[str, str]] = []
        for name in state(deployment, tab):
            whole = f"{state.__name__}-{name}"
            pages.append((whole, tab.source()))
            tab.photograph(whole)
            problems += [f"{whole}: {problem}" for problem in _problems(tab)]
        (tmp_path / "html").mkdir()
        assert not problems, "\n".join(problems)
        check_html(pages, tmp_path / "html")


def _problems(tab: Tab) -> Iterator[str]:
    """Yield what is wrong with the page in the tab, however one looks at it."""
    for width in range(320, 1300, 80):
        tab.page.set_viewport_size({"width": width, "height": 800})
        if beyond := tab.overflow():
            yield f"{width}: {beyond} pixels beyond the right edge"
        yield from (f"{width}: {text} beyond its tile" for text in tab.page.evaluate(_TOO_WIDE))
    for looks in LOOKS:
        tab.look(looks)
        if beyond := tab.overflow():
            yield f"{looks}: {beyond} pixels beyond the right edge"
        yield from (f"{looks}: {problem}" for problem in tab.accessibility_problems())
