"""Pages of handlers: what waits, who works, and what became of the latest attempts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2
import pytest
import redis

from service.admin import page
from service.admin.views.handlers import by_worker
from service.config import Settings
from service.errors import Undeliverable
from service.storage.connections import Connections
from tests.support.shown import Shown
from tests.support.waiting import until
from tests.support.workers import SETTINGS, CallLog, Deployment


async def test_the_latest_attempts(
    client: httpx2.AsyncClient,
    connections: Connections,
    make_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each finished attempt is there, with its error; so are leases and dead letters."""
    monkeypatch.setattr(page, "KEPT_S", 0.0)

    async def fail(entry: tuple[str, int]) -> None:
        if entry == ("vs_s1", 1):
            raise Undeliverable("too_large")

    settings = make_settings(**SETTINGS)
    with redis.Redis.from_url(settings.redis_url.reveal()) as raw:
        deployment = Deployment(settings, raw, connections)
        worker = deployment.start({"log": CallLog().handler(fail)})
        await deployment.hold_all(worker)
        deployment.admit(3)

        async def shown() -> Any:
            found = Shown((await client.get("/handlers/log")).text)
            return found if found.text.count("evt_vs_s") == 3 else None

        found = await until(shown)
        await deployment.close()

    assert found.text.count("delivered 1 evt_vs_s") == 2
    assert "dead-lettered 1 evt_vs_s1_1 Undeliverable" in found.text
    assert "partitions 0, 1, 2, 3, 4, 5, 6, 7" in found.text
    assert "/dead-letters/log" in found.links


async def test_handlers(client: httpx2.AsyncClient) -> None:
    """Each handler is listed; one that is not known is not found."""
    listed = Shown((await client.get("/handlers")).text)

    assert "/handlers/log" in listed.links
    assert "closed 0 none 0 of 8" in listed.text
    assert (await client.get("/handlers/other")).status_code == 404


def test_leases_are_grouped_by_worker() -> None:
    """The partitions of each worker stand together."""
    assert by_worker(("a", None, "b", "a")) == {"a": [0, 3], None: [1], "b": [2]}
