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


async def test_a_stream_without_a_group_is_left_alone(
    connections: Connections, keys: Keys, client: Any
) -> None:
    """Without a group nothing was acknowledged; without a stream nothing is done."""
    await client.delete(STREAM)
    assert await retention.trim(connections, keys, [0], retention_s=0) == (0, set())
    await client.xadd(STREAM, FIELDS, id="1-1")
    assert await retention.trim(connections, keys, [0], retention_s=0) == (0, set())
    assert await client.xlen(STREAM) == 1


async def test_orphaned_groups_are_logged_once_and_counted(
    connections: Connections, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metric has their present number; the log has one line each when they are found.

    A worker without partitions does not know, so it says nothing.
    """
    monkeypatch.setattr(retention, "TRIM_EVERY_S", 0)
    await create_groups(connections, keys, ["gone", "left"])
    trimming = Retention(connections, keys, handlers=("log",), retention_s=0)
    with structlog.testing.capture_logs() as lines:
        await trimming.trim_if_due([0])
        await trimming.trim_if_due([0])
    found = [line["handler"] for line in lines if line["event"] == "group.orphaned"]

    assert found == ["gone", "left"]
    assert metrics.ORPHAN_GROUPS._value.get() == 2
    await trimming.trim_if_due([])
    assert metrics.ORPHAN_GROUPS._value.get() == 0
    await trimming.trim_if_due([0])
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
    for length in (0, 1):
        await client.xadd(STREAM, FIELDS, id=f"1-{length + 1}")
        [[_, [[entry_id, _]]]] = await client.xreadgroup("log", "w", {STREAM: ">"})
        await client.xack(STREAM, "log", entry_id)
        await trimming.trim_if_due([0])
        assert await client.xlen(STREAM) == length
