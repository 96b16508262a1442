"""Inboxes on the test's empty server, and on others."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from service.config import Settings
from service.secret import Secret
from service.storage.connections import Connections, connect
from tests.support.admissions import InboxAt, InspectedInbox, OpenInbox, inspected


@pytest.fixture
def open_inbox(connections: Connections, make_settings: Callable[..., Settings]) -> OpenInbox:
    """Return what opens inboxes on the same server, with settings of their own."""

    def make(*, judges_age: bool = True, **changes: Any) -> InspectedInbox:
        return inspected(connections, make_settings(**changes), judges_age=judges_age)

    return make


@pytest.fixture
def inbox(open_inbox: OpenInbox) -> InspectedInbox:
    """Return an inbox with default settings."""
    return open_inbox()


@pytest.fixture
def inbox_at(make_settings: Callable[..., Settings]) -> InboxAt:
    """Return what opens an inbox on any server, with clients of its own."""

    @asynccontextmanager
    async def opened(url: str, **changes: Any) -> AsyncIterator[InspectedInbox]:
        settings = make_settings(redis_url=Secret(url), **changes)
        async with connect(settings.redis_url) as connections:
            yield inspected(connections, settings)

    return opened
