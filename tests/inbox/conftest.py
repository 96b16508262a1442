"""Inboxes on the test's empty server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from service.config import Settings
from service.inbox.admission import Inbox
from service.storage.connections import Connections
from service.storage.keys import Keys
from tests.support.admissions import InspectedInbox, OpenInbox


@pytest.fixture
def open_inbox(
    connections: Connections, keys: Keys, make_settings: Callable[..., Settings]
) -> OpenInbox:
    """Return what opens inboxes on the same server, with settings of their own."""

    def make(**changes: Any) -> InspectedInbox:
        inbox = Inbox(connections, keys, make_settings(**changes))
        return InspectedInbox(inbox, connections.client, keys)

    return make


@pytest.fixture
def inbox(open_inbox: OpenInbox) -> InspectedInbox:
    """Return an inbox with default settings."""
    return open_inbox()
