"""Laws of the mailbox: leases, fencing, taking over, counting, burying; on a real server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from redis.exceptions import RedisError, ResponseError

from service.config import Settings
from service.delivery import stream_watcher as arrivals_module
from service.delivery.consumer import (
    MAX_CLAIMED_PER_CALL,
    SUSPECT,
    Delivery,
    LeaseLostError,
    Mailbox,
    Missing,
    Tries,
)
from service.delivery.lag import Lag, lags
from service.delivery.leases import Heartbeats, lease
from service.delivery.stream_watcher import Arrivals
from service.secret import Secret
from service.storage.connections import Connections, connect
from service.storage.layout import Keys, open_groups
from service.storage.scripts import NotReplicatedError
from service.transitions import stream_entry
from service.transitions.transition import SessionChange
from tests.support.servers import PATIENCE_S, Server, until

HANDLER = "log"
STREAM = "idv:{0}:transitions"
DEAD = "idv:{0}:dead:log"
LEASE = "idv:{0}:lease:log"


@dataclass(frozen=True, kw_only=True)
class Post:
    """Partition 0 of an empty server, and what is needed to work it.

    Attributes:
        client: A plain client for looking behind the scenes.
    """

    connections: Connections
    keys: Keys
    arrivals: Arrivals
    client: Any

    def mailbox(self, worker: str = "w1") -> Mailbox:
        """Return a mailbox without a lease."""
        return Mailbox(self.connections, self.keys, self.arrivals, handler=HANDLER, worker=worker)

    async def lags(self) -> list[Lag | Exception]:
        """Measure what the handler has not settled here."""
        return await lags(self.connections, self.keys, [(HANDLER, 0)])

    async def leased(self, worker: str = "w1", *, ttl_s: float = 300) -> Mailbox:
        """Return a mailbox that has the lease."""
        mailbox = self.mailbox(worker)
        assert await lease(self.connections, [mailbox], ttl_s) == [0]
        return mailbox

    async def steal(self) -> None:
        """Let the lease pass to somebody else."""
        await self.client.set(LEASE, "somebody else")

    async def is_free(self) -> bool:
        """Say whether nobody holds the lease."""
        return not await self.client.exists(LEASE)

    async def is_blocking(self) -> bool:
        """Say whether Redis holds a blocking read."""
        return int((await self.client.info("clients"))["blocked_clients"]) > 0

    async def admit(self, *sequences: int) -> list[str]:
        """Append a transition of a session of its own for each number; return the ids."""
        return [
            (
                await self.client.xadd(
                    STREAM,
                    {"change": change(n), "previous": "", "sequence": n, "epoch": 1},
                )
            ).decode()
            for n in sequences
        ]

    async def pending(self) -> dict[str, tuple[str, int]]:
        """Return consumer and delivery count of each pending entry."""
        found = await self.client.xpending_range(STREAM, HANDLER, "-", "+", 10_000)
        return {
            one["message_id"].decode(): (one["consumer"].decode(), one["times_delivered"])
            for one in found
        }


def change(n: int) -> bytes:
    """Return the stored form of one change."""
    return (
        b'{"event_id":"evt_%d","event_type":"identity.verification_session.processing",'
        b'"occurred_at":"2026-01-01T00:00:00Z","session_id":"vs_%d","current":"processing"}'
        % (n, n)
    )


def sequences(deliveries: Sequence[Delivery]) -> list[int | None]:
    """Return the sequence numbers of deliveries; None for one that cannot be read."""
    return [one.transition.sequence if one.transition else None for one in deliveries]


@pytest.fixture
async def post(
    connections: Connections, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Post]:
    """Yield partition 0, where a block outlasts every test; its watch is closed at the end."""
    monkeypatch.setattr(arrivals_module, "BLOCK_S", 10 * PATIENCE_S)
    arrivals = Arrivals(connections, 0)
    yield Post(connections=connections, keys=keys, arrivals=arrivals, client=connections.client)
    await arrivals.close()


def test_the_stored_form_is_the_one_of_wire() -> None:
    """What these tests put on the stream is what admission would."""
    stored = {b"change": change(1), b"previous": b"", b"sequence": b"1", b"epoch": b"1"}
    assert isinstance(stream_entry.unpack(stored), SessionChange)


@pytest.mark.parametrize("call", ["read", "load", "settle", "count", "bury", "take_over"])
async def test_everything_is_fenced(post: Post, call: str) -> None:
    """With a stolen lease nothing is read, settled, counted, buried or taken over."""
    await post.admit(1, 2)
    mailbox = await post.leased()
    [delivery] = await mailbox.read(1)
    before = await post.pending()
    await post.steal()
    assert mailbox.is_ours()

    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "read": lambda: mailbox.read(1),
        "load": lambda: mailbox.load(delivery),
        "settle": lambda: mailbox.settle(delivery),
        "count": lambda: mailbox.count(delivery, Tries(3, 1)),
        "bury": lambda: mailbox.bury(delivery, reason="exhausted", error="", attempts=3),
        "take_over": lambda: anext(mailbox.take_over()),
    }
    with pytest.raises(LeaseLostError):
        await calls[call]()

    assert not mailbox.is_ours()
    assert await post.pending() == before
    assert not await post.client.exists(DEAD)
    [group] = await post.client.xinfo_groups(STREAM)
    assert group["last-delivered-id"].decode() == delivery.entry_id


async def test_reading_is_in_order_and_pending_until_settled(post: Post) -> None:
    """Deliveries come oldest first, at most as many as asked for, and pend until settled."""
    await post.admit(1, 2, 3)
    mailbox = await post.leased()
    first = await mailbox.read(2)
    rest = await mailbox.read(2)

    assert sequences(first + rest) == [1, 2, 3]
    assert {delivery.tries for delivery in first + rest} == {Tries(0, 1)}
    assert await mailbox.read(2) == []
    await asyncio.gather(*(mailbox.settle(delivery) for delivery in first))
    assert list(await post.pending()) == [rest[0].entry_id]


async def test_take_over_is_oldest_first_in_batches(post: Post) -> None:
    """All that a dead worker had comes in order, in batches, and is the successor's then."""
    total = 2 * MAX_CLAIMED_PER_CALL + 50
    await post.admit(*range(1, total + 1))
    dead = await post.leased("dead")
    while await dead.read(100):
        pass
    await dead.release()
    heir = await post.leased("heir")
    batches = [batch async for batch in heir.take_over()]

    assert [len(batch) for batch in batches] == [100, 100, 50]
    assert sequences([delivery for batch in batches for delivery in batch]) == [
        *range(1, total + 1)
    ]
    assert {owner for owner, _ in (await post.pending()).values()} == {"heir"}
    consumers = await post.client.xinfo_consumers(STREAM, HANDLER)
    assert [one["name"] for one in consumers] == [b"heir"]


async def test_an_exact_number_of_batches_ends_too(post: Post) -> None:
    """A remainder that fills its last batch exactly is followed by the end."""
    await post.admit(*range(MAX_CLAIMED_PER_CALL))
    mailbox = await post.leased()
    await mailbox.read(MAX_CLAIMED_PER_CALL)
    assert [len(batch) async for batch in mailbox.take_over()] == [MAX_CLAIMED_PER_CALL]


async def test_failures_survive_and_foreign_starts_add_up(post: Post) -> None:
    """Failures are kept across owners; each owner that vanished adds a start, up to suspicion."""
    await post.admit(1, 2)
    mailbox = await post.leased("w0")
    failed, fresh = await mailbox.read(2)
    await mailbox.count(failed, Tries(7, 1))
    seen = []
    for n in range(1, 5):
        await mailbox.release()
        mailbox = await post.leased(f"w{n}")
        [batch] = [batch async for batch in mailbox.take_over()]
        seen.append([delivery.tries for delivery in batch])

    assert seen == [
        [Tries(7, 2), Tries(0, 2)],
        [Tries(7, SUSPECT), Tries(0, SUSPECT)],
        [Tries(7, SUSPECT), Tries(0, SUSPECT)],
        [Tries(7, SUSPECT), Tries(0, SUSPECT)],
    ]
    assert fresh.tries == Tries(0, 1)


async def test_taking_over_from_oneself_suspects_nobody(post: Post) -> None:
    """A process that begins again has not been killed: its own entries keep their count."""
    await post.admit(1)
    mailbox = await post.leased()
    await mailbox.read(1)
    for _ in range(5):
        [[delivery]] = [batch async for batch in mailbox.take_over()]
    assert delivery.tries == Tries(0, 1)


async def test_counts_travel_together(post: Post) -> None:
    """Many counts written at once all arrive."""
    await post.admit(*range(300))
    mailbox = await post.leased()
    deliveries = [delivery for _ in range(3) for delivery in await mailbox.read(100)]
    await asyncio.gather(*(mailbox.count(one, Tries(n, 1)) for n, one in enumerate(deliveries)))

    assert [count for _, count in (await post.pending()).values()] == [
        n * 1000 + 1 for n in range(300)
    ]


async def test_entries_gone_from_the_stream_are_passed_over(post: Post) -> None:
    """A pending entry that an operator deleted is neither delivered nor in the way."""
    first, _ = await post.admit(1, 2)
    mailbox = await post.leased()
    await mailbox.read(2)
    await post.client.xdel(STREAM, first)
    [batch] = [batch async for batch in mailbox.take_over()]

    assert sequences(batch) == [2]
    assert len(await post.pending()) == 1


async def test_burying_keeps_the_entry_and_settles_it(post: Post) -> None:
    """A dead letter holds every field of the entry and why, and the entry is settled with it."""
    [entry_id] = await post.admit(1)
    mailbox = await post.leased()
    [delivery] = await mailbox.read(1)
    held = await mailbox.bury(
        delivery, reason="exhausted", error="ValueError", place="own.py:1 handle", attempts=10
    )

    assert held == 1
    assert await post.pending() == {}
    [(_, fields)] = await post.client.xrange(DEAD)
    assert fields == {
        b"change": change(1),
        b"previous": b"",
        b"sequence": b"1",
        b"epoch": b"1",
        b"entry_id": entry_id.encode(),
        b"reason": b"exhausted",
        b"error": b"ValueError",
        b"place": b"own.py:1 handle",
        b"attempts": b"10",
    }


async def test_burying_again_makes_no_second_letter(post: Post) -> None:
    """Whoever buries once more, because the reply was lost, finds the one letter there is."""
    await post.admit(1)
    mailbox = await post.leased()
    [delivery] = await mailbox.read(1)
    letter = {"reason": "exhausted", "error": "ValueError"}

    assert [await mailbox.bury(delivery, attempts=10, **letter) for _ in range(2)] == [1, 1]
    assert await post.client.xlen(DEAD) == 1


async def test_what_is_kept_by_id_is_read_again(post: Post) -> None:
    """A load returns what an entry holds, from either stream, or says why there is nothing."""
    replays = post.keys.replays(0, HANDLER)
    await post.client.xgroup_create(replays, HANDLER, id="0", mkstream=True)
    first, second = await post.admit(1, 2)
    await post.client.xadd(STREAM, {"nothing": "ours"})
    entry = {"change": change(3), "previous": "", "sequence": 3, "epoch": 1, "replay": "r"}
    # Under the same id, so that only the stream tells them apart.
    await post.client.xadd(replays, entry, id=second)
    mailbox = await post.leased()
    deliveries = await mailbox.read(10)
    assert sequences(deliveries) == [3, 1, 2, None]
    assert [one.is_replay for one in deliveries] == [True, False, False, False]
    await post.client.xdel(STREAM, first)

    found = await asyncio.gather(*map(mailbox.load, deliveries))
    assert found == [
        deliveries[0].transition,
        Missing.GONE,
        deliveries[2].transition,
        Missing.UNREADABLE,
    ]


async def test_unreadable_entries_are_handed_out_as_such(post: Post) -> None:
    """An entry that is not ours is a delivery without a transition, and is buried as any other."""
    replays = post.keys.replays(0, HANDLER)
    await post.client.xgroup_create(replays, HANDLER, id="0", mkstream=True)
    await post.client.xadd(STREAM, {"change": "{", "secret": "kept"})
    await post.client.xadd(STREAM, {"nothing": "ours", "replay": "not one"})
    await post.client.xadd(replays, {"no": "replay"})
    await post.admit(1)
    mailbox = await post.leased()
    first = await mailbox.read(10)
    assert sequences(first) == [None, None, None, 1]

    again = [one async for batch in mailbox.take_over() for one in batch]
    assert sequences(again) == [None, None, 1, None]
    for delivery in first[:3]:
        assert await mailbox.bury(delivery, reason=Missing.UNREADABLE, error="", attempts=0)
    assert list(await post.pending()) == [first[3].entry_id]
    assert await post.client.xlen(replays) == 0
    letters = [fields for _, fields in await post.client.xrange(DEAD)]
    assert [letter[b"reason"] for letter in letters] == [b"unreadable"] * 3
    assert letters[1][b"secret"] == b"kept"


async def test_an_entry_of_very_many_fields_can_be_buried(post: Post) -> None:
    """What somebody else put there is no more than one call of a script can take."""
    await post.client.xadd(STREAM, {f"field{n}": "x" for n in range(10_000)})
    mailbox = await post.leased()
    [delivery] = await mailbox.read(1)

    assert await mailbox.bury(delivery, reason=Missing.UNREADABLE, error="", attempts=0) == 1
    [(_, letter)] = await post.client.xrange(DEAD)
    assert letter[b"entry_id"].decode() == delivery.entry_id
    assert not await post.pending()


async def test_after_only_unreadable_entries_the_next_arrival_is_seen(post: Post) -> None:
    """A read that yields nothing readable is followed by one that knows where to wait."""
    await post.client.xadd(STREAM, {"nothing": "ours"})
    mailbox = await post.leased()
    assert sequences(await mailbox.read(10)) == [None]
    assert await mailbox.read(10) == []
    waiting = asyncio.create_task(mailbox.arrival())
    await post.admit(1)
    async with asyncio.timeout(PATIENCE_S):
        await waiting
    assert sequences(await mailbox.read(10)) == [1]


async def test_settling_works_on_a_full_server(post: Post) -> None:
    """Leasing, reading, settling, counting and burying go on when Redis refuses admissions."""
    await post.admit(1, 2)
    client = post.client
    before = (await client.config_get("maxmemory"))["maxmemory"]
    await client.config_set("maxmemory", 1)
    try:
        mailbox = await post.leased()
        first, second = await mailbox.read(2)
        await mailbox.settle(first)
        await mailbox.count(second, Tries(1, 1))
        assert await mailbox.load(second) == second.transition
        await mailbox.bury(second, reason="exhausted", error="", attempts=1)
        [lag] = await post.lags()
        await Heartbeats(post.connections, post.keys, worker="w", ttl_s=5).beat([HANDLER])
        await mailbox.release()
    finally:
        await client.config_set("maxmemory", before)
    assert lag == Lag(0, 0, oldest_s=0.0, dead=1)


async def test_an_arrival_wakes_everybody(post: Post) -> None:
    """All who wait for a partition wake at its next entry, whatever place they wait at."""
    [first] = await post.admit(1)
    waiting = [asyncio.create_task(post.arrivals.after({STREAM: first})) for _ in range(3)]
    await until(lambda: post.arrivals._watch is not None)
    await post.admit(2)
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*waiting)
    await until(lambda: post.arrivals._watch is None)


async def test_nobody_waits_for_what_is_there(post: Post) -> None:
    """Waiting behind an entry that already exists ends at once, also beside a later watch."""
    first, second = await post.admit(1, 2)
    later = asyncio.create_task(post.arrivals.after({STREAM: second}))
    await until(lambda: post.arrivals._watched == {STREAM: second})
    async with asyncio.timeout(PATIENCE_S):
        await post.arrivals.after({STREAM: first})
    assert not later.done()
    await post.admit(3)
    async with asyncio.timeout(PATIENCE_S):
        await later


async def test_one_who_joins_behind_and_finds_nothing_wakes_with_the_rest(post: Post) -> None:
    """A place before the watch, whose successor was deleted, waits without turning in circles."""
    first, second = await post.admit(1, 2)
    await post.client.xdel(STREAM, second)
    waiting = [asyncio.create_task(post.arrivals.after({STREAM: second}))]
    await until(lambda: post.arrivals._watched == {STREAM: second})
    waiting.append(asyncio.create_task(post.arrivals.after({STREAM: first})))
    await until(post.is_blocking)
    assert not any(task.done() for task in waiting)
    await post.admit(3)
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*waiting)


async def test_a_watch_nobody_waits_for_ends(post: Post) -> None:
    """After the last waiter is gone the blocking read is not repeated; close ends it at once."""
    waiter = asyncio.create_task(post.arrivals.after({STREAM: "0-0"}))
    await until(lambda: post.arrivals._watch is not None)
    waiter.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiter
    async with asyncio.timeout(PATIENCE_S):
        await post.arrivals.close()
    assert post.arrivals._watch is None


async def test_a_failing_watch_fails_everybody(post: Post) -> None:
    """An error of the blocking read reaches all who wait, and the next one watches anew."""
    waiting = [asyncio.create_task(post.arrivals.after({STREAM: "0-0"})) for _ in range(2)]
    await until(post.is_blocking)
    await post.client.client_kill_filter(_type="normal", skipme=True)
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(result, RedisError)
    await post.admit(1)
    async with asyncio.timeout(PATIENCE_S):
        await post.arrivals.after({STREAM: "0-0"})


async def test_lag_counts_what_is_not_settled(post: Post) -> None:
    """Lag is what is unread and what pends; its age is that of the oldest of either."""
    mailbox = await post.leased()
    assert await post.lags() == [Lag(0, 0, oldest_s=0.0, dead=0)]

    await post.admit(1, 2, 3)
    await asyncio.sleep(0.03)
    [unread] = await post.lags()
    assert isinstance(unread, Lag)
    assert unread.entries == 3
    assert 0.03 <= unread.oldest_s < 60

    first, second = await mailbox.read(2)
    await mailbox.settle(second)
    await post.admit(4)
    [mixed] = await post.lags()
    assert isinstance(mixed, Lag)
    assert mixed.entries == 3
    assert mixed.oldest_s >= unread.oldest_s
    await mailbox.settle(first)
    [after] = await post.lags()
    assert isinstance(after, Lag)
    assert after.entries == 2


async def test_lag_that_redis_does_not_know_is_none(post: Post) -> None:
    """Where entries were deleted before they were read, the number is not guessed."""
    _, second, _ = await post.admit(1, 2, 3)
    mailbox = await post.leased()
    await mailbox.read(1)
    await post.client.xdel(STREAM, second)
    await asyncio.sleep(0.005)
    [lag] = await post.lags()
    assert isinstance(lag, Lag)
    assert lag.entries is None
    assert lag.oldest_s > 0


async def test_lag_without_a_group_is_an_error(post: Post) -> None:
    """A deleted stream, or one without our group, is an error for that partition alone."""
    await post.leased()
    await post.client.xgroup_destroy(STREAM, HANDLER)
    [missing] = await post.lags()
    await post.client.delete(STREAM)
    [deleted] = await post.lags()
    assert isinstance(missing, ResponseError)
    assert isinstance(deleted, ResponseError)


async def test_reading_a_deleted_stream_is_an_error(post: Post) -> None:
    """Nothing is made up when the stream or its group is gone: the error says so."""
    mailbox = await post.leased()
    await post.client.delete(STREAM)
    with pytest.raises(ResponseError):
        await mailbox.read(1)
    with pytest.raises(ResponseError):
        await anext(mailbox.take_over())
    await open_groups(post.connections, post.keys, [HANDLER])
    assert await mailbox.read(1) == []


async def test_a_second_connection_changes_nothing(post: Post, settings: Settings) -> None:
    """A lease belongs to a mailbox, not to a connection: over another one it holds too."""
    mailbox = await post.leased()
    async with connect(settings.redis_url) as other:
        assert await lease(other, [mailbox], 5) == [0]


async def test_replays_and_new_mail_share_a_read(post: Post) -> None:
    """Half of a read is for replays: neither they nor what is new wait for the other to end."""
    replays = post.keys.replays(0, HANDLER)
    await post.client.xgroup_create(replays, HANDLER, id="0", mkstream=True)
    entry = {"previous": "", "epoch": 1, "replay": "r"}
    for n in range(11, 17):
        await post.client.xadd(replays, {"change": change(n), "sequence": n, **entry})
    await post.admit(*range(1, 7))
    mailbox = await post.leased()

    assert sequences(await mailbox.read(4)) == [11, 12, 1, 2]
    assert sequences(await mailbox.read(100)) == [13, 14, 15, 16, 3, 4, 5, 6]
    assert await mailbox.read(100) == []


async def test_nothing_is_handed_out_that_no_replica_has(pair: tuple[Server, Server]) -> None:
    """Asked to wait for a replica, a mailbox gives out nothing a fail-over could take back."""
    primary, replica = pair
    async with connect(Secret(primary.url)) as connections:
        keys = Keys("idv", 8)
        await open_groups(connections, keys, [HANDLER])
        post = Post(
            connections=connections,
            keys=keys,
            arrivals=Arrivals(connections, 0),
            client=connections.client,
        )
        mailbox = Mailbox(
            connections, keys, post.arrivals, handler=HANDLER, worker="w1", replicas=1
        )
        assert await lease(connections, [mailbox], 300) == [0]
        await post.admit(1)
        assert sequences(await mailbox.read(10)) == [1]
        with replica.frozen():
            await post.admit(2)
            for _ in range(2):
                with pytest.raises(NotReplicatedError):
                    await mailbox.read(10)
                with pytest.raises(NotReplicatedError):
                    await anext(mailbox.take_over())
        [taken_over] = [batch async for batch in mailbox.take_over()]
        assert sequences(taken_over) == [1, 2]
        await post.arrivals.close()
