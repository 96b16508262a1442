"""Laws of the consumer: leases, fencing, taking over, counting, burying; on a real server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from redis.exceptions import RedisError, ResponseError

from service.config import Settings
from service.delivery import stream_watcher as watcher_module
from service.delivery.consumer import (
    MAX_CLAIMED_PER_CALL,
    QUARANTINE_AFTER,
    Attempts,
    Consumer,
    Delivery,
    LeaseLostError,
    Missing,
)
from service.delivery.consumer_groups import Lag, create_groups, measure_lags
from service.delivery.leases import Heartbeats, lease
from service.delivery.stream_watcher import StreamWatcher
from service.secret import Secret
from service.storage.connections import Connections, connect
from service.storage.layout import Keys
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
    stream_watcher: StreamWatcher
    client: Any

    def consumer(self, worker: str = "w1") -> Consumer:
        """Return a consumer without a lease."""
        return Consumer(
            self.connections, self.keys, self.stream_watcher, handler=HANDLER, worker=worker
        )

    async def measure_lags(self) -> list[Lag | Exception]:
        """Measure what the handler has not settled here."""
        return await measure_lags(self.connections, self.keys, [(HANDLER, 0)])

    async def leased(self, worker: str = "w1", *, ttl_s: float = 300) -> Consumer:
        """Return a consumer that has the lease."""
        consumer = self.consumer(worker)
        assert await lease(self.connections, [consumer], ttl_s) == [0]
        return consumer

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
    monkeypatch.setattr(watcher_module, "BLOCK_S", 10 * PATIENCE_S)
    stream_watcher = StreamWatcher(connections, 0)
    yield Post(
        connections=connections, keys=keys, stream_watcher=stream_watcher, client=connections.client
    )
    await stream_watcher.close()


def test_the_stored_form_is_the_one_of_wire() -> None:
    """What these tests put on the stream is what admission would."""
    stored = {b"change": change(1), b"previous": b"", b"sequence": b"1", b"epoch": b"1"}
    assert isinstance(stream_entry.unpack(stored), SessionChange)


@pytest.mark.parametrize(
    "call", ["read", "load", "ack", "record_attempts", "dead_letter", "claim_pending"]
)
async def test_everything_is_fenced(post: Post, call: str) -> None:
    """With a stolen lease nothing is read, settled, counted, buried or taken over."""
    await post.admit(1, 2)
    consumer = await post.leased()
    [delivery] = await consumer.read(1)
    before = await post.pending()
    await post.steal()
    assert consumer.is_ours()

    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "read": lambda: consumer.read(1),
        "load": lambda: consumer.load(delivery),
        "ack": lambda: consumer.ack(delivery),
        "record_attempts": lambda: consumer.record_attempts(delivery, Attempts(3, 1)),
        "dead_letter": lambda: consumer.dead_letter(
            delivery, reason="exhausted", error="", attempts=3
        ),
        "claim_pending": lambda: anext(consumer.claim_pending()),
    }
    with pytest.raises(LeaseLostError):
        await calls[call]()

    assert not consumer.is_ours()
    assert await post.pending() == before
    assert not await post.client.exists(DEAD)
    [group] = await post.client.xinfo_groups(STREAM)
    assert group["last-delivered-id"].decode() == delivery.entry_id


async def test_reading_is_in_order_and_pending_until_settled(post: Post) -> None:
    """Deliveries come oldest first, at most as many as asked for, and pend until settled."""
    await post.admit(1, 2, 3)
    consumer = await post.leased()
    first = await consumer.read(2)
    rest = await consumer.read(2)

    assert sequences(first + rest) == [1, 2, 3]
    assert {delivery.attempts for delivery in first + rest} == {Attempts(0, 1)}
    assert await consumer.read(2) == []
    await asyncio.gather(*(consumer.ack(delivery) for delivery in first))
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
    batches = [batch async for batch in heir.claim_pending()]

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
    consumer = await post.leased()
    await consumer.read(MAX_CLAIMED_PER_CALL)
    assert [len(batch) async for batch in consumer.claim_pending()] == [MAX_CLAIMED_PER_CALL]


async def test_failures_survive_and_foreign_starts_add_up(post: Post) -> None:
    """Failures are kept across owners; each owner that vanished adds a start, up to suspicion."""
    await post.admit(1, 2)
    consumer = await post.leased("w0")
    failed, fresh = await consumer.read(2)
    await consumer.record_attempts(failed, Attempts(7, 1))
    seen = []
    for n in range(1, 5):
        await consumer.release()
        consumer = await post.leased(f"w{n}")
        [batch] = [batch async for batch in consumer.claim_pending()]
        seen.append([delivery.attempts for delivery in batch])

    assert seen == [
        [Attempts(7, 2), Attempts(0, 2)],
        [Attempts(7, QUARANTINE_AFTER), Attempts(0, QUARANTINE_AFTER)],
        [Attempts(7, QUARANTINE_AFTER), Attempts(0, QUARANTINE_AFTER)],
        [Attempts(7, QUARANTINE_AFTER), Attempts(0, QUARANTINE_AFTER)],
    ]
    assert fresh.attempts == Attempts(0, 1)


async def test_taking_over_from_oneself_suspects_nobody(post: Post) -> None:
    """A process that begins again has not been killed: its own entries keep their count."""
    await post.admit(1)
    consumer = await post.leased()
    await consumer.read(1)
    for _ in range(5):
        [[delivery]] = [batch async for batch in consumer.claim_pending()]
    assert delivery.attempts == Attempts(0, 1)


async def test_counts_travel_together(post: Post) -> None:
    """Many counts written at once all arrive."""
    await post.admit(*range(300))
    consumer = await post.leased()
    deliveries = [delivery for _ in range(3) for delivery in await consumer.read(100)]
    await asyncio.gather(
        *(consumer.record_attempts(one, Attempts(n, 1)) for n, one in enumerate(deliveries))
    )

    assert [count for _, count in (await post.pending()).values()] == [
        n * 1000 + 1 for n in range(300)
    ]


async def test_entries_gone_from_the_stream_are_passed_over(post: Post) -> None:
    """A pending entry that an operator deleted is neither delivered nor in the way."""
    first, _ = await post.admit(1, 2)
    consumer = await post.leased()
    await consumer.read(2)
    await post.client.xdel(STREAM, first)
    [batch] = [batch async for batch in consumer.claim_pending()]

    assert sequences(batch) == [2]
    assert len(await post.pending()) == 1


async def test_burying_keeps_the_entry_and_settles_it(post: Post) -> None:
    """A dead letter holds every field of the entry and why, and the entry is settled with it."""
    [entry_id] = await post.admit(1)
    consumer = await post.leased()
    [delivery] = await consumer.read(1)
    held = await consumer.dead_letter(
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
    consumer = await post.leased()
    [delivery] = await consumer.read(1)
    letter = {"reason": "exhausted", "error": "ValueError"}

    assert [await consumer.dead_letter(delivery, attempts=10, **letter) for _ in range(2)] == [1, 1]
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
    consumer = await post.leased()
    deliveries = await consumer.read(10)
    assert sequences(deliveries) == [3, 1, 2, None]
    assert [one.is_replay for one in deliveries] == [True, False, False, False]
    await post.client.xdel(STREAM, first)

    found = await asyncio.gather(*map(consumer.load, deliveries))
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
    consumer = await post.leased()
    first = await consumer.read(10)
    assert sequences(first) == [None, None, None, 1]

    again = [one async for batch in consumer.claim_pending() for one in batch]
    assert sequences(again) == [None, None, 1, None]
    for delivery in first[:3]:
        assert await consumer.dead_letter(delivery, reason=Missing.UNREADABLE, error="", attempts=0)
    assert list(await post.pending()) == [first[3].entry_id]
    assert await post.client.xlen(replays) == 0
    letters = [fields for _, fields in await post.client.xrange(DEAD)]
    assert [letter[b"reason"] for letter in letters] == [b"unreadable"] * 3
    assert letters[1][b"secret"] == b"kept"


async def test_an_entry_of_very_many_fields_can_be_buried(post: Post) -> None:
    """What somebody else put there is no more than one call of a script can take."""
    await post.client.xadd(STREAM, {f"field{n}": "x" for n in range(10_000)})
    consumer = await post.leased()
    [delivery] = await consumer.read(1)

    assert (
        await consumer.dead_letter(delivery, reason=Missing.UNREADABLE, error="", attempts=0) == 1
    )
    [(_, letter)] = await post.client.xrange(DEAD)
    assert letter[b"entry_id"].decode() == delivery.entry_id
    assert not await post.pending()


async def test_after_only_unreadable_entries_the_next_arrival_is_seen(post: Post) -> None:
    """A read that yields nothing readable is followed by one that knows where to wait."""
    await post.client.xadd(STREAM, {"nothing": "ours"})
    consumer = await post.leased()
    assert sequences(await consumer.read(10)) == [None]
    assert await consumer.read(10) == []
    waiting = asyncio.create_task(consumer.wait_for_entries())
    await post.admit(1)
    async with asyncio.timeout(PATIENCE_S):
        await waiting
    assert sequences(await consumer.read(10)) == [1]


async def test_settling_works_on_a_full_server(post: Post) -> None:
    """Leasing, reading, settling, counting and burying go on when Redis refuses admissions."""
    await post.admit(1, 2)
    client = post.client
    before = (await client.config_get("maxmemory"))["maxmemory"]
    await client.config_set("maxmemory", 1)
    try:
        consumer = await post.leased()
        first, second = await consumer.read(2)
        await consumer.ack(first)
        await consumer.record_attempts(second, Attempts(1, 1))
        assert await consumer.load(second) == second.transition
        await consumer.dead_letter(second, reason="exhausted", error="", attempts=1)
        [lag] = await post.measure_lags()
        await Heartbeats(post.connections, post.keys, worker="w", ttl_s=5).beat([HANDLER])
        await consumer.release()
    finally:
        await client.config_set("maxmemory", before)
    assert lag == Lag(0, 0, oldest_s=0.0, dead=1)


async def test_an_arrival_wakes_everybody(post: Post) -> None:
    """All who wait for a partition wake at its next entry, whatever place they wait at."""
    [first] = await post.admit(1)
    waiting = [
        asyncio.create_task(post.stream_watcher.wait_after({STREAM: first})) for _ in range(3)
    ]
    await until(lambda: post.stream_watcher._watch is not None)
    await post.admit(2)
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*waiting)
    await until(lambda: post.stream_watcher._watch is None)


async def test_nobody_waits_for_what_is_there(post: Post) -> None:
    """Waiting behind an entry that already exists ends at once, also beside a later watch."""
    first, second = await post.admit(1, 2)
    later = asyncio.create_task(post.stream_watcher.wait_after({STREAM: second}))
    await until(lambda: post.stream_watcher._watched == {STREAM: second})
    async with asyncio.timeout(PATIENCE_S):
        await post.stream_watcher.wait_after({STREAM: first})
    assert not later.done()
    await post.admit(3)
    async with asyncio.timeout(PATIENCE_S):
        await later


async def test_one_who_joins_behind_and_finds_nothing_wakes_with_the_rest(post: Post) -> None:
    """A place before the watch, whose successor was deleted, waits without turning in circles."""
    first, second = await post.admit(1, 2)
    await post.client.xdel(STREAM, second)
    waiting = [asyncio.create_task(post.stream_watcher.wait_after({STREAM: second}))]
    await until(lambda: post.stream_watcher._watched == {STREAM: second})
    waiting.append(asyncio.create_task(post.stream_watcher.wait_after({STREAM: first})))
    await until(post.is_blocking)
    assert not any(task.done() for task in waiting)
    await post.admit(3)
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*waiting)


async def test_a_watch_nobody_waits_for_ends(post: Post) -> None:
    """After the last waiter is gone the blocking read is not repeated; close ends it at once."""
    waiter = asyncio.create_task(post.stream_watcher.wait_after({STREAM: "0-0"}))
    await until(lambda: post.stream_watcher._watch is not None)
    waiter.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiter
    async with asyncio.timeout(PATIENCE_S):
        await post.stream_watcher.close()
    assert post.stream_watcher._watch is None


async def test_a_failing_watch_fails_everybody(post: Post) -> None:
    """An error of the blocking read reaches all who wait, and the next one watches anew."""
    waiting = [
        asyncio.create_task(post.stream_watcher.wait_after({STREAM: "0-0"})) for _ in range(2)
    ]
    await until(post.is_blocking)
    await post.client.client_kill_filter(_type="normal", skipme=True)
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(result, RedisError)
    await post.admit(1)
    async with asyncio.timeout(PATIENCE_S):
        await post.stream_watcher.wait_after({STREAM: "0-0"})


async def test_lag_counts_what_is_not_settled(post: Post) -> None:
    """Lag is what is unread and what pends; its age is that of the oldest of either."""
    consumer = await post.leased()
    assert await post.measure_lags() == [Lag(0, 0, oldest_s=0.0, dead=0)]

    await post.admit(1, 2, 3)
    await asyncio.sleep(0.03)
    [unread] = await post.measure_lags()
    assert isinstance(unread, Lag)
    assert unread.entries == 3
    assert 0.03 <= unread.oldest_s < 60

    first, second = await consumer.read(2)
    await consumer.ack(second)
    await post.admit(4)
    [mixed] = await post.measure_lags()
    assert isinstance(mixed, Lag)
    assert mixed.entries == 3
    assert mixed.oldest_s >= unread.oldest_s
    await consumer.ack(first)
    [after] = await post.measure_lags()
    assert isinstance(after, Lag)
    assert after.entries == 2


async def test_lag_that_redis_does_not_know_is_none(post: Post) -> None:
    """Where entries were deleted before they were read, the number is not guessed."""
    _, second, _ = await post.admit(1, 2, 3)
    consumer = await post.leased()
    await consumer.read(1)
    await post.client.xdel(STREAM, second)
    await asyncio.sleep(0.005)
    [lag] = await post.measure_lags()
    assert isinstance(lag, Lag)
    assert lag.entries is None
    assert lag.oldest_s > 0


async def test_lag_without_a_group_is_an_error(post: Post) -> None:
    """A deleted stream, or one without our group, is an error for that partition alone."""
    await post.leased()
    await post.client.xgroup_destroy(STREAM, HANDLER)
    [missing] = await post.measure_lags()
    await post.client.delete(STREAM)
    [deleted] = await post.measure_lags()
    assert isinstance(missing, ResponseError)
    assert isinstance(deleted, ResponseError)


async def test_reading_a_deleted_stream_is_an_error(post: Post) -> None:
    """Nothing is made up when the stream or its group is gone: the error says so."""
    consumer = await post.leased()
    await post.client.delete(STREAM)
    with pytest.raises(ResponseError):
        await consumer.read(1)
    with pytest.raises(ResponseError):
        await anext(consumer.claim_pending())
    await create_groups(post.connections, post.keys, [HANDLER])
    assert await consumer.read(1) == []


async def test_a_second_connection_changes_nothing(post: Post, settings: Settings) -> None:
    """A lease belongs to a consumer, not to a connection: over another one it holds too."""
    consumer = await post.leased()
    async with connect(settings.redis_url) as other:
        assert await lease(other, [consumer], 5) == [0]


async def test_replays_and_new_mail_share_a_read(post: Post) -> None:
    """Half of a read is for replays: neither they nor what is new wait for the other to end."""
    replays = post.keys.replays(0, HANDLER)
    await post.client.xgroup_create(replays, HANDLER, id="0", mkstream=True)
    entry = {"previous": "", "epoch": 1, "replay": "r"}
    for n in range(11, 17):
        await post.client.xadd(replays, {"change": change(n), "sequence": n, **entry})
    await post.admit(*range(1, 7))
    consumer = await post.leased()

    assert sequences(await consumer.read(4)) == [11, 12, 1, 2]
    assert sequences(await consumer.read(100)) == [13, 14, 15, 16, 3, 4, 5, 6]
    assert await consumer.read(100) == []


async def test_nothing_is_handed_out_that_no_replica_has(pair: tuple[Server, Server]) -> None:
    """Asked to wait for a replica, a consumer gives out nothing a fail-over could take back."""
    primary, replica = pair
    async with connect(Secret(primary.url)) as connections:
        keys = Keys("idv", 8)
        await create_groups(connections, keys, [HANDLER])
        post = Post(
            connections=connections,
            keys=keys,
            stream_watcher=StreamWatcher(connections, 0),
            client=connections.client,
        )
        consumer = Consumer(
            connections, keys, post.stream_watcher, handler=HANDLER, worker="w1", replicas=1
        )
        assert await lease(connections, [consumer], 300) == [0]
        await post.admit(1)
        assert sequences(await consumer.read(10)) == [1]
        with replica.frozen():
            await post.admit(2)
            for _ in range(2):
                with pytest.raises(NotReplicatedError):
                    await consumer.read(10)
                with pytest.raises(NotReplicatedError):
                    await anext(consumer.claim_pending())
        [taken_over] = [batch async for batch in consumer.claim_pending()]
        assert sequences(taken_over) == [1, 2]
        await post.stream_watcher.close()
