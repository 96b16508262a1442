"""A consumer reads, claims, acknowledges and dead-letters under its lease, on a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
from redis.exceptions import ResponseError

from service.delivery import consumer as consumer_module
from service.delivery.consumer import (
    QUARANTINE_AFTER,
    Attempts,
    Consumer,
    Delivery,
    Missing,
)
from service.delivery.consumer_groups import create_groups
from service.delivery.leases import Lease, LeaseLostError, take_or_renew
from service.delivery.stream_watcher import StreamWatcher
from service.secret import Secret
from service.storage.connections import Connections, connect
from service.storage.keys import Keys
from service.storage.scripts import NotReplicatedError
from service.transitions.transition import StatusTransition
from tests.support.servers import Server
from tests.support.transitions import stored_entry
from tests.support.waiting import PATIENCE_S, until

HANDLER = "log"
STREAM = "idv:{0}:transitions"
DEAD_LETTERS = "idv:{0}:dead:log"
ATTEMPTS = "idv:{0}:attempts:log"
LEASE = "idv:{0}:lease:log"


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Partition 0 of an empty server, and what a consumer of it needs.

    Attributes:
        client: A plain client, to look at Redis directly.
    """

    connections: Connections
    keys: Keys
    stream_watcher: StreamWatcher
    client: Any

    async def consumer(self, worker: str = "w1", *, replicas: int = 0) -> Consumer:
        """Return a consumer that has the lease."""
        lease = Lease(self.connections, self.keys, handler=HANDLER, partition=0, worker=worker)
        assert await take_or_renew(self.connections, [lease], 300) == [0]
        return Consumer(lease, self.keys, self.stream_watcher, replicas=replicas)

    async def admit(self, *sequences: int) -> list[str]:
        """Append a transition of a session of its own for each number; return the ids."""
        added = [await self.client.xadd(STREAM, stored_entry(f"vs_{n}", n)) for n in sequences]
        return [entry_id.decode() for entry_id in added]

    async def create_replays(self) -> str:
        """Create the handler's stream of replays and its group; return the key."""
        replays = self.keys.replays(0, HANDLER)
        await self.client.xgroup_create(replays, HANDLER, id="0", mkstream=True)
        return replays

    async def pending(self) -> dict[str, tuple[str, int]]:
        """Return consumer and delivery count of each pending entry."""
        found = await self.client.xpending_range(STREAM, HANDLER, "-", "+", 10_000)
        return {
            one["message_id"].decode(): (one["consumer"].decode(), one["times_delivered"])
            for one in found
        }


def sequences(deliveries: Sequence[Delivery]) -> list[int | None]:
    """Return the sequence numbers of deliveries; None for one that cannot be read."""
    items = [one.item for one in deliveries]
    return [item.sequence if isinstance(item, StatusTransition) else None for item in items]


def noted(event: bytes, outcome: bytes, attempt: bytes) -> dict[bytes, bytes]:
    """Return the fields of a finished attempt."""
    return {b"event": event, b"outcome": outcome, b"attempt": attempt}


async def claim_all(consumer: Consumer) -> list[Delivery]:
    """Return everything that a consumer claims."""
    return [delivery async for batch in consumer.claim_pending() for delivery in batch]


@pytest.fixture
async def partition(connections: Connections, keys: Keys) -> AsyncIterator[Partition]:
    """Yield partition 0; its watcher is closed at the end."""
    watcher = StreamWatcher(connections)
    yield Partition(
        connections=connections, keys=keys, stream_watcher=watcher, client=connections.client
    )
    await watcher.close()


async def test_claiming_keeps_failures_and_counts_deliveries_up_to_quarantine(
    partition: Partition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each new owner adds a delivery, until the entry is quarantined; only the last one is left."""
    monkeypatch.setattr(consumer_module, "MAX_CLAIMED_PER_CALL", 1)
    await partition.admit(1, 2)
    consumer = await partition.consumer("w0")
    failed, fresh = await consumer.read(2)
    await consumer.record_attempts(failed, Attempts(7, 1))
    seen = []
    for n in range(1, 5):
        await consumer.lease.release()
        consumer = await partition.consumer(f"w{n}")
        seen.append([delivery.attempts for delivery in await claim_all(consumer)])

    assert seen == [
        [Attempts(7, 2), Attempts(0, 2)],
        [Attempts(7, QUARANTINE_AFTER), Attempts(0, QUARANTINE_AFTER)],
        [Attempts(7, QUARANTINE_AFTER), Attempts(0, QUARANTINE_AFTER)],
        [Attempts(7, QUARANTINE_AFTER), Attempts(0, QUARANTINE_AFTER)],
    ]
    assert fresh.attempts == Attempts(0, 1)
    consumers = await partition.client.xinfo_consumers(STREAM, HANDLER)
    assert [one["name"] for one in consumers] == [b"w4"]


async def test_a_dead_letter_holds_the_entry_and_why(partition: Partition) -> None:
    """A dead letter has every field of its entry and the reason; the entry is acknowledged."""
    [entry_id] = await partition.admit(1)
    consumer = await partition.consumer()
    [delivery] = await consumer.read(1)
    held = await consumer.dead_letter(
        delivery, reason="exhausted", error="ValueError", place="own.py:1 handle", attempts=10
    )

    assert held == 1
    assert await partition.pending() == {}
    [(_, fields)] = await partition.client.xrange(DEAD_LETTERS)
    entry = {name.encode(): str(value).encode() for name, value in stored_entry("vs_1", 1).items()}
    assert fields == {
        **entry,
        b"entry_id": entry_id.encode(),
        b"reason": b"exhausted",
        b"error": b"ValueError",
        b"place": b"own.py:1 handle",
        b"attempts": b"10",
    }


async def test_each_finished_attempt_is_noted_once(partition: Partition) -> None:
    """A call that is repeated because its reply was lost notes no second attempt."""
    replays = await partition.create_replays()
    await partition.admit(1, 2)
    await partition.client.xadd(replays, stored_entry("vs_3", 3) | {"replay": "r"})
    consumer = await partition.consumer()
    replayed, first, second = await consumer.read(9)
    failed = Attempts(1, 1)
    for _ in range(2):
        await consumer.record_attempts(first, failed, error="ValueError", place="own.py:1 handle")
    first.attempts = failed
    for _ in range(2):
        # Nothing is noted of a delivery that is recorded before its call.
        await consumer.record_attempts(first, Attempts(1, 3))
        await asyncio.gather(*map(consumer.ack, (first, replayed)))
        await consumer.dead_letter(second, reason="killed_worker", error="", attempts=0)

    [(letter, _)] = await partition.client.xrange(DEAD_LETTERS)
    place = {b"error": b"ValueError", b"place": b"own.py:1 handle"}
    dead = {b"error": b"killed_worker", b"place": b"", b"letter": letter}
    attempts = [fields for _, fields in await partition.client.xrange(ATTEMPTS)]
    assert sorted(attempts, key=lambda fields: fields[b"event"] + fields[b"attempt"]) == [
        noted(b"evt_vs_1_1", b"failed", b"1") | place,
        noted(b"evt_vs_1_1", b"delivered", b"2"),
        noted(b"evt_vs_2_2", b"dead_lettered", b"0") | dead,
        noted(b"evt_vs_3_3", b"delivered", b"1") | {b"replay": b"1"},
    ]


async def test_selftests_and_what_cannot_be_read_leave_no_attempt(partition: Partition) -> None:
    """Only attempts that a session's timeline can show are noted."""
    await partition.client.xadd(STREAM, stored_entry("vs_selftest_1", 1))
    await partition.client.xadd(STREAM, {"nothing": "ours"})
    consumer = await partition.consumer()
    tested, unreadable = await consumer.read(9)
    await consumer.ack(tested)
    await consumer.dead_letter(unreadable, reason=Missing.UNREADABLE, error="", attempts=0)

    assert await partition.pending() == {}
    assert not await partition.client.exists(ATTEMPTS)


async def test_few_finished_attempts_are_kept(
    partition: Partition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About as many as the bound are kept, the latest: Redis trims a hundred at a time."""
    monkeypatch.setattr(consumer_module, "MAX_FINISHED_ATTEMPTS", 100)
    await partition.admit(*range(500))
    consumer = await partition.consumer()
    deliveries = await consumer.read(500)
    for delivery in deliveries[:150]:
        await consumer.record_attempts(delivery, Attempts(1, 1), error="ValueError")
    for delivery in deliveries[:150]:
        await consumer.dead_letter(delivery, reason="exhausted", error="ValueError", attempts=2)
    assert await partition.client.xlen(ATTEMPTS) < 250
    await asyncio.gather(*map(consumer.ack, deliveries[150:]))

    assert await partition.client.xlen(ATTEMPTS) < 250
    [(_, last)] = await partition.client.xrevrange(ATTEMPTS, count=1)
    assert last[b"event"] == b"evt_vs_499_499"


@pytest.mark.parametrize("last_id", [None, f"{2**64 - 1}-{2**64 - 1}"], ids=["foreign", "full"])
async def test_attempts_that_cannot_be_noted_are_still_taken(
    partition: Partition, last_id: str | None
) -> None:
    """The stream of finished attempts is only shown: what is wrong with it stops no delivery."""
    if last_id is None:
        await partition.client.set(ATTEMPTS, "foreign")
    else:
        await partition.client.xadd(ATTEMPTS, {"x": "y"}, id=last_id)
    await partition.admit(1, 2, 3, 4)
    consumer = await partition.consumer()
    first, second, failing, dead = await consumer.read(10)

    await asyncio.gather(consumer.ack(first), consumer.ack(second))
    await consumer.record_attempts(failing, Attempts(1, 1), error="ValueError", place="x.py:1")
    assert await partition.pending() == {failing.entry_id: ("w1", 1001), dead.entry_id: ("w1", 1)}
    await consumer.dead_letter(dead, reason="exhausted", error="ValueError", attempts=2)
    await consumer.ack(failing)
    assert await partition.pending() == {}
    assert await partition.client.xlen(DEAD_LETTERS) == 1


async def test_a_dead_letter_that_cannot_be_made_stays_pending(partition: Partition) -> None:
    """Nothing is acknowledged before the letter is there: the entry would be lost."""
    await partition.client.xadd(DEAD_LETTERS, {"x": "y"}, id=f"{2**64 - 1}-{2**64 - 1}")
    await partition.admit(1)
    consumer = await partition.consumer()
    [delivery] = await consumer.read(10)

    with pytest.raises(ResponseError):
        await consumer.dead_letter(delivery, reason="exhausted", error="ValueError", attempts=2)
    assert await partition.pending() == {delivery.entry_id: ("w1", 1)}


async def test_an_entry_kept_by_its_id_is_loaded_again(partition: Partition) -> None:
    """A fenced load returns what an entry holds, from either stream, or why there is nothing."""
    replays = await partition.create_replays()
    first, second = await partition.admit(1, 2)
    await partition.client.xadd(STREAM, {"nothing": "ours"})
    entry = stored_entry("vs_3", 3) | {"replay": "r"}
    # Under the same id, so that only the stream tells them apart.
    await partition.client.xadd(replays, entry, id=second)
    consumer = await partition.consumer()
    deliveries = await consumer.read(10)
    assert sequences(deliveries) == [3, 1, 2, None]
    assert [one.is_replay for one in deliveries] == [True, False, False, False]
    await partition.client.xdel(STREAM, first)

    found = await asyncio.gather(*map(consumer.load, deliveries))
    assert found == [deliveries[0].item, Missing.GONE, deliveries[2].item, Missing.UNREADABLE]
    await partition.client.set(LEASE, "another token")
    with pytest.raises(LeaseLostError):
        await consumer.load(deliveries[2])
    assert not consumer.has_lease()


async def test_unreadable_entries_are_delivered_without_a_transition(partition: Partition) -> None:
    """An entry that is not ours is delivered all the same, and can be dead-lettered."""
    replays = await partition.create_replays()
    await partition.client.xadd(STREAM, {"change": "{", "secret": "kept"})
    await partition.client.xadd(STREAM, {"nothing": "ours", "replay": "not one"})
    await partition.client.xadd(replays, {"no": "replay"})
    await partition.admit(1)
    consumer = await partition.consumer()
    first = await consumer.read(10)
    assert sequences(first) == [None, None, None, 1]

    assert sequences(await claim_all(consumer)) == [None, None, 1, None]
    for delivery in first[:3]:
        assert await consumer.dead_letter(delivery, reason=Missing.UNREADABLE, error="", attempts=0)
    assert list(await partition.pending()) == [first[3].entry_id]
    assert await partition.client.xlen(replays) == 0
    letters = [fields for _, fields in await partition.client.xrange(DEAD_LETTERS)]
    assert [letter[b"reason"] for letter in letters] == [b"unreadable"] * 3
    assert letters[1][b"secret"] == b"kept"


async def test_an_entry_with_very_many_fields_can_be_dead_lettered(partition: Partition) -> None:
    """A foreign entry with more fields than one call can take leaves its id."""
    await partition.client.xadd(STREAM, {f"field{n}": "x" for n in range(10_000)})
    consumer = await partition.consumer()
    [delivery] = await consumer.read(1)

    reason = Missing.UNREADABLE
    assert await consumer.dead_letter(delivery, reason=reason, error="", attempts=0) == 1
    [(_, letter)] = await partition.client.xrange(DEAD_LETTERS)
    assert letter[b"entry_id"].decode() == delivery.entry_id
    assert not await partition.pending()


async def test_waiting_ends_with_the_entry_after_the_last_one_read(partition: Partition) -> None:
    """Also where the last entry that was read could not be unpacked."""
    await partition.client.xadd(STREAM, {"nothing": "ours"})
    consumer = await partition.consumer()
    assert sequences(await consumer.read(10)) == [None]
    assert await consumer.read(10) == []
    waiting = asyncio.create_task(consumer.wait_for_entries())
    await partition.admit(1)
    async with asyncio.timeout(PATIENCE_S):
        await waiting
    assert sequences(await consumer.read(10)) == [1]


async def test_replays_and_new_entries_share_a_read(partition: Partition) -> None:
    """Half of a read is for replays: neither kind waits for the other to end."""
    replays = await partition.create_replays()
    for n in range(11, 17):
        await partition.client.xadd(replays, stored_entry(f"vs_{n}", n) | {"replay": "r"})
    await partition.admit(*range(1, 7))
    consumer = await partition.consumer()

    assert sequences(await consumer.read(4)) == [11, 12, 1, 2]
    assert sequences(await consumer.read(100)) == [13, 14, 15, 16, 3, 4, 5, 6]
    assert await consumer.read(100) == []


async def test_nothing_is_delivered_that_no_replica_has(pair: tuple[Server, Server]) -> None:
    """A consumer that waits for a replica delivers nothing that a fail-over could take back."""
    primary, replica = pair
    async with connect(Secret(primary.url)) as connections:
        keys = Keys("idv", 8)
        await create_groups(connections, keys, [HANDLER])
        partition = Partition(
            connections=connections,
            keys=keys,
            stream_watcher=StreamWatcher(connections),
            client=connections.client,
        )
        consumer = await partition.consumer(replicas=1)
        with replica.frozen():
            await partition.admit(1, 2)
            for _ in range(2):
                with pytest.raises(NotReplicatedError):
                    await consumer.read(10)
                with pytest.raises(NotReplicatedError):
                    await claim_all(consumer)

        async def claimed() -> list[int | None]:
            with suppress(NotReplicatedError):
                return sequences(await claim_all(consumer))
            return []

        assert await until(claimed) == [1, 2]
