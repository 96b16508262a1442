"""Leases have one owner for as long as it renews them; heartbeats count the live workers.

Both hold while Redis's clock steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest.mock import AsyncMock

import pytest
from redis.exceptions import ResponseError

from service.delivery.leases import Heartbeats, Lease, ObservedLeases, ObservedValues, take_or_renew
from service.storage.connections import Connections
from service.storage.keys import Keys
from tests.support.virtual_time import push

HANDLER = "log"
KEY = "idv:{0}:lease:log"


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Partition 0 of an empty server.

    Attributes:
        client: A plain client, to look at Redis directly.
    """

    connections: Connections
    keys: Keys
    client: Any

    def lease(self, worker: str = "w1") -> Lease:
        """Return a lease that was not taken yet."""
        return Lease(self.connections, self.keys, handler=HANDLER, partition=0, worker=worker)

    async def renew(self, lease: Lease, ttl_s: float = 300) -> float | Exception:
        """Take or renew a lease; return the seconds to wait for it."""
        [wait_s] = await take_or_renew(self.connections, [lease], ttl_s)
        return wait_s

    async def taken(self, worker: str = "w1", *, ttl_s: float = 300) -> Lease:
        """Return a lease that was taken."""
        lease = self.lease(worker)
        assert await self.renew(lease, ttl_s) == 0
        return lease

    async def renew_late(self, lease: Lease) -> None:
        """Renew a lease that our clock may say has ended, so that in Redis it ends later."""
        lease.extend(asyncio.get_running_loop().time() + 300)
        await asyncio.sleep(0.002)
        assert await self.renew(lease) == 0

    async def can_take(self, observed: ObservedLeases) -> bool:
        """Let another worker try to take the lease; say whether it has succeeded."""
        return await take_or_renew(self.connections, [self.lease("w2")], 300, observed) == [0]

    def heartbeats(self, worker: str, ttl_s: float = 300) -> Heartbeats:
        """Return the heartbeats of a worker."""
        return Heartbeats(self.connections, self.keys, worker=worker, ttl_s=ttl_s)


@pytest.fixture
def partition(connections: Connections, keys: Keys) -> Partition:
    """Return partition 0 of an empty server."""
    return Partition(connections=connections, keys=keys, client=connections.client)


async def test_a_lease_has_one_owner(partition: Partition) -> None:
    """A lease that is held is refused, with the time until it may be free."""
    owned = await partition.taken(ttl_s=300)
    other = partition.lease("w2")
    wait_s = await partition.renew(other, 5)

    assert isinstance(wait_s, float)
    assert 200 < wait_s <= 300
    assert owned.is_held()
    assert not other.is_held()


async def test_our_deadline_is_never_later_than_that_of_redis(
    partition: Partition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our deadline counts from before the request, so however slow the reply, it comes first."""
    run = partition.connections.run

    async def run_slowly(calls: Sequence[Any]) -> list[Any]:
        await asyncio.sleep(0.1)
        replies = await run(calls)
        await asyncio.sleep(0.1)
        return replies

    monkeypatch.setattr(partition.connections, "run", run_slowly)
    lease = await partition.taken(ttl_s=300)
    left_s = await partition.client.pttl(KEY) / 1000

    assert lease._deadline is not None
    assert lease._deadline < asyncio.get_running_loop().time() + left_s
    assert lease.is_held()
    push(300)
    assert not lease.is_held()


async def test_a_lease_of_another_owner_is_lost(partition: Partition) -> None:
    """After a release another worker has the lease; a renewal that meets another token loses it."""
    first = await partition.taken("w1")
    await first.release()
    assert not first.is_held()
    second = await partition.taken("w2")
    await first.release()
    assert await partition.renew(second) == 0
    await partition.client.set(KEY, "another token")
    assert await partition.renew(second, 10)
    assert not second.is_held()


async def test_a_failed_renewal_leaves_the_lease_as_it_was(
    partition: Partition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When Redis does not answer, the error is returned and the deadline stays."""
    lease = await partition.taken()
    error = ResponseError("refused")
    monkeypatch.setattr(partition.connections, "run", AsyncMock(return_value=[error]))
    assert await partition.renew(lease) is error
    assert lease.is_held()


async def test_each_renewal_extends_the_lease(partition: Partition) -> None:
    """Every renewal extends the lease, the first and each later one, in Redis and by our clock."""
    lease = await partition.taken(ttl_s=100)
    deadlines, ends = [], []
    for _ in range(5):
        assert await partition.renew(lease, 100) == 0
        deadlines.append(lease._deadline or 0.0)
        ends.append(await partition.client.pexpiretime(KEY))
        push(60)
        await asyncio.sleep(0.002)

    assert lease.is_held()
    assert ends == sorted({*ends})
    assert all(later - earlier >= 60 for earlier, later in pairwise(deadlines))


async def test_a_stale_lease_is_taken_whatever_redis_says(partition: Partition) -> None:
    """A worker that has seen a lease unchanged for its time to live, by its own clock, takes it."""
    dead = await partition.taken("dead", ttl_s=300)
    observed = ObservedLeases(300)
    assert not await partition.can_take(observed)
    assert observed.owner((HANDLER, 0)) == "dead"
    push(299)
    assert not await partition.can_take(observed)
    push(1)
    assert await partition.can_take(observed)
    assert await partition.client.get(KEY) != dead.token.encode()
    assert not observed.owner((HANDLER, 0))


async def test_a_renewed_lease_is_not_taken(partition: Partition) -> None:
    """One renewal, however late it is noticed, and the time to live counts anew."""
    owned = await partition.taken("owner", ttl_s=300)
    observed = ObservedLeases(300)
    assert not await partition.can_take(observed)
    for _ in range(3):
        push(299)
        await partition.renew_late(owned)
        push(299)
        assert not await partition.can_take(observed)
    assert owned.is_held()


async def test_a_renewal_unobserved_so_far_keeps_the_lease(partition: Partition) -> None:
    """Only the very lease that was observed is taken: one that was renewed since is another."""
    owned = await partition.taken("owner", ttl_s=300)
    observed = ObservedLeases(300)
    assert not await partition.can_take(observed)
    push(300)
    await partition.renew_late(owned)
    assert observed.is_stale((HANDLER, 0))
    assert not await partition.can_take(observed)
    assert await partition.renew(owned) == 0


async def test_a_lease_without_an_expiry_is_an_operators(partition: Partition) -> None:
    """A lease that an operator set by hand is left alone until the operator deletes it."""
    await partition.client.set(KEY, "by hand")
    observed = ObservedLeases(300)
    for _ in range(3):
        assert not await partition.can_take(observed)
        push(300)
    await partition.client.delete(KEY)
    assert await partition.can_take(observed)


async def test_live_workers_are_counted(partition: Partition) -> None:
    """A worker counts from its first heartbeat until it removes itself or falls silent."""
    a, b, c = (partition.heartbeats(name) for name in "abc")
    assert await a.send([HANDLER]) == {HANDLER: 1}
    assert await b.send([HANDLER]) == {HANDLER: 2}
    assert await b.send([HANDLER]) == {HANDLER: 2}
    await b.remove([HANDLER])
    assert await a.send([HANDLER]) == {HANDLER: 1}
    await c.send([HANDLER])
    await asyncio.sleep(0.06)
    assert await partition.heartbeats("a", 0.05).send([HANDLER]) == {HANDLER: 1}


async def test_heartbeats_are_counted_for_each_handler(partition: Partition) -> None:
    """One call sends heartbeats for several handlers; each counts its own workers."""
    assert await partition.heartbeats("a").send(["x", "y"]) == {"x": 1, "y": 1}
    assert await partition.heartbeats("b").send(["y", "z"]) == {"y": 2, "z": 1}


async def test_a_silent_worker_does_not_count_whatever_redis_says(partition: Partition) -> None:
    """A heartbeat counts for its time to live by the clock of the worker that counts."""
    a, b = partition.heartbeats("a"), partition.heartbeats("b")
    await b.send([HANDLER])
    assert await a.send([HANDLER]) == {HANDLER: 2}
    push(299)
    assert await a.send([HANDLER]) == {HANDLER: 2}
    push(1)
    assert await a.send([HANDLER]) == {HANDLER: 1}
    await asyncio.sleep(0.002)
    await b.send([HANDLER])
    assert await a.send([HANDLER]) == {HANDLER: 2}


async def test_observed_values_are_forgotten_with_their_keys() -> None:
    """What no longer exists takes no memory and is not stale."""
    observed: ObservedValues[int] = ObservedValues(10)
    observed.observe_all({1: b"a", 2: b"b"})
    push(10)
    observed.observe_all({2: b"b", 3: b"c"})
    assert observed.stale() == {2}
    observed.observe(2, b"")
    assert observed.stale() == set()
    assert [observed.last(key) for key in (1, 2, 3)] == [b"", b"", b"c"]
