"""Processes say that they live and what they count; nothing is lost, and nothing counted twice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from redis.exceptions import RedisError
from structlog.testing import capture_logs

from service import __version__
from service.inbox.decision_log import NotedReversal, recent_reversals
from service.monitoring import publisher
from service.monitoring.activity import (
    ALIVE_S,
    Activity,
    Reversal,
    read_activity,
    sum_calls,
    sum_received,
)
from service.monitoring.publisher import FORGET_AFTER_S, Publisher
from service.storage.connections import Connections
from service.storage.keys import Keys
from service.telemetry import metrics
from tests.monitoring.conftest import MakePublisher
from tests.support.tapped import Tapped
from tests.support.waiting import until


@asynccontextmanager
async def running(one: Publisher) -> AsyncIterator[None]:
    """Let a publisher run until the block is left."""
    stopping = asyncio.Event()
    task = asyncio.create_task(one.run(stopping))
    try:
        yield
    finally:
        stopping.set()
        await task


def received(activity: Activity) -> dict[str, int]:
    """Return the requests of the last minutes by outcome, whichever minute they were counted in."""
    return dict(sum_received(activity.minutes))


def test_differences_of_counters() -> None:
    """What was counted before counts for nothing; each difference is taken once."""
    metrics.EVENTS.labels("admitted", "created").inc(5)
    totals = publisher._Totals()
    assert totals.take_differences() == ({}, {})
    metrics.EVENTS.labels("admitted", "created").inc()
    metrics.EVENTS.labels("admitted", "verified").inc(2)
    metrics.DELIVERIES.labels("own:open", "dead_lettered").inc()
    metrics.REVERSALS.inc()
    assert totals.take_differences() == (
        {"received:admitted": 3, "delivered:dead_lettered:own:open": 1},
        {"reversals": 1, "dead_lettered": 1},
    )
    assert totals.take_differences() == ({}, {})


async def test_processes_and_counts(
    connections: Connections, keys: Keys, make_publisher: MakePublisher
) -> None:
    """All that processes publish is read again; one that stops is gone, its last counts are not."""
    worker = make_publisher("worker", "log", "own:open", pid=2)
    async with running(worker), running(make_publisher(pid=1)):
        metrics.EVENTS.labels("admitted", "verified").inc()
        metrics.DELIVERIES.labels("own:open", "failed").inc(2)
        metrics.EVENTS_RECOVERED.inc()
        metrics.LAST_EVENT.set(now := int(time.time()))

        async def seen() -> Activity | None:
            found = await read_activity(connections, keys)
            is_whole = found.last_event_at and len(found.processes) == 2 and received(found)
            return found if is_whole else None

        found: Activity = await until(seen)
        assert [(one.name, one.kind, one.works) for one in found.processes] == [
            ("host-1", "receiver", ()),
            ("host-2", "worker", ("log", "own:open")),
        ]
        [receiver], [second] = found.receivers, found.workers
        assert receiver.version == __version__
        assert receiver.ready is None
        assert receiver.is_alive
        assert second.started_at.timestamp() == pytest.approx(now, abs=60)
        assert found.last_event_at == datetime.fromtimestamp(now, UTC)
        metrics.EVENTS.labels("late", "verified").inc()
    after = await read_activity(connections, keys)
    assert after.processes == ()
    assert after.last_event_at == found.last_event_at
    # Both publishers read the counters of this one process.
    assert received(after) == {"admitted": 2, "late": 2}
    assert len(after.minutes) == 60
    assert sum_calls(after.minutes)["own:open"]["failed"] == 4
    assert sum(day.recovered for day in after.days) == 2
    assert len(after.days) == 7


async def test_a_drain_is_shown(
    connections: Connections, keys: Keys, make_publisher: MakePublisher
) -> None:
    """A process that is not ready says why, in one word."""
    await make_publisher(reason="draining")._publish()
    [one] = (await read_activity(connections, keys)).processes
    assert one.ready == "draining"


async def test_a_batch_is_counted_once(
    connections: Connections, keys: Keys, make_publisher: MakePublisher
) -> None:
    """A call whose reply was lost is repeated and not counted again; then the rest is counted."""
    over = Tapped(connections)
    over.faults.append("reply")
    one = make_publisher(over=over)
    metrics.EVENTS.labels("late", "verified").inc()
    recent_reversals.append(NotedReversal(5.0, "vs_1", "verified", "requires_input", "evt_1"))
    await one._try_to_publish()
    metrics.EVENTS.labels("late", "verified").inc(10)
    await one._try_to_publish()
    found = await read_activity(connections, keys)
    assert (received(found), len(found.reversals)) == ({"late": 1}, 1)
    await one._try_to_publish()
    found = await read_activity(connections, keys)
    assert received(found) == {"late": 11}
    assert found.reversals == (
        Reversal(datetime.fromtimestamp(5, UTC), "vs_1", "verified", "requires_input", "evt_1"),
    )


async def test_counts_of_an_outage_belong_to_their_minutes(
    connections: Connections, keys: Keys, make_publisher: MakePublisher
) -> None:
    """What is counted while Redis is away is published later, for the minute when it happened."""
    one = make_publisher()
    metrics.EVENTS.labels("redis_unreachable", "other").inc(3)
    one._collect(time.time() - 10 * 60)
    metrics.EVENTS.labels("redis_unreachable", "other").inc(5)
    one._collect(time.time() - 3 * 3600)
    await one._try_to_publish()
    found = [each.received for each in (await read_activity(connections, keys)).minutes]
    assert found.count({}) == 59
    assert {"redis_unreachable": 3} in found[48:51]


async def test_silent_processes_are_forgotten(
    connections: Connections, keys: Keys, make_publisher: MakePublisher
) -> None:
    """A killed process is shown as not alive for a while; the hash does not grow for ever."""
    now_ms = time.time() * 1000
    for name, age_s in {"late": ALIVE_S + 9, "old": FORGET_AFTER_S + 9, "ahead": -99}.items():
        await make_publisher()._publish()
        [value] = await connections.client.hvals(keys.processes)
        await connections.client.hdel(keys.processes, "host-1 receiver")
        rest = value.partition(b" ")[2]
        await connections.client.hset(
            f"{keys.processes}:kept", name, b"%d %s" % (now_ms - age_s * 1000, rest)
        )
    await connections.client.rename(f"{keys.processes}:kept", keys.processes)
    found = {one.name: one.is_alive for one in (await read_activity(connections, keys)).processes}
    assert found == {"late": False, "ahead": False}
    await make_publisher()._publish()
    assert {*await connections.client.hkeys(keys.processes)} == {
        *(b"late", b"ahead", b"host-1 receiver")
    }


async def test_a_receiver_and_a_worker_of_one_name_are_both_shown(
    connections: Connections, keys: Keys, make_publisher: MakePublisher
) -> None:
    """Containers on the network of their host have its name, and the same process id."""
    receiver, worker = make_publisher("receiver"), make_publisher("worker", "log")
    for one in (receiver, worker, receiver, worker):
        await one._publish()
    found = (await read_activity(connections, keys)).processes
    assert [(one.name, one.kind) for one in found] == [("host-1", "receiver"), ("host-1", "worker")]


async def test_a_call_that_fails_half_way_counts_once(
    connections: Connections, keys: Keys, make_publisher: MakePublisher
) -> None:
    """Its counts are not added again each time that it is repeated."""
    one = make_publisher()
    await connections.client.set(keys.reversals, "foreign")
    recent_reversals.append(NotedReversal(5.0, "vs_1", "verified", "canceled", "evt_1"))
    metrics.EVENTS.labels("late", "verified").inc(3)
    for _ in range(3):
        await one._try_to_publish()
    await connections.client.delete(keys.reversals)
    await one._try_to_publish()
    assert received(await read_activity(connections, keys)) == {"late": 3}


async def test_a_full_redis_takes_signs_of_life(
    connections: Connections, keys: Keys, make_publisher: MakePublisher
) -> None:
    """Where Redis is full, it can be seen who lives: that is when people look."""
    one = make_publisher()
    await connections.client.config_set("maxmemory", 1)
    try:
        await one._publish()
    finally:
        await connections.client.config_set("maxmemory", 0)
    assert len((await read_activity(connections, keys)).processes) == 1


async def test_all_that_is_published_expires(
    connections: Connections, keys: Keys, make_publisher: MakePublisher
) -> None:
    """Counts have a time to live, and few reversals are kept."""
    one = make_publisher()
    metrics.EVENTS.labels("late", "verified").inc()
    metrics.REVERSALS.inc()
    reversal = NotedReversal(5.0, "vs_1", "verified", "requires_input", "evt_1")
    for _ in range(4):
        recent_reversals.extend([reversal] * 200)
        await one._try_to_publish()
    ttls = {
        key.rpartition(b":")[0]: await connections.client.ttl(key)
        for key in await connections.client.keys("*:{0}:*")
        if b":minute:" in key or b":day:" in key
    }
    assert 60 * 60 < ttls[b"idv:{0}:minute"] <= 70 * 60
    assert 7 * 86400 < ttls[b"idv:{0}:day"] <= 8 * 86400
    assert 200 <= await connections.client.xlen(keys.reversals) < 400


async def test_an_error_of_ours_ends_nothing(
    make_publisher: MakePublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails, the next sign of life is tried, and the process ends as it should."""

    def fail(*_: Any) -> None:
        raise KeyError

    one = make_publisher()
    monkeypatch.setattr(one, "_collect", fail)
    with capture_logs() as lines:
        await one._try_to_publish()
    assert [line["event"] for line in lines] == ["activity.crashed"]
    stopping = asyncio.Event()
    stopping.set()
    await one.run(stopping)


async def test_a_failure_is_logged_once(
    make_publisher: MakePublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user who may not publish is one line, however often it is tried."""

    async def refuse(*_: Any, **__: Any) -> None:
        raise RedisError

    one = make_publisher()
    monkeypatch.setattr(one, "_publish", refuse)
    with capture_logs() as lines:
        for _ in range(3):
            await one._try_to_publish()
    assert [line["event"] for line in lines] == ["activity.not_published"]
