"""Laws of the layout: where everything lies, who may start on it, and where groups begin."""

from __future__ import annotations

import asyncio

import pytest

from service.delivery.consumer_groups import create_groups
from service.errors import ConfigError
from service.storage import layout
from service.storage.connections import Connections
from service.storage.layout import LAYOUT_VERSION, Keys, claim, is_claimed
from tests.support import roles

TWO = Keys("idv", 2)


def test_a_session_has_one_partition_for_ever() -> None:
    """The partition is a plain checksum: these numbers may never change."""
    keys = Keys("idv", 8)
    assert [keys.partition(one) for one in ("vs_1", "vs_2", "vs_abc")] == [4, 6, 4]


def test_all_keys_of_a_session_share_a_tag() -> None:
    """What one script touches lies in one slot of a Cluster; what is shared has no tag."""
    keys = Keys("p", 8)
    assert keys.session("vs_2") == "p:{6}:session:vs_2"
    assert keys.transitions(2) == "p:{2}:transitions"
    assert keys.dead(2, "log") == "p:{2}:dead:log"
    assert keys.lease(2, "log") == "p:{2}:lease:log"
    assert keys.workers("log") == "p:workers:log"
    assert keys.layout == "p:layout"
    assert keys.layout_in(2) == "p:{2}:layout"


class TestGuard:
    """Nobody works on a layout that was made for other numbers."""

    async def test_the_first_claims_and_its_like_may_follow(
        self, connections: Connections, keys: Keys
    ) -> None:
        """An empty server takes the numbers of whoever comes first, once."""
        await asyncio.gather(*(claim(connections, keys) for _ in range(5)))
        found = await connections.client.hgetall(keys.layout)
        assert found == {b"version": b"%d" % LAYOUT_VERSION, b"partitions": b"8"}
        copies = [await connections.client.get(keys.layout_in(each)) for each in range(8)]
        assert copies == [b"%d 8" % LAYOUT_VERSION] * 8
        await claim(connections, keys)

    async def test_a_look_claims_nothing(self, connections: Connections, keys: Keys) -> None:
        """Whether a layout is_claimed is said without claiming one; another's is refused."""
        await connections.client.flushall()
        assert not await is_claimed(connections, keys)
        assert await connections.client.keys("*") == []
        await claim(connections, keys)
        assert await is_claimed(connections, keys)
        with pytest.raises(ConfigError, match="PARTITIONS is 16"):
            await is_claimed(connections, keys._replace(partitions=16))

    async def test_a_lost_copy_is_written_again(self, connections: Connections, keys: Keys) -> None:
        """Where a partition has lost its copy the guard restores it."""
        await claim(connections, keys)
        await connections.client.delete(keys.layout_in(3))
        await claim(connections, keys)
        assert await connections.client.get(keys.layout_in(3)) == keys.layout_copy.encode()

    async def test_a_copy_of_another_layout_is_replaced(
        self, connections: Connections, keys: Keys
    ) -> None:
        """What has been claimed is right, whatever a slower process has left in a partition."""
        await claim(connections, keys)
        await connections.client.set(keys.layout_in(3), "3 16")
        await claim(connections, keys)
        assert await connections.client.get(keys.layout_in(3)) == keys.layout_copy.encode()

    async def test_a_layout_lost_while_it_is_claimed_is_claimed_again(
        self, connections: Connections, keys: Keys, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another process that claims between our two steps is noticed."""
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
        """Sessions would be looked for in the wrong place: the start is refused, with both."""
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

    async def test_a_full_server_does_not_keep_workers_out(
        self, connections: Connections, keys: Keys
    ) -> None:
        """On a full server a known layout and known groups are no obstacle to a start."""
        await create_groups(connections, keys, ["log"])
        await connections.client.config_set("maxmemory", 1)
        try:
            await claim(connections, keys)
            assert await create_groups(connections, keys, ["log"]) == []
        finally:
            await connections.client.config_set("maxmemory", 0)


class TestGroups:
    """Where a handler's reading begins."""

    async def starts(self, connections: Connections, partition: int = 0) -> dict[str, str]:
        """Return each group of a partition, and the last id it counts as read."""
        groups = await connections.client.xinfo_groups(TWO.transitions(partition))
        return {one["name"].decode(): one["last-delivered-id"].decode() for one in groups}

    async def add(self, connections: Connections, partition: int = 0) -> str:
        """Append an entry and return its id."""
        entry: bytes = await connections.client.xadd(TWO.transitions(partition), {"a": "b"})
        return entry.decode()

    @pytest.fixture(autouse=True)
    async def empty(self, connections: Connections) -> None:
        """Begin without the groups that the fixture made."""
        await connections.client.flushall()

    async def test_at_first_all_begin_at_the_beginning(self, connections: Connections) -> None:
        """On an empty server groups stand before anything that will come."""
        assert await create_groups(connections, TWO, ["log", "nats"]) == ["log", "nats"]
        for partition in range(2):
            assert await self.starts(connections, partition) == {"log": "0-0", "nats": "0-0"}

    async def test_what_nobody_read_is_read_from_the_beginning(
        self, connections: Connections
    ) -> None:
        """On a stream without groups nothing was read, so nothing is skipped."""
        await self.add(connections)
        await create_groups(connections, TWO, ["log", "nats"])
        assert await self.starts(connections) == {"log": "0-0", "nats": "0-0"}

    async def test_a_handler_added_later_begins_at_the_end(self, connections: Connections) -> None:
        """History is not repeated to a newcomer; on an untouched stream it misses nothing."""
        await create_groups(connections, TWO, ["log"])
        last = await self.add(connections)
        assert await create_groups(connections, TWO, ["log", "nats"]) == ["nats"]
        assert await self.starts(connections, 0) == {"log": "0-0", "nats": last}
        assert await self.starts(connections, 1) == {"log": "0-0", "nats": "0-0"}

    async def test_opening_again_changes_nothing(self, connections: Connections) -> None:
        """A restart leaves every place as it was."""
        await create_groups(connections, TWO, ["log"])
        await self.add(connections)
        await connections.client.xreadgroup("log", "me", {TWO.transitions(0): ">"})
        before = await self.starts(connections)
        assert await create_groups(connections, TWO, ["log"]) == []
        assert await self.starts(connections) == before

    async def test_a_deleted_stream_begins_anew(self, connections: Connections) -> None:
        """After an operator deleted a stream its groups begin at its new beginning."""
        await create_groups(connections, TWO, ["log", "nats"])
        await self.add(connections)
        await connections.client.delete(TWO.transitions(0))
        await self.add(connections)
        assert await create_groups(connections, TWO, ["log", "nats"]) == ["log", "nats"]
        assert await self.starts(connections) == {"log": "0-0", "nats": "0-0"}

    async def test_many_may_open_at_once(self, connections: Connections) -> None:
        """Replicas that start together neither fail nor miss a group."""
        await asyncio.gather(*(create_groups(connections, TWO, ["log"]) for _ in range(8)))
        assert await self.starts(connections, 1) == {"log": "0-0"}

    async def test_no_group_on_another_layout(self, connections: Connections) -> None:
        """Where Redis holds another layout no group is created."""
        await claim(connections, TWO._replace(partitions=3))
        with pytest.raises(ConfigError, match="PARTITIONS is 2"):
            await create_groups(connections, TWO, ["log"])
        assert not await connections.client.exists(TWO.transitions(0))

    async def test_a_failure_is_told(self, connections: Connections) -> None:
        """What is in the way of a group is raised, not passed over."""
        await connections.client.set(TWO.transitions(1), "in the way")
        with pytest.raises(Exception, match="WRONGTYPE"):
            await create_groups(connections, TWO, ["log"])
