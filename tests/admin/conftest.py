"""The page as its tests call it: without a socket, or on a listener, and with tokens to log in."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest

from service.admin.app import AdminApp
from service.admin.page import Page
from service.admin.rendering import Renderer
from service.config import Settings
from service.storage.connections import Connections
from service.storage.keys import Keys
from tests.support.logins import ORIGIN, OpenPage
from tests.support.web_client import asgi_client


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
        ready: Any = None
        app = AdminApp(ready, page or make_page(**changes))
        async with asgi_client(app) as client:
            client.headers |= ORIGIN
            yield client

    return open_it


@pytest.fixture
async def client(open_page: OpenPage) -> AsyncIterator[httpx2.AsyncClient]:
    """Yield a client of a page that needs no login, and has none."""
    async with open_page() as opened:
        yield opened
