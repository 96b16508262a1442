"""What others chose is shown as text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import orjson
import pytest
from playwright.sync_api import Browser

from service.transitions.transition import SessionChange
from tests.support.browser import Tab
from tests.support.depth import takes_long
from tests.support.operated import KEYS, SHOP, Deployment, lifecycle, open_deployment

pytestmark = takes_long

SHOP_PATH = "/dead-letters/shop%3Aopen"
HOSTILE = {
    "script": "<script>window.pwned = 1</script>",
    "image": '"><img src=x onerror="window.pwned = 1">',
    "single quote": "' onmouseover='window.pwned = 1' autofocus onfocus='window.pwned = 1",
    "end of title": "</title></style></textarea><svg onload='window.pwned = 1'>",
    "template": "{{ 7 * 7 }}{% raw %}",
    "address": "javascript:window.pwned=1",
    "other origin": "//example.invalid/x?<link rel=stylesheet href=//example.invalid>",
    "entity": "&lt;b&gt; &amp;amp; &#60;i&#62;",
    "direction": "\u202egnp\u2066.exe",
    "long": "long" * 200,
}
PAGES = ("/", "/sessions", "/dead-letters", SHOP_PATH, "/handlers", "/endpoints")


def _change(hostile: str) -> bytes:
    """Return a packed change in which every text is hostile."""
    others = {"occurred_at", "livemode", "related_person", "metadata"}
    texts = dict.fromkeys(set(SessionChange.__struct_fields__) - others, hostile)
    further = {"occurred_at": "2026-01-01T00:00:00Z", "metadata": {hostile: hostile}}
    return orjson.dumps({**texts, **further})


def _plant(deployment: Deployment, hostile: str) -> None:
    """Write a dead letter, and an attempt of a genuine event, in which every text is hostile."""
    failure = {"reason": hostile, "error": hostile, "place": hostile}
    entry = {"change": _change(hostile), "previous": hostile, "sequence": 1, "epoch": 1}
    partition = KEYS.partition("vs_genuine")
    with deployment.client() as client:
        letter: dict[Any, Any] = {**entry, "entry_id": hostile, **failure, "attempts": 3}
        client.xadd(KEYS.dead_letters(0, SHOP), letter)
        attempt: dict[Any, Any] = {"event": "evt_genuine_0", "outcome": hostile, "attempt": 7}
        client.xadd(KEYS.finished_attempts(partition, SHOP), {**attempt, **failure})


def _looked_at(tab: Tab, path: str) -> str:
    """Return the text of a page in which no script of a stranger's has run."""
    response = tab.page.goto(path)
    assert response is not None
    assert response.status < 500, path
    assert tab.page.evaluate("window.pwned") is None, path
    text: str = tab.page.locator("body").inner_text()
    return text


def _letters(tab: Tab) -> list[str]:
    tab.open(SHOP_PATH)
    links = tab.page.locator(f'main a[href^="{SHOP_PATH}/"]')
    found = (link.get_attribute("href") for link in links.all())
    return [path for path in found if path and re.search(r"/\d+-\d+-\d+$", path)]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Run a deployment with a genuine session."""
    with open_deployment(tmp_path_factory.mktemp("hostile")) as opened:
        opened.bury(*lifecycle("vs_genuine", "created"))
        yield opened


def test_hostile_texts_are_text(deployment: Deployment, browser: Browser) -> None:
    """Nothing that is stored runs, opens a dialog, leaves the origin or adds an element."""
    for hostile in HOSTILE.values():
        _plant(deployment, hostile)
    with Tab(browser, deployment.worker.admin) as tab:
        for path in (*PAGES, "/sessions/vs_genuine"):
            _looked_at(tab, path)
        shown = [_looked_at(tab, path) for path in _letters(tab)]
        assert len(shown) == len(HOSTILE) + 1
        for hostile in HOSTILE.values():
            short = " ".join(hostile.split())[:60]
            assert any(short in " ".join(text.split()) for text in shown), hostile


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_hostile_requests_are_text(deployment: Deployment, browser: Browser, hostile: str) -> None:
    """Neither does anything in a path, a query or the search field."""
    with Tab(browser, deployment.worker.admin) as tab:
        quoted = quote(hostile, safe="")
        for path in ("/sessions", "/dead-letters", SHOP_PATH, "/handlers", "/actions", ""):
            _looked_at(tab, f"{path}/{quoted}")
        for name in ("reason", "session", "since", "until", "before", quoted):
            _looked_at(tab, f"{SHOP_PATH}?{name}={quoted}")
        tab.open("/")
        tab.page.get_by_role("searchbox").fill(hostile)
        tab.page.get_by_role("searchbox").press("Enter")
        tab.page.wait_for_load_state()
        assert tab.page.evaluate("window.pwned") is None
