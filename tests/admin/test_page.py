"""The page: its routes, its layout, its errors, and what it needs to be there at all."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from service.admin import app, page, paths
from service.config import Settings
from service.storage.connections import Connections
from service.storage.layout import Keys
from tests.support.web_client import asgi_client

PAGES = (paths.OVERVIEW, paths.SESSIONS, paths.DEAD_LETTERS, paths.HANDLERS, paths.ENDPOINTS)


@pytest.fixture
async def client(
    connections: Connections, settings: Settings, keys: Keys
) -> AsyncIterator[httpx2.AsyncClient]:
    """Yield a client of the admin port's application."""
    ready: Any = None
    served = app.create_admin_app(ready, page.Page(settings, connections, keys))
    async with asgi_client(served) as opened:
        yield opened


@pytest.mark.parametrize("path", PAGES)
async def test_each_page_has_the_layout(client: httpx2.AsyncClient, path: str) -> None:
    """Each page leads to the others, says where it is, and has one heading of the first order."""
    answered = await client.get(path)

    assert (answered.status_code, answered.headers["content-type"]) == (
        200,
        "text/html; charset=utf-8",
    )
    assert answered.text.count("<h1>") == 1
    assert f'<a href="{path}" aria-current="page">' in answered.text
    for other in PAGES:
        assert f'<a href="{other}"' in answered.text


async def test_without_jinja2_the_page_says_how_to_get_it(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the extra the address answers with a text, and probes and metrics work."""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "service.admin.rendering", raising=False)

    answered = await client.get("/")
    other = await client.get("/sessions")

    assert (answered.status_code, answered.headers["content-type"]) == (
        200,
        "text/plain; charset=utf-8",
    )
    assert "identity-webhooks[page]" in answered.text
    assert other.status_code == 404
    assert (await client.get("/metrics")).status_code == 200
