"""Laws of leases and heartbeats: one owner, for as long as it renews, by nobody's wrong clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ResponseError

from service.config import Settings
from service.delivery.consumer import Consumer
from service.delivery.consumer_groups import measure_lags
from service.delivery.leases import Heartbeats, LeaseWatch, Watch, lease
from service.delivery.stream_watcher import StreamWatcher
from service.secret import Secret
from service.storage.connections import Connections, connect
from service.storage.layout import Keys
from tests.support.clocks import Clocked, clocked_server, needs_libfaketime
from tests.support.servers import until
from tests.support.virtual_time import push

HANDLER = "log"
LEASE = "idv:{0}:lease:log"
# Of leases that end while a test waits.
TTL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Post:
    """Partition 0, and what is needed to lease it.

    Attributes:
        client: A plain client for looking behind the scenes.
    """

    connections: Connections
    keys: Keys
    client: Any

    def consumer(self, worker: str = "w1") -> Consumer:
        """Return a consumer without a lease."""
        stream_watcher = StreamWatcher(self.connections, 0)
        return Consumer(self.connections, self.keys, stream_watcher, handler=HANDLER, worker=worker)

    async def leased(self, worker: str = "w1", *, ttl_s: float = 300) -> Consumer:
        """Return a consumer that has the lease."""
        consumer = self.consumer(worker)
        assert await lease(self.connections, [consumer], ttl_s) == [0]
        return consumer

    async def takes(self, watch: LeaseWatch, worker: str = "w2", *, ttl_s: float = TTL_S) -> bool:
        """Try to take the lease; say whether that has succeeded."""
        return await lease(self.connections, [self.consumer(worker)], ttl_s, watch) == [0]

    def heartbeats(self, worker: str, ttl_s: float = 300) -> Heartbeats:
        """Return the heartbeats of a worker."""
        return Heartbeats(self.connections, self.keys, worker=worker, ttl_s=ttl_s)

    async def is_free(self) -> bool:
        """Say whether nobody holds the lease."""
        return not await self.client.exists(LEASE)


@pytest.fixture
def post(connections: Connections, keys: Keys) -> Post:
    """Return partition 0 of an empty server."""
    return Post(connections=connections, keys=keys, client=connections.client)


@pytest.fixture
def clocked(tmp_path: Path) -> Iterator[Clocked]:
    """Yield a server whose clock a test may step."""
    with clocked_server(tmp_path / "clocked") as yielded:
        yield yielded


@pytest.fixture
async def stepping(clocked: Clocked, keys: Keys) -> AsyncIterator[Post]:
    """Yield partition 0 of that server."""
    async with connect(Secret(clocked.server.url)) as opened:
        yield Post(connections=opened, keys=keys, client=opened.client)


async def test_a_lease_has_one_owner(post: Post) -> None:
    """A lease that is held is refused, with the time until it may be free."""
    holder = await post.leased(ttl_s=300)
    other = post.consumer("w2")
    [wait_s] = await lease(post.connections, [other], 5)

    assert isinstance(wait_s, float)
    assert 200 < wait_s <= 300
    assert holder.is_ours()
    assert not other.is_ours()


async def test_a_lease_is_renewed_while_it_is_ours(post: Post) -> None:
    """Renewing prolongs the lease, in Redis and by our own clock."""
    consumer = await post.leased(ttl_s=100)
    assert await lease(post.connections, [consumer], 300) == [0]

    assert await post.client.pttl(LEASE) > 200_000
    assert consumer.is_ours()


async def test_a_lease_that_ran_out_is_not_renewed(post: Post) -> None:
    """Whoever let a lease run out must begin again, even when nobody else has taken it."""
    consumer = await post.leased(ttl_s=0.05)
    await until(lambda: not consumer.is_ours())
    await until(post.is_free)

    assert await lease(post.connections, [consumer], 300) == [0.001]
    assert not consumer.is_ours()
    assert not await post.client.exists(LEASE)


async def test_our_deadline_is_never_later_than_that_of_redis(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By our clock the lease ends first, however late its answer: it began before the question."""
    asked = post.connections.run

    async def slowly(calls: Sequence[Any]) -> list[Any]:
        await asyncio.sleep(0.1)
        replies = await asked(calls)
        await asyncio.sleep(0.1)
        return replies

    monkeypatch.setattr(post.connections, "run", slowly)
    consumer = await post.leased(ttl_s=300)
    left_s = await post.client.pttl(LEASE) / 1000

    assert consumer._fence.deadline is not None
    assert consumer._fence.deadline < asyncio.get_running_loop().time() + left_s


async def test_a_lease_with_another_token_is_lost(post: Post) -> None:
    """A renewal that meets another token voids the lease at once."""
    consumer = await post.leased()
    await post.client.set(LEASE, "somebody else")
    [wait_s] = await lease(post.connections, [consumer], 10)

    assert wait_s
    assert not consumer.is_ours()


async def test_a_released_lease_is_free_at_once(post: Post) -> None:
    """After release another takes the lease without waiting; a foreign lease is left alone."""
    first = await post.leased("w1")
    await first.release()
    assert not first.is_ours()
    second = await post.leased("w2")
    await first.release()
    assert second.is_ours()
    assert await lease(post.connections, [second], 10) == [0]


async def test_unanswered_leasing_leaves_the_lease_as_it_was(
    post: Post, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When Redis does not answer, the error is told and the deadline goes on running."""
    consumer = await post.leased()
    broken = ResponseError("refused")

    async def run(calls: Sequence[Any]) -> list[Any]:
        return [broken] * len(calls)

    monkeypatch.setattr(post.connections, "run", run)

    assert await lease(post.connections, [consumer], 10) == [broken]
    assert consumer.is_ours()
    assert await measure_lags(post.connections, post.keys, [(HANDLER, 0)]) == [broken]


async def test_a_lease_is_renewed_as_often_as_it_is_asked_for(post: Post) -> None:
    """Every renewal prolongs the lease, the first and each later one, in Redis and by our clock."""
    consumer = await post.leased(ttl_s=100)
    deadlines, ends = [], []
    for _ in range(5):
        assert await lease(post.connections, [consumer], 100) == [0]
        deadlines.append(consumer._fence.deadline or 0.0)
        ends.append(await post.client.pexpiretime(LEASE))
        push(60)
        await asyncio.sleep(0.002)

    assert consumer.is_ours()
    assert ends == sorted({*ends})
    assert all(later - earlier >= 60 for earlier, later in pairwise(deadlines))


async def test_a_lease_that_is_not_renewed_is_taken_whatever_redis_says(post: Post) -> None:
    """Whoever has seen a lease unchanged for its time to live, by its own clock, takes it."""
    dead = await post.leased("dead", ttl_s=300)
    watch = LeaseWatch(300)
    assert not await post.takes(watch, ttl_s=300)
    assert watch.owner((HANDLER, 0)) == "dead"
    push(299)
    assert not await post.takes(watch, ttl_s=300)
    push(1)
    assert await post.takes(watch, ttl_s=300)
    assert await post.client.get(LEASE) != dead._fence.token.encode()
    assert not watch.owner((HANDLER, 0))


async def test_a_lease_that_is_renewed_is_not_taken(post: Post) -> None:
    """One renewal, however late it is noticed, and the waiting begins anew."""
    owner = await post.leased("owner", ttl_s=300)
    watch = LeaseWatch(300)
    assert not await post.takes(watch, ttl_s=300)
    for _ in range(3):
        push(299)
        owner.leased(asyncio.get_running_loop().time() + 300)
        await asyncio.sleep(0.002)
        assert await lease(post.connections, [owner], 300) == [0]
        push(299)
        assert not await post.takes(watch, ttl_s=300)
    assert owner.is_ours()


async def test_a_renewal_between_two_looks_saves_a_lease(post: Post) -> None:
    """What is taken is the lease that was seen: one renewed meanwhile is another."""
    owner = await post.leased("owner", ttl_s=300)
    watch = LeaseWatch(300)
    assert not await post.takes(watch, ttl_s=300)
    push(300)
    owner.leased(asyncio.get_running_loop().time() + 300)
    await asyncio.sleep(0.002)
    assert await lease(post.connections, [owner], 300) == [0]
    assert watch.is_dead((HANDLER, 0))
    assert not await post.takes(watch, ttl_s=300)
    assert await lease(post.connections, [owner], 300) == [0]


async def test_a_lease_without_an_end_is_an_operators(post: Post) -> None:
    """A lease that an operator made by hand is left alone until the operator deletes it."""
    await post.client.set(LEASE, "by hand")
    watch = LeaseWatch(300)
    for _ in range(3):
        assert not await post.takes(watch, ttl_s=300)
        push(300)
    await post.client.delete(LEASE)
    assert await post.takes(watch, ttl_s=300)


@needs_libfaketime
@pytest.mark.parametrize("step_s", [-600, -0.9, -40 * 86_400])
async def test_a_clock_that_steps_back_keeps_no_lease_alive(
    clocked: Clocked, stepping: Post, step_s: float
) -> None:
    """The lease of a dead worker is free after its time to live, not after that of the step."""
    await stepping.leased("dead", ttl_s=TTL_S)
    clocked.step(step_s)
    watch = LeaseWatch(TTL_S)

    async def is_taken() -> bool:
        return await stepping.takes(watch)

    await until(is_taken)


@needs_libfaketime
@pytest.mark.parametrize("step_s", [-600, 600])
async def test_a_clock_that_steps_takes_no_lease_from_the_living(
    clocked: Clocked, stepping: Post, step_s: float
) -> None:
    """Who renews in time keeps the lease through a step back, and meets no second owner in any."""
    owner = await stepping.leased("owner", ttl_s=300)
    watch = LeaseWatch(300)
    assert not await stepping.takes(watch, ttl_s=300)
    clocked.step(step_s)
    for _ in range(6):
        await asyncio.sleep(0.002)
        [wait_s] = await lease(stepping.connections, [owner], 300)
        is_taken = await stepping.takes(watch, ttl_s=300)
        assert is_taken != owner.is_ours()
        if is_taken:
            break
        push(100)
    # A step forward ends every lease at once.
    assert owner.is_ours() == (wait_s == 0) == (step_s < 0)


async def test_workers_are_counted_while_they_live(post: Post) -> None:
    """A worker counts from its first sign of life until it says goodbye or falls silent."""
    a, b, c = (post.heartbeats(name) for name in "abc")
    assert await a.beat([HANDLER]) == {HANDLER: 1}
    assert await b.beat([HANDLER]) == {HANDLER: 2}
    assert await b.beat([HANDLER]) == {HANDLER: 2}
    await b.end([HANDLER])
    assert await a.beat([HANDLER]) == {HANDLER: 1}
    await c.beat([HANDLER])
    await asyncio.sleep(0.06)
    assert await post.heartbeats("a", 0.05).beat([HANDLER]) == {HANDLER: 1}


async def test_heartbeats_are_counted_for_each_handler(post: Post) -> None:
    """All handlers are told of in one call, each with the workers that work for it."""
    assert await post.heartbeats("a").beat(["x", "y"]) == {"x": 1, "y": 1}
    assert await post.heartbeats("b").beat(["y", "z"]) == {"y": 2, "z": 1}


async def test_a_worker_not_heard_of_again_does_not_count_whatever_redis_says(post: Post) -> None:
    """A sign of life counts for so long by the clock of whoever counts, not by Redis's."""
    a, b = post.heartbeats("a"), post.heartbeats("b")
    await b.beat([HANDLER])
    assert await a.beat([HANDLER]) == {HANDLER: 2}
    push(299)
    assert await a.beat([HANDLER]) == {HANDLER: 2}
    push(1)
    assert await a.beat([HANDLER]) == {HANDLER: 1}
    await asyncio.sleep(0.002)
    await b.beat([HANDLER])
    assert await a.beat([HANDLER]) == {HANDLER: 2}


@needs_libfaketime
@pytest.mark.parametrize("step_s", [-600, -0.9])
async def test_a_clock_that_steps_back_keeps_no_worker_alive(
    clocked: Clocked, stepping: Post, step_s: float
) -> None:
    """A worker that died before the step is soon counted no more; the living are."""
    a, b, dead = (stepping.heartbeats(name) for name in ("a", "b", "dead"))
    for one in (a, b, dead, a):
        await one.beat([HANDLER])
    clocked.step(step_s)
    for _ in range(4):
        await asyncio.sleep(0.002)
        for one in (a, b):
            await one.beat([HANDLER])
        push(100)
    for one in (a, b):
        await asyncio.sleep(0.002)
        assert await one.beat([HANDLER]) == {HANDLER: 2}


async def test_what_is_watched_is_forgotten_with_its_key(post: Post) -> None:
    """A watch holds no more than there is to see."""
    watch: Watch[int] = Watch(10)
    watch.see_all({1: b"a", 2: b"b"})
    push(10)
    watch.see_all({2: b"b", 3: b"c"})
    assert watch.dead() == [2]
    watch.see(2, b"")
    assert watch.dead() == []
    assert [watch.last(key) for key in (1, 2, 3)] == [b"", b"", b"c"]
