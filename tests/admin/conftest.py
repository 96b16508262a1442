"""The page as its tests call it: without a socket, or on a listener, and with tokens to log in."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
import structlog

from service.admin.page import Page
from service.admin.rendering import Renderer
from service.config import Settings
from service.parsers import FETCH
from service.storage.connections import Connections
from service.storage.keys import Keys
from tests.support.logins import ORIGIN, OpenPage, admin_app
from tests.support.transitions import stored_entry, stored_notification
from tests.support.web_client import asgi_client

LETTER = {"entry_id": "1-0", "reason": "exhausted", "error": "ValueError", "attempts": 3,
          "place": "my_handler.py:41 in post"}  # fmt: skip
AddLetter = Callable[..., Awaitable[str]]


@functools.cache
def _renderer() -> Renderer:
    """Return the templates, compiled once for all tests."""
    return Renderer()


@pytest.fixture
def make_page(
    connections: Connections, make_settings: Callable[..., Settings], keys: Keys
) -> Callable[..., Page]:
    """Return a factory of pages on one Redis, each as in a process of its own."""

    def make(**changes: Any) -> Page:
        page = Page(make_settings(**changes), connections, keys)
        page._renderer = _renderer()
        return page

    return make


@pytest.fixture
def open_page(make_page: Callable[..., Page]) -> OpenPage:
    """Return what opens a client of the admin port, which sends the page's own origin."""

    @asynccontextmanager
    async def open_it(
        page: Page | None = None, **changes: Any
    ) -> AsyncIterator[httpx2.AsyncClient]:
        async with asgi_client(admin_app(page or make_page(**changes))) as client:
            client.headers |= ORIGIN
            yield client

    return open_it


@pytest.fixture
async def client(open_page: OpenPage) -> AsyncIterator[httpx2.AsyncClient]:
    """Yield a client of a page that needs no login, and has none."""
    async with open_page() as opened:
        yield opened


@pytest.fixture
def lines() -> Iterator[list[structlog.typing.EventDict]]:
    """Yield the lines that the test logs."""
    with structlog.testing.capture_logs() as captured:
        yield captured


@pytest.fixture
def add_letter(connections: Connections, keys: Keys) -> AddLetter:
    """Return what adds a dead letter, which *fields* change, and returns its id."""
    client: Any = connections.client

    async def add(session: str = "vs_1", *, handler: str = "log", **fields: Any) -> str:
        stored = stored_notification if handler == FETCH else stored_entry
        partition = keys.partition(session)
        stream = keys.dead_letters(partition, handler)
        entry_id = await client.xadd(stream, stored(session, 1) | LETTER | fields)
        return f"{partition}-{entry_id.decode()}"

    return add
