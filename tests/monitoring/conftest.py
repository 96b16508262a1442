"""A publisher of this test's process, which runs only when a test says so."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest

from service.config import Settings
from service.inbox.decision_log import recent_reversals
from service.monitoring import publisher
from service.monitoring.publisher import Kind, Publisher
from service.storage.connections import Connections
from service.storage.health import Health
from service.storage.keys import Keys

MakePublisher = Callable[..., Publisher]


@pytest.fixture
def make_publisher(
    connections: Connections, keys: Keys, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> MakePublisher:
    """Return a factory of publishers, each as if it were that of another process."""
    recent_reversals.clear()
    monkeypatch.setattr(publisher, "PUBLISH_EVERY_S", 0.01)
    monkeypatch.setattr(socket, "gethostname", lambda: "host")

    def make(
        kind: Kind = "receiver",
        *works: str,
        pid: int = 1,
        reason: str | None = None,
        over: Connections = connections,
    ) -> Publisher:
        health = Health(connections, settings)
        health.usable.set()
        monkeypatch.setattr(Health, "reason", reason)
        monkeypatch.setattr(os, "getpid", lambda: pid)
        return Publisher(over, keys, health, kind=kind, works=works)

    return make
