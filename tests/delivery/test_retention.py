"""Trimming deletes only what all groups have acknowledged; orphaned groups are reported."""

from __future__ import annotations

from typing import Any

import pytest
import structlog.testing

from service.delivery import retention
from service.delivery.consumer_groups import create_groups, retire
from service.delivery.retention import Retention
from service.storage.connections import Connections
from service.storage.keys import Keys
from service.telemetry import metrics

STREAM = "idv:{0}:transitions"
FIELDS: dict[Any, Any] = {"change": "{}", "previous": "", "sequence": 1, "epoch": 1}


@pytest.fixture
def client(connections: Connections) -> Any:
    """Return a client of a server on which the group of `log` exists."""
    return connections.client


async def ids(client: Any) -> list[str]:
    """Return what the stream of partition 0 holds."""
    return [entry_id.decode() for entry_id, _ in await client.xrange(STREAM)]


async def admit(client: Any, *entry_ids: str) -> None:
    """Append entries with these ids to partition 0."""
    for entry_id in entry_ids:
        await client.xadd(STREAM, FIELDS, id=entry_id)


async def read(client: Any, group: str, count: int) -> list[bytes]:
    """Read as *group*; return the ids."""
    found = await client.xreadgroup(group, "w", {STREAM: ">"}, count=count)
    return [entry_id for _, entries in found for entry_id, _ in entries]


async def trim(connections: Connections, keys: Keys, retention_s: int = 0) -> int:
    """Trim partition 0; return how many entries were deleted."""
    removed, _ = await retention.trim(connections, keys, [0], retention_s=retention_s)
    return removed


async def test_young_entries_stay(connections: Connections, keys: Keys, client: Any) -> None:
    """Acknowledged entries stay for the retention time, and no longer."""
    await admit(client, "1-1")
    now_s, _ = await client.time()
    await admit(client, f"{(now_s - 100) * 1000}-0", f"{(now_s - 50) * 1000}-0")
    await client.xack(STREAM, "log", *await read(client, "log", 3))

    assert await trim(connections, keys, 7 * 86_400) == 1
    assert await trim(connections, keys, 75) == 1
    assert await trim(connections, keys, 0) == 1


async def test_a_stream_without_a_group_is_left_alone(
    connections: Connections, keys: Keys, client: Any
) -> None:
    """Without a group nothing was acknowledged; without a stream nothing is done."""
    await client.delete(STREAM)
    assert await trim(connections, keys) == 0
    await admit(client, "1-1")
    assert await trim(connections, keys) == 0
    assert await client.exists(STREAM) == 1


async def test_orphaned_groups_are_logged_once_and_counted(
    connections: Connections, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metric has their present number; the log has one line each when they are found."""
    monkeypatch.setattr(retention, "TRIM_EVERY_S", 0)
    await create_groups(connections, keys, ["gone", "left"])
    trimming = Retention(connections, keys, handlers=("log",), retention_s=0)
    with structlog.testing.capture_logs() as lines:
        await trimming.trim_if_due([0])
        await trimming.trim_if_due([0])
    found = [line["handler"] for line in lines if line["event"] == "group.orphaned"]

    assert found == ["gone", "left"]
    assert metrics.ORPHAN_GROUPS._value.get() == 2
    for handler in found:
        await retire(connections, keys, handler)
    await trimming.trim_if_due([0])
    assert metrics.ORPHAN_GROUPS._value.get() == 0


async def test_trimming_is_done_from_time_to_time(
    connections: Connections, keys: Keys, client: Any
) -> None:
    """What was trimmed is left alone for a while."""
    trimming = Retention(connections, keys, handlers=("log",), retention_s=0)
    await trimming.trim_if_due([0])
    await admit(client, "1-1")
    await client.xack(STREAM, "log", *await read(client, "log", 1))
    with structlog.testing.capture_logs() as lines:
        await trimming.trim_if_due([0])
    assert lines == []
    assert await ids(client) == ["1-1"]
