"""A deployment in which workers can be started and stopped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import redis

from service.config import Settings
from service.delivery import stream_watcher, worker
from service.storage.connections import Connections
from tests.support.waiting import PATIENCE_S
from tests.support.workers import INTERVAL_S, SETTINGS, Deployment


@pytest.fixture
def client(connections: Connections) -> Any:
    """Return a client of a server on which the group of `log` exists."""
    return connections.client


@pytest.fixture
async def deployment(
    make_settings: Callable[..., Settings],
    connections: Connections,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Deployment]:
    """Yield a deployment without transitions; its workers are stopped at the end.

    New entries wake the workers: no read times out within a test.
    """
    monkeypatch.setattr(worker, "MAX_INTERVAL_S", INTERVAL_S)
    monkeypatch.setattr(stream_watcher, "BLOCK_S", 10 * PATIENCE_S)
    settings = make_settings(**SETTINGS)
    with redis.Redis.from_url(settings.redis_url.reveal()) as client:
        yielded = Deployment(settings, client, connections)
        yield yielded
        await yielded.close()


@pytest.fixture
def intervals(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return how long the periodic tasks of workers have waited; it grows."""
    found: list[float] = []
    wait = worker._wait

    async def record_and_wait(event: asyncio.Event, timeout_s: float) -> None:
        found.append(timeout_s)
        await wait(event, timeout_s)

    monkeypatch.setattr(worker, "_wait", record_and_wait)
    return found
