"""Many who ask at once: neither Redis nor the probes beside the page notice."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx2
import pytest

from service.admin.app import MAX_AT_ONCE, AdminApp
from service.admin.page import Page
from service.delivery.consumer_groups import create_groups
from service.runtime.composition import MAX_ADMIN_CONNECTIONS
from service.storage.connections import Connections
from service.storage.keys import Keys
from tests.support.harness import connected, listening, talk
from tests.support.logins import OpenPage
from tests.support.waiting import PATIENCE_S


class Searches:
    """Counts calls of a function that searches in Redis, and how many run at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.count = self.running = self.most = 0

    def watch(self, name: str) -> None:
        """Count the calls of a function of a view."""
        module, _, function = name.partition(".")
        read = getattr(importlib.import_module(f"service.admin.views.{module}"), function)

        async def call(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            self.running += 1
            self.most = max(self.most, self.running)
            await asyncio.sleep(0.01)
            try:
                return await read(*arguments, **named)
            finally:
                self.running -= 1

        self._monkeypatch.setattr(f"service.admin.views.{name}", call)


@pytest.fixture
async def searches(
    connections: Connections, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> Searches:
    """Return what counts searches, in a deployment with one handler."""
    await create_groups(connections, keys, ["log"])
    return Searches(monkeypatch)


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
    ready: Any = None
    app = AdminApp(ready, make_page())
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
    ("read", "method", "path"),
    [
        ("sessions.search", "POST", "/sessions"),
        ("sessions.read_timeline", "GET", "/sessions/vs_1"),
        ("dead_letters.read_page", "GET", "/dead-letters/log"),
    ],
)
async def test_redis_does_one_search_at_a_time(
    client: httpx2.AsyncClient, searches: Searches, read: str, method: str, path: str
) -> None:
    """What looks at thousands of entries is done for one viewer after the other."""
    searches.watch(read)
    data = {"text": "evt_1"} if method == "POST" else None
    found = await asyncio.gather(*(client.request(method, path, data=data) for _ in range(10)))

    assert {one.status_code for one in found} <= {200, 404}
    assert (searches.count, searches.most) == (10, 1)


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
