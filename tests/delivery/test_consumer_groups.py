"""Consumer groups begin where they should, and what they have not acknowledged is measured."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from service.delivery.consumer_groups import (
    Group,
    Lag,
    create_groups,
    list_groups,
    measure_lags,
    retire,
)
from service.errors import ConfigError
from service.storage.connections import Connections
from service.storage.keys import Keys
from service.storage.layout import claim

TWO = Keys("idv", 2)
STREAM = TWO.transitions(0)
FIELDS: dict[Any, Any] = {"change": "{}", "previous": "", "sequence": 1, "epoch": 1}


async def admit(client: Any, *entry_ids: str) -> list[str]:
    """Append entries to partition 0; return their ids."""
    return [(await client.xadd(STREAM, FIELDS, id=each)).decode() for each in entry_ids]


async def read(client: Any, count: int) -> list[bytes]:
    """Read as the group of `log`; return the ids."""
    found = await client.xreadgroup("log", "w", {STREAM: ">"}, count=count)
    return [entry_id for _, entries in found for entry_id, _ in entries]


async def lag(connections: Connections, keys: Keys) -> Lag:
    """Measure the lag of `log` in partition 0; raise what is returned instead."""
    [found] = await measure_lags(connections, keys, [("log", 0)])
    if isinstance(found, Exception):
        raise found
    return found


async def starts(client: Any, partition: int = 0) -> dict[str, str]:
    """Return each group of a partition, and the last id it counts as read."""
    groups = await client.xinfo_groups(TWO.transitions(partition))
    return {one["name"].decode(): one["last-delivered-id"].decode() for one in groups}


@pytest.fixture
async def empty(connections: Connections) -> Connections:
    """Return clients of a server without groups."""
    await connections.client.flushall()
    return connections


async def test_the_first_groups_begin_at_the_start(empty: Connections, client: Any) -> None:
    """On streams without groups nothing was read, so nothing is skipped."""
    await admit(client, "*")
    assert await create_groups(empty, TWO, ["log", "nats"]) == ["log", "nats"]
    for partition in range(2):
        assert await starts(client, partition) == {"log": "0-0", "nats": "0-0"}


async def test_a_group_added_later_begins_at_the_end(empty: Connections, client: Any) -> None:
    """A new handler does not get history; on an untouched stream it misses nothing."""
    await create_groups(empty, TWO, ["log"])
    [last] = await admit(client, "*")
    assert await create_groups(empty, TWO, ["log", "nats"]) == ["nats"]
    assert await starts(client, 0) == {"log": "0-0", "nats": last}
    assert await starts(client, 1) == {"log": "0-0", "nats": "0-0"}


async def test_groups_of_a_deleted_stream_begin_at_its_new_start(
    empty: Connections, client: Any
) -> None:
    """What was admitted since an operator deleted the stream is read."""
    await create_groups(empty, TWO, ["log", "nats"])
    await client.delete(STREAM)
    await admit(client, "*")
    assert await create_groups(empty, TWO, ["log", "nats"]) == ["log", "nats"]
    assert await starts(client) == {"log": "0-0", "nats": "0-0"}


async def test_workers_may_create_them_at_once(empty: Connections, client: Any) -> None:
    """Workers that start together neither fail nor miss a group."""
    await asyncio.gather(*(create_groups(empty, TWO, ["log"]) for _ in range(8)))
    assert await starts(client, 1) == {"log": "0-0"}


async def test_no_group_is_created_on_another_layout(empty: Connections, client: Any) -> None:
    """Where Redis holds another layout, that is an error."""
    await claim(empty, TWO._replace(partitions=3))
    with pytest.raises(ConfigError, match="PARTITIONS is 2"):
        await create_groups(empty, TWO, ["log"])
    assert not await client.exists(STREAM)


async def test_a_failure_is_raised(empty: Connections, client: Any) -> None:
    """A group that cannot be created is not passed over."""
    await client.set(TWO.transitions(1), "not a stream")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await create_groups(empty, TWO, ["log"])


async def test_unread_and_pending_entries_count(
    connections: Connections, keys: Keys, client: Any
) -> None:
    """The age is that of the oldest of either."""
    assert await lag(connections, keys) == Lag(0, 0, oldest_s=0.0, dead_letters=0)

    await admit(client, "*", "*", "*")
    await asyncio.sleep(0.03)
    unread = await lag(connections, keys)
    assert unread.entries == 3
    assert 0.03 <= unread.oldest_s < 60

    first, second = await read(client, 2)
    await client.xack(STREAM, "log", second)
    await admit(client, "*")
    mixed = await lag(connections, keys)
    assert mixed.entries == 3
    assert mixed.oldest_s >= unread.oldest_s
    await client.xack(STREAM, "log", first)
    assert (await lag(connections, keys)).entries == 2


async def test_few_unread_entries_are_counted_where_redis_is_wrong(
    connections: Connections, keys: Keys, client: Any
) -> None:
    """Redis 7.0 forgets at a restart that some entries were read. Many are as Redis says."""
    _, second, _ = await admit(client, "*", "*", "*")
    await read(client, 2)
    await client.xgroup_setid(STREAM, "log", second, entries_read=0)
    assert (await lag(connections, keys)).entries == 2 + 1

    await client.xgroup_setid(STREAM, "log", second, entries_read=2)
    await admit(client, *["*"] * 19)
    assert (await lag(connections, keys)).entries == 2 + 20


async def test_a_number_that_redis_does_not_know_is_none(
    connections: Connections, keys: Keys, client: Any
) -> None:
    """Where unread entries were deleted, many are not guessed, and few are counted."""
    _, second, *rest = await admit(client, *["*"] * 22)
    await read(client, 1)
    await client.xdel(STREAM, second)
    await asyncio.sleep(0.005)
    found = await lag(connections, keys)
    assert found.entries is None
    assert found.oldest_s > 0
    await client.xdel(STREAM, rest[0])
    assert (await lag(connections, keys)).entries == 1 + 19


async def test_without_a_group_it_is_an_error(
    connections: Connections, keys: Keys, client: Any
) -> None:
    """A deleted stream, or one without our group, is an error for that partition alone."""
    for remove in (client.xgroup_destroy(STREAM, "log"), client.delete(STREAM)):
        await remove
        with pytest.raises(ResponseError):
            await lag(connections, keys)


async def test_each_group_has_its_lag_replays_and_dead_letters(
    connections: Connections, keys: Keys, client: Any
) -> None:
    """Also a group whose handler is not configured."""
    await create_groups(connections, keys, ["other"])
    await admit(client, "1-1", "1-2")
    await read(client, 1)
    await client.xadd(keys.dead_letters(3, "log"), FIELDS)
    await client.xadd(keys.replays(2, "other"), FIELDS)

    log, other = await list_groups(connections, keys)
    assert log == Group("log", 2, replays=0, dead_letters=1, oldest_s=log.oldest_s)
    assert log.oldest_s > 1e9
    assert other == Group("other", 2, replays=1, dead_letters=0, oldest_s=other.oldest_s)


async def test_partitions_without_a_stream_are_passed_over(
    connections: Connections, keys: Keys, client: Any
) -> None:
    """Groups of the other partitions are listed all the same."""
    for partition in range(1, keys.partitions):
        await client.delete(keys.transitions(partition))
    await admit(client, "1-1")
    [group] = await list_groups(connections, keys)
    assert (group.handler, group.lag) == ("log", 1)


@pytest.mark.parametrize("failing_call", [1, 2], ids=["names", "lags"])
async def test_an_error_of_redis_is_raised(
    connections: Connections, keys: Keys, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    """A partition that Redis does not answer for does not count as empty."""
    run, calls = connections.run, 0

    async def fail_once(calls_made: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        replies = await run(calls_made, **options)
        if calls == failing_call:
            replies[-1] = RedisConnectionError()
        return replies

    monkeypatch.setattr(connections, "run", fail_once)
    with pytest.raises(RedisConnectionError):
        await list_groups(connections, keys)


async def test_retiring_deletes_everything_of_a_handler(
    connections: Connections, keys: Keys, client: Any
) -> None:
    """No key of a retired handler is left; those of the others stay."""
    await create_groups(connections, keys, ["log", "gone"])
    before = set(await client.keys("*"))
    for key in (keys.dead_letters(1, "gone"), keys.replays(1, "gone"), keys.dead_letters(1, "log")):
        await client.xadd(key, FIELDS)
    await client.set(keys.lease(1, "gone"), "x")
    assert await retire(connections, keys, "gone") == keys.partitions

    assert set(await client.keys("*")) == before | {keys.dead_letters(1, "log").encode()}
    assert [group.handler for group in await list_groups(connections, keys)] == ["log"]
    assert await retire(connections, keys, "gone") == 0
