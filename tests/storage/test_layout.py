"""The layout: key names, and who may start on it."""

from __future__ import annotations

import asyncio

import pytest

from service.delivery.consumer_groups import create_groups
from service.errors import ConfigError
from service.storage import layout
from service.storage.connections import Connections
from service.storage.keys import LAYOUT_VERSION, Keys
from service.storage.layout import claim, is_claimed
from tests.support import roles
from tests.support.troubles import changed_config


def test_a_session_always_has_the_same_partition() -> None:
    """The partition is a checksum: these numbers must never change."""
    keys = Keys("idv", 8)
    assert [keys.partition(one) for one in ("vs_1", "vs_2", "vs_abc")] == [4, 6, 4]


def test_all_keys_of_a_partition_share_a_tag() -> None:
    """The keys of one script are in one slot of a Cluster; shared keys have no tag."""
    keys = Keys("p", 8)
    assert keys.session("vs_2") == "p:{6}:session:vs_2"
    assert keys.transitions(2) == "p:{2}:transitions"
    assert keys.notifications(2) == "p:{2}:notifications"
    assert keys.noted(2, "evt_1") == "p:{2}:noted:evt_1"
    assert keys.dead_letters(2, "log") == "p:{2}:dead:log"
    assert keys.lease(2, "log") == "p:{2}:lease:log"
    published = (keys.processes, keys.minute(1), keys.day(1), keys.reversals, keys.endpoints)
    assert {key.rpartition("{")[2][:2] for key in published} == {"0}"}
    assert keys.workers("log") == "p:workers:log"
    assert keys.layout == "p:layout"
    assert keys.layout_in(2) == "p:{2}:layout"


class TestClaim:
    """No process works on a layout with other numbers."""

    async def test_the_first_process_claims_the_layout(
        self, connections: Connections, keys: Keys
    ) -> None:
        """An empty server gets the numbers of the first process; others may have the same."""
        await asyncio.gather(*(claim(connections, keys) for _ in range(5)))
        found = await connections.client.hgetall(keys.layout)
        assert found == {b"version": b"%d" % LAYOUT_VERSION, b"partitions": b"8"}
        copies = [await connections.client.get(keys.layout_in(each)) for each in range(8)]
        assert copies == [b"%d 8" % LAYOUT_VERSION] * 8
        await claim(connections, keys)

    async def test_is_claimed_claims_nothing(self, connections: Connections, keys: Keys) -> None:
        """Whether a layout is claimed is read without claiming it; another layout is an error."""
        await connections.client.flushall()
        assert not await is_claimed(connections, keys)
        assert await connections.client.keys("*") == []
        await claim(connections, keys)
        assert await is_claimed(connections, keys)
        with pytest.raises(ConfigError, match="PARTITIONS is 16"):
            await is_claimed(connections, keys._replace(partitions=16))

    async def test_a_wrong_copy_is_replaced(self, connections: Connections, keys: Keys) -> None:
        """A partition that has lost its copy, or has that of a slower process, gets it again."""
        client, key = connections.client, keys.layout_in(3)
        await claim(connections, keys)
        await client.delete(key)
        await claim(connections, keys)
        assert await client.get(key) == keys.layout_copy.encode()
        await client.set(key, "3 16")
        await claim(connections, keys)
        assert await client.get(key) == keys.layout_copy.encode()

    async def test_a_layout_may_be_lost_while_it_is_claimed(
        self, connections: Connections, keys: Keys, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A process that claims another layout between our two steps is noticed."""
        copy = layout._copy

        async def lost(connections: Connections, keys: Keys) -> None:
            await copy(connections, keys)
            await connections.client.flushall()
            await connections.client.hset(keys.layout, mapping={"version": 3, "partitions": 16})

        monkeypatch.setattr(layout, "_copy", lost)
        with pytest.raises(ConfigError, match="PARTITIONS is 8"):
            await claim(connections, keys)

    @pytest.fixture(autouse=True)
    async def empty(self, connections: Connections) -> None:
        """Begin without the layout that the fixture claimed."""
        await connections.client.flushall()

    async def test_another_number_of_partitions_is_refused(
        self, connections: Connections, keys: Keys
    ) -> None:
        """The error has both numbers, and the layout stays."""
        await claim(connections, keys)
        with pytest.raises(ConfigError) as refused:
            await claim(connections, keys._replace(partitions=16))
        assert refused.value.problems == (
            "PARTITIONS is 16, but the layout in Redis was made for 8",
        )
        assert await connections.client.hget(keys.layout, "partitions") == b"8"

    async def test_another_version_is_refused(self, connections: Connections, keys: Keys) -> None:
        """A layout of another version, or one that cannot be read, is not touched."""
        await connections.client.hset(keys.layout, mapping={"version": "x", "partitions": 8})
        with pytest.raises(ConfigError, match="layout version"):
            await claim(connections, keys)

    @pytest.mark.skipif(roles.are_wanted(), reason="the users know one prefix only")
    async def test_another_prefix_is_another_layout(
        self, connections: Connections, keys: Keys
    ) -> None:
        """Two installations may share a server."""
        await claim(connections, keys)
        await claim(connections, Keys("other", 3))

    async def test_workers_start_on_a_full_server(
        self, connections: Connections, keys: Keys
    ) -> None:
        """On a full server a claimed layout and existing groups need no write."""
        await create_groups(connections, keys, ["log"])
        async with changed_config(connections, maxmemory="1"):
            await claim(connections, keys)
            assert await create_groups(connections, keys, ["log"]) == []
