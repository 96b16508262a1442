"""Fixtures of the HTTP contract: the real application, and the lines that its requests log."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest

from service.config import Settings
from service.inbox import request_log
from service.storage.connections import Connections
from tests.support.apps import webhook_app
from tests.support.web_client import Log, OpenApp, asgi_client


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Record what the request log writes."""
    recorded = Log()
    monkeypatch.setattr(request_log, "log", recorded)
    monkeypatch.setattr(request_log, "write_line", recorded.write_line)
    return recorded


@pytest.fixture
def open_app(connections: Connections, make_settings: Callable[..., Settings]) -> OpenApp:
    """Return a function that opens the real application with changed settings."""

    @asynccontextmanager
    async def opened(**changes: Any) -> AsyncIterator[httpx2.AsyncClient]:
        app, _ = webhook_app(connections, make_settings(**changes))
        async with asgi_client(app) as client:
            yield client

    return opened
