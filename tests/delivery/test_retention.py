"""Laws of the janitor: nothing unsettled goes, orphans are told, a handler may be retired."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import structlog.testing
from redis.exceptions import ConnectionError as RedisConnectionError

from service.config import Settings
from service.delivery import consumer_groups, retention
from service.delivery.consumer_groups import Group, create_groups
from service.delivery.retention import Retention
from service.delivery.worker import Worker
from service.storage.connections import Connections
from service.storage.layout import Keys
from service.telemetry import metrics
from service.transitions.transition import StatusTransition
from tests.support.harness import eventually

STREAM = "idv:{0}:transitions"
FIELDS: dict[Any, Any] = {"change": "{}", "previous": "", "sequence": 1, "epoch": 1}


@pytest.fixture
def client(connections: Connections) -> Any:
    """Return a client of a server on which the group of `log` exists."""
    return connections.client


async def ids(client: Any) -> list[str]:
    """Return what the stream of partition 0 holds."""
    return [entry_id.decode() for entry_id, _ in await client.xrange(STREAM)]


async def fill(client: Any, *entry_ids: str) -> None:
    """Append entries of these ids to partition 0."""
    for entry_id in entry_ids:
        await client.xadd(STREAM, FIELDS, id=entry_id)


async def read(client: Any, group: str, count: int) -> list[bytes]:
    """Read as *group* does, and return the ids."""
    found = await client.xreadgroup(group, "w", {STREAM: ">"}, count=count)
    return [entry_id for _, entries in found for entry_id, _ in entries]


async def trim(connections: Connections, keys: Keys, retention_s: int = 0) -> int:
    """Trim partition 0."""
    removed, _ = await retention.trim(connections, keys, [0], retention_s=retention_s)
    return removed


async def test_what_is_settled_and_old_goes(
    connections: Connections, keys: Keys, client: Any
) -> None:
    """What every group has settled goes, and nothing else."""
    await fill(client, "1-1", "1-2", "2-1", "3-1")
    await client.xack(STREAM, "log", *await read(client, "log", 3))

    assert await trim(connections, keys) == 3
    assert await ids(client) == ["3-1"]


async def test_pending_entries_hold(connections: Connections, keys: Keys, client: Any) -> None:
    """From the oldest entry that is in anybody's hands on, everything stays."""
    await fill(client, "1-1", "1-2", "2-1", "3-1")
    read_by = await read(client, "log", 4)
    await client.xack(STREAM, "log", read_by[0], read_by[2], read_by[3])

    assert await trim(connections, keys) == 1
    assert await ids(client) == ["1-2", "2-1", "3-1"]


async def test_the_slowest_group_holds_though_nobody_owns_it(
    connections: Connections, keys: Keys, client: Any
) -> None:
    """A group that lags holds trimming, be it configured or not, until it is retired."""
    await create_groups(connections, keys, ["gone"])
    await fill(client, "1-1", "1-2", "2-1")
    await client.xack(STREAM, "log", *await read(client, "log", 3))

    assert await trim(connections, keys) == 0
    await client.xack(STREAM, "gone", *await read(client, "gone", 1))
    assert await trim(connections, keys) == 1
    assert await consumer_groups.retire(connections, keys, "gone") == keys.partitions
    assert await trim(connections, keys) == 2
    assert await ids(client) == []


async def test_what_is_young_stays(connections: Connections, keys: Keys, client: Any) -> None:
    """Settled entries stay for as long as they are to be kept, and no longer."""
    await fill(client, "1-1")
    now_s, _ = await client.time()
    await fill(client, f"{(now_s - 100) * 1000}-0", f"{(now_s - 50) * 1000}-0")
    await client.xack(STREAM, "log", *await read(client, "log", 3))

    assert await trim(connections, keys, 7 * 86_400) == 1
    assert await trim(connections, keys, 75) == 1
    assert await trim(connections, keys, 0) == 1


async def test_a_stream_nobody_reads_is_left_alone(
    connections: Connections, keys: Keys, client: Any
) -> None:
    """Without a group nothing is settled, so nothing goes; without a stream nothing happens."""
    await client.delete(STREAM)
    assert await trim(connections, keys) == 0
    await fill(client, "1-1")
    assert await trim(connections, keys) == 0
    assert await client.exists(STREAM) == 1


@pytest.mark.parametrize("seed", range(20))
async def test_no_history_loses_an_unsettled_entry(
    connections: Connections, keys: Keys, client: Any, seed: int
) -> None:
    """Whatever two groups read, settle and leave, what one of them has not settled stays."""
    random = Random(seed)
    groups = {"log": set[bytes](), "other": set[bytes]()}
    await create_groups(connections, keys, ["other"])
    await client.xgroup_setid(STREAM, "other", "0")
    added: list[bytes] = []
    for step in range(40):
        group = random.choice([*groups])
        match random.randrange(4):
            case 0:
                entry_ids = [f"{step + 1}-{n}" for n in range(1, random.randrange(2, 6))]
                await fill(client, *entry_ids)
                added += [entry_id.encode() for entry_id in entry_ids]
            case 1:
                groups[group].update(await read(client, group, random.randrange(1, 5)))
            case 2 if groups[group]:
                one = random.choice(sorted(groups[group]))
                await client.xack(STREAM, group, one)
            case _:
                await trim(connections, keys)
        await _nothing_is_missing(client, added, groups)


async def _nothing_is_missing(
    client: Any, added: list[bytes], groups: dict[str, set[bytes]]
) -> None:
    held = {entry_id for entry_id, _ in await client.xrange(STREAM)}
    for group, was_read in groups.items():
        pending = await client.xpending_range(STREAM, group, "-", "+", 1000)
        unsettled = {one["message_id"] for one in pending} | (set(added) - was_read)
        assert unsettled <= held


async def test_trimming_takes_nothing_from_workers(
    connections: Connections, settings: Settings
) -> None:
    """While a worker works, trimming all the time with no retention loses nothing."""
    keys = Keys(settings.redis_prefix, settings.partitions)
    taken: list[int] = []

    async def handle(transition: StatusTransition) -> None:
        taken.append(transition.sequence)
        await asyncio.sleep(0.001)

    stopping = asyncio.Event()
    work = asyncio.create_task(Worker(connections, keys, settings, {"log": handle}).run(stopping))
    for n in range(400):
        change = (
            f'{{"event_id":"evt_{n}","event_type":"t","occurred_at":"2026-01-01T00:00:00Z",'
            f'"session_id":"vs_{n % 7}","current":"processing"}}'
        )
        fields = FIELDS | {"change": change, "sequence": n}
        await connections.client.xadd(STREAM, fields, id=f"{n + 1}-1")
        if n % 5 == 0:
            await trim(connections, keys)
    await eventually(lambda: len(taken) == 400)
    stopping.set()
    await work
    await trim(connections, keys)

    assert sorted(taken) == list(range(400))
    assert await ids(connections.client) == []


async def test_orphans_are_told_once_and_counted(
    connections: Connections, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups without an owner are in a metric, and in one log line each when they are noticed."""
    monkeypatch.setattr(retention, "TRIM_EVERY_S", 0)
    await create_groups(connections, keys, ["gone", "left"])
    one = Retention(connections, keys, handlers=("log",), retention_s=0)
    with structlog.testing.capture_logs() as lines:
        await one.tidy([0])
        await one.tidy([0])
    found = [line["handler"] for line in lines if line["event"] == "group.orphaned"]

    assert found == ["gone", "left"]
    assert metrics.ORPHAN_GROUPS._value.get() == 2
    for handler in found:
        await consumer_groups.retire(connections, keys, handler)
    await one.tidy([0])
    assert metrics.ORPHAN_GROUPS._value.get() == 0


async def test_tidying_is_now_and_then(connections: Connections, keys: Keys, client: Any) -> None:
    """What was tidied is left alone for a while."""
    one = Retention(connections, keys, handlers=("log",), retention_s=0)
    await one.tidy([0])
    await fill(client, "1-1")
    await client.xack(STREAM, "log", *await read(client, "log", 1))
    with structlog.testing.capture_logs() as lines:
        await one.tidy([0])
    assert lines == []
    assert await ids(client) == ["1-1"]


async def test_groups_say_what_waits(connections: Connections, keys: Keys, client: Any) -> None:
    """Every group is listed with what it has not settled, its replays and its dead letters."""
    await create_groups(connections, keys, ["other"])
    await fill(client, "1-1", "1-2")
    await read(client, "log", 1)
    await client.xadd(keys.dead(3, "log"), FIELDS)
    await client.xadd(keys.replays(2, "other"), FIELDS)

    found = await consumer_groups.list_groups(connections, keys)
    log, other = found
    assert log == Group("log", 2, replays=0, dead=1, oldest_s=log.oldest_s)
    # Not every server knows how many entries such a group has before it.
    assert other._replace(unsettled=None, oldest_s=0) == Group("other", None, 1, dead=0, oldest_s=0)
    assert log.oldest_s > 1e9


async def test_partitions_without_a_stream_have_no_groups(
    connections: Connections, keys: Keys, client: Any
) -> None:
    """Groups of those partitions that hold anything are listed all the same."""
    for partition in range(1, keys.partitions):
        await client.delete(keys.transitions(partition))
    await fill(client, "1-1")
    [group] = await consumer_groups.list_groups(connections, keys)
    assert (group.handler, group.unsettled) == ("log", 1)


@pytest.mark.parametrize("lost", ["groups", "lags"])
async def test_groups_that_redis_does_not_tell_are_an_error(
    connections: Connections, keys: Keys, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """What could not be asked is not passed off as nothing."""
    run, calls = connections.run, 0

    async def losing(calls_made: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        replies = await run(calls_made, **options)
        if calls == ["groups", "lags"].index(lost) + 1:
            replies[-1] = RedisConnectionError()
        return replies

    monkeypatch.setattr(connections, "run", losing)
    with pytest.raises(RedisConnectionError):
        await consumer_groups.list_groups(connections, keys)


async def test_retiring_leaves_nothing_behind(
    connections: Connections, settings: Settings, keys: Keys, client: Any
) -> None:
    """Of a retired handler no key is left; what belongs to the others stays."""
    names = replace(settings, handlers=("log", "gone")).handlers
    await create_groups(connections, keys, names)
    before = set(await client.keys("*"))
    for key in (keys.dead(1, "gone"), keys.replays(1, "gone"), keys.dead(1, "log")):
        await client.xadd(key, FIELDS)
    await client.set(keys.lease(1, "gone"), "x")
    await consumer_groups.retire(connections, keys, "gone")

    assert set(await client.keys("*")) == before | {keys.dead(1, "log").encode()}
    assert [group.handler for group in await consumer_groups.list_groups(connections, keys)] == [
        "log"
    ]
    assert await consumer_groups.retire(connections, keys, "gone") == 0
