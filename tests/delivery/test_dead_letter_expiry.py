"""Dead letters that are too old are deleted, after a warning, and not by a wrong clock."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
import structlog.testing
from redis.exceptions import ConnectionError as RedisConnectionError

from service.config import DAY_S
from service.delivery import dead_letter_expiry as module
from service.delivery.consumer_groups import create_groups
from service.delivery.dead_letter_expiry import (
    EXPIRE_EVERY_S,
    WARN_BEFORE_S,
    WARN_EVERY_S,
    DeadLetterExpiry,
)
from service.delivery.retention import trim
from service.secret import Secret
from service.storage.connections import Connections, connect
from service.storage.keys import Keys
from service.telemetry import metrics
from tests.support import servers
from tests.support.preloads import Clock, redis_with
from tests.support.virtual_time import push
from tests.support.waiting import until
from tests.support.workers import CallLog, Deployment

RETENTION_S = 90 * DAY_S
ASSIGNMENTS = [("log", 0), ("log", 1), ("other", 0)]
FIELDS: dict[Any, Any] = {"change": "{}", "reason": "exhausted"}
_TIME = "local time = redis.call('TIME') return time[1] .. string.format('.%06d', time[2])"


class Server:
    """An empty server, and the expiry of its dead letters."""

    def __init__(
        self, connections: Connections, keys: Keys, retention_s: int = RETENTION_S
    ) -> None:
        self.client: Any = connections.client
        self.keys = keys
        self.expiry = DeadLetterExpiry(connections, keys, retention_s=retention_s)

    async def add(self, age_s: float, handler: str = "log", partition: int = 0) -> str:
        """Add a dead letter of some age; return its id."""
        entry_id = f"{(time.time() - age_s) * 1000:.0f}-0"
        await self.client.xadd(self.keys.dead_letters(partition, handler), FIELDS, id=entry_id)
        return entry_id

    async def entry_ids(self, handler: str = "log", partition: int = 0) -> list[str]:
        """Return the ids of the dead letters there are."""
        found = await self.client.xrange(self.keys.dead_letters(partition, handler))
        return [entry_id.decode() for entry_id, _ in found]

    async def expire(self) -> list[tuple[str, str]]:
        """Expire once; return event and handler of each line that is logged."""
        push(EXPIRE_EVERY_S)
        with structlog.testing.capture_logs() as lines:
            await self.expiry.expire_if_due(ASSIGNMENTS)
        return [(line["event"], line["handler"]) for line in lines]


@pytest.fixture
def server(connections: Connections, keys: Keys) -> Server:
    """Return an empty server."""
    return Server(connections, keys)


def expires_s(handler: str) -> float:
    """Return what the gauge says."""
    return float(metrics.DEAD_LETTERS_EXPIRE.labels(handler)._value.get())


async def test_only_what_is_too_old_is_deleted(server: Server) -> None:
    """A dead letter is kept for the retention time, in every partition, and no longer."""
    await server.add(RETENTION_S + DAY_S)
    await server.add(RETENTION_S + 1)
    young = await server.add(RETENTION_S - 60)
    await server.add(RETENTION_S + 1, partition=1)
    others = await server.add(WARN_BEFORE_S + 60, "other")
    not_ours = await server.add(RETENTION_S + 1, "other", partition=1)

    assert await server.expire() == [
        ("dead_letters.expired", "log"),
        ("dead_letters.expiring", "log"),
    ]
    assert await server.entry_ids() == [young]
    assert await server.entry_ids(partition=1) == []
    assert await server.entry_ids("other") == [others]
    assert await server.entry_ids("other", partition=1) == [not_ours]
    assert 0 < expires_s("log") <= 60
    assert expires_s("other") == pytest.approx(RETENTION_S - WARN_BEFORE_S - 60, abs=60)


@pytest.mark.parametrize(("before_s", "warns"), [(60, True), (-60, False)])
async def test_a_warning_comes_a_week_before_once_a_day(
    server: Server, before_s: float, *, warns: bool
) -> None:
    """The warning comes in the last week, not before, and again on each day of it."""
    await server.add(RETENTION_S - WARN_BEFORE_S + before_s)
    warning = [("dead_letters.expiring", "log")] * warns
    assert await server.expire() == warning
    assert await server.expire() == []
    push(WARN_EVERY_S)
    assert await server.expire() == warning
    assert (expires_s("log") < WARN_BEFORE_S) is warns


async def test_without_dead_letters_nothing_is_logged(server: Server) -> None:
    """The gauges then say that nothing will ever expire; without partitions there are none."""
    assert await server.expire() == []
    assert expires_s("log") == expires_s("other") == math.inf
    push(EXPIRE_EVERY_S)
    await server.expiry.expire_if_due([])
    [gauge] = metrics.DEAD_LETTERS_EXPIRE.collect()
    assert gauge.samples == []


async def test_a_limit_of_zero_keeps_all(connections: Connections, keys: Keys) -> None:
    """Without a limit nothing is deleted."""
    server = Server(connections, keys, retention_s=0)
    old = await server.add(3650 * DAY_S)
    assert await server.expire() == []
    assert await server.entry_ids() == [old]


async def test_many_are_deleted_in_several_calls(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call deletes a bounded number, the oldest first."""
    monkeypatch.setattr(module, "MAX_DELETED_PER_CALL", 2)
    entry_ids = [await server.add(RETENTION_S + 10 - n) for n in range(5)]
    for left in (3, 1, 0):
        await server.expire()
        assert await server.entry_ids() == entry_ids[5 - left :]


async def test_expiry_runs_from_time_to_time(server: Server) -> None:
    """After a run nothing is deleted for a while."""
    await server.expire()
    old = await server.add(RETENTION_S + 1)
    await server.expiry.expire_if_due(ASSIGNMENTS)
    assert await server.entry_ids() == [old]


async def test_an_error_of_redis_is_raised(
    server: Server, connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Redis does not answer, the gauges keep what they say."""
    errors = [RedisConnectionError()] * len(ASSIGNMENTS)
    monkeypatch.setattr(connections, "run", AsyncMock(return_value=errors))
    with pytest.raises(RedisConnectionError):
        await server.expire()


@pytest.mark.skipif(Clock.missing() != "", reason=Clock.missing())
@pytest.mark.parametrize("step_s", [100 * DAY_S, -100 * DAY_S])
async def test_a_wrong_clock_deletes_nothing(tmp_path: Path, keys: Keys, step_s: float) -> None:
    """Where Redis's clock and ours differ, what seems too old may be new: history, too."""
    clock = Clock(tmp_path)
    with servers.server(tmp_path, program=redis_with([clock], tmp_path)) as started:
        async with connect(Secret(started.url)) as connections:
            server = Server(connections, keys)
            entry_id = await server.add(0 if step_s > 0 else RETENTION_S + 1)
            await create_groups(connections, keys, ["log"])
            stream = keys.transitions(0)
            await server.client.xadd(stream, FIELDS)
            [[_, [[settled, _]]]] = await server.client.xreadgroup("log", "w", {stream: ">"})
            await server.client.xack(stream, "log", settled)
            await step(server, clock, step_s)
            await server.expire()
            assert await server.entry_ids() == [entry_id]
            assert await trim(connections, keys, [0], retention_s=RETENTION_S) == (0, {"log"})
            await step(server, clock, 0)
            await server.expire()
            assert await server.entry_ids() == ([entry_id] if step_s > 0 else [])


async def step(server: Server, clock: Clock, seconds: float) -> None:
    """Set a server's clock so many seconds ahead of ours, or behind, and wait until it is."""
    clock.step(seconds)

    # A server caches the time for a moment, in particular the time that scripts get.
    async def is_stepped() -> bool:
        return abs(float(await server.client.eval(_TIME, 0)) - time.time() - seconds) < 1

    await until(is_stepped)


async def test_a_worker_deletes_what_is_too_old(deployment: Deployment) -> None:
    """A worker applies the limit that is configured."""
    server = Server(deployment.connections, deployment.keys)
    await server.add(DAY_S + 60)
    young = await server.add(DAY_S - 600)
    deployment.start({"log": CallLog().handler()}, dead_letter_retention_days=1)

    async def is_gone() -> bool:
        return await server.entry_ids() == [young]

    await until(is_gone)
