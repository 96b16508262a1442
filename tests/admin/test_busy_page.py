"""Many who ask at once: neither Redis nor the probes beside the page notice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from types import ModuleType
from typing import Any

import httpx2
import pytest

from service.admin.app import MAX_AT_ONCE
from service.admin.page import Page
from service.admin.views import dead_letters, sessions
from service.runtime.composition import MAX_ADMIN_CONNECTIONS
from tests.support.harness import connected, listening, talk
from tests.support.logins import OpenPage, admin_app
from tests.support.waiting import PATIENCE_S

ASKED = b"GET /endpoints HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def test_open_pages_leave_probes_alone(
    make_page: Callable[..., Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While more pages wait for Redis than the port has connections, probes are answered."""
    asked, answered = 0, asyncio.Event()

    async def wait_for_redis(_: Page) -> Any:
        nonlocal asked
        asked += 1
        await answered.wait()

    monkeypatch.setattr(Page, "overview", wait_for_redis)
    app = admin_app(make_page())
    async with (
        listening(app, max_connections=MAX_ADMIN_CONNECTIONS) as listener,
        AsyncExitStack() as opened,
    ):
        streams = [
            await opened.enter_async_context(connected(listener.port))
            for _ in range(MAX_ADMIN_CONNECTIONS)
        ]
        for _, writer in streams:
            writer.write(ASKED)
        opened.callback(answered.set)
        async with asyncio.timeout(PATIENCE_S / 4):
            refused = [await reader.readline() for reader, _ in streams[MAX_AT_ONCE:]]

        for path in (b"livez", b"metrics"):
            head = b"GET /%b HTTP/1.1\r\nHost: tests\r\nConnection: close\r\n\r\n" % path
            assert (await talk(listener.port, head)).startswith(b"HTTP/1.1 200 ")

    assert asked == MAX_AT_ONCE
    assert {line.split()[1] for line in refused} == {b"503"}


@pytest.mark.parametrize(
    ("view", "name", "method", "path"),
    [
        (sessions, "search", "POST", "/sessions"),
        (sessions, "find_unfetched", "GET", "/sessions/vs_1"),
        (sessions, "read_timeline", "GET", "/sessions/vs_1"),
        (dead_letters, "read_page", "GET", "/dead-letters/log"),
    ],
)
async def test_redis_does_one_search_at_a_time(
    client: httpx2.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    *,
    view: ModuleType,
    name: str,
    method: str,
    path: str,
) -> None:
    """What looks at thousands of entries is done for one viewer after the other."""
    search, searching, count = getattr(view, name), asyncio.Lock(), 0

    async def search_alone(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        assert not searching.locked()
        count += 1
        async with searching:
            await asyncio.sleep(0.01)
            return await search(*arguments, **named)

    monkeypatch.setattr(view, name, search_alone)
    data = {"text": "evt_1"} if method == "POST" else None
    found = await asyncio.gather(*(client.request(method, path, data=data) for _ in range(10)))

    assert {one.status_code for one in found} <= {200, 404}
    assert count == 10


async def test_who_waits_too_long_for_a_search_is_sent_away(
    make_page: Callable[..., Page], open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a search that takes long a page says so instead of waiting without end."""
    monkeypatch.setattr("service.admin.page.SEARCH_WAIT_S", 0.05)
    page = make_page()
    async with open_page(page) as client:
        async with page.searching():
            refused = await client.get("/sessions/vs_1")
        assert refused.status_code == 503
        assert "Too many search at once" in refused.text
        assert (await client.get("/sessions/vs_1")).status_code == 404
