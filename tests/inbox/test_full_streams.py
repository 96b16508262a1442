"""Full streams: new events outrank history, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from itertools import count, islice
from random import Random
from typing import Any

import pytest
import structlog.testing

from service.delivery.consumer_groups import Lag, create_groups, measure_lags
from service.errors import UnavailableReason
from service.inbox import full_streams as module
from service.inbox.admission import Outcome
from service.inbox.full_streams import PAUSE_S, FullStreamTrimmer, Stream
from service.storage.connections import Connections
from service.storage.keys import Keys
from service.telemetry import metrics
from tests.support.admissions import InspectedInbox, OpenInbox, make_event, outcomes
from tests.support.tapped import Tapped
from tests.support.virtual_time import push

STREAM = "idv:{0}:transitions"
FIELDS: dict[Any, Any] = {"change": "{}", "previous": "", "sequence": 1, "epoch": 1}
MAX_ENTRIES = 10


class FullStream:
    """The stream of partition 0, and two groups on it."""

    def __init__(self, connections: Connections, keys: Keys) -> None:
        self.connections = connections = Tapped(connections)
        self.keys = keys
        self.client: Any = connections.client
        self.trimmer = FullStreamTrimmer(connections)

    async def fill(self, count: int) -> list[bytes]:
        """Append so many entries; return their ids."""
        return [await self.client.xadd(STREAM, FIELDS) for _ in range(count)]

    async def read(self, group: str, count: int) -> list[bytes]:
        """Read as a group does; return the ids."""
        found = await self.client.xreadgroup(group, "w", {STREAM: ">"}, count=count)
        return [entry_id for _, entries in found for entry_id, _ in entries]

    async def acknowledge(self, group: str, count: int) -> list[bytes]:
        """Read and acknowledge so many; return the ids."""
        entry_ids = await self.read(group, count)
        await self.client.xack(STREAM, group, *entry_ids)
        return entry_ids

    async def ids(self) -> list[bytes]:
        """Return the ids in the stream."""
        return [entry_id for entry_id, _ in await self.client.xrange(STREAM)]

    async def trim(self) -> bool:
        """Trim the stream, even if that was tried just now."""
        push(PAUSE_S)
        return await self.trimmer.trim([Stream(STREAM, 0)])


@pytest.fixture
async def stream(connections: Connections, keys: Keys) -> FullStream:
    """Return partition 0, on which the groups of `log` and `other` read."""
    opened = FullStream(connections, keys)
    await create_groups(connections, keys, ["other"])
    await opened.client.xgroup_setid(STREAM, "other", "0", entries_read=0)
    return opened


async def test_acknowledged_entries_are_deleted(stream: FullStream) -> None:
    """Entries that every group has acknowledged are deleted, logged and counted."""
    entry_ids = await stream.fill(6)
    await stream.acknowledge("log", 5)
    await stream.acknowledge("other", 3)
    before = metrics.STREAM_TRIMMED.labels("full")._value.get()
    with structlog.testing.capture_logs() as lines:
        assert await stream.trim()
    # Without the entry that a group has read last, Redis does not know how far it is behind.
    assert await stream.ids() == entry_ids[2:]
    assert lines == [
        {
            "event": "stream.trimmed",
            "log_level": "info",
            "reason": "full",
            "partition": 0,
            "entries": 2,
        }
    ]
    assert metrics.STREAM_TRIMMED.labels("full")._value.get() == before + 2


async def test_a_backlog_is_logged_with_its_group(stream: FullStream) -> None:
    """Where nothing can be deleted the log names the slowest group, at intervals."""
    await stream.fill(4)
    await stream.acknowledge("log", 3)
    with structlog.testing.capture_logs() as lines:
        assert not await stream.trim()
        assert not await stream.trimmer.trim([Stream(STREAM, 0)])
    assert lines == [
        {
            "event": "backlog.filled",
            "log_level": "error",
            "partition": 0,
            "handler": "other",
            "entries": 4,
        }
    ]
    await stream.acknowledge("other", 2)
    assert not await stream.trimmer.trim([Stream(STREAM, 0)])
    assert await stream.trim()


async def test_a_stream_without_a_group_is_a_backlog(stream: FullStream) -> None:
    """Where no worker has ever started nothing is acknowledged."""
    for group in ("log", "other"):
        await stream.client.xgroup_destroy(STREAM, group)
    await stream.fill(2)
    with structlog.testing.capture_logs() as lines:
        assert not await stream.trim()
    assert [(line["handler"], line["entries"]) for line in lines] == [(None, 2)]
    assert len(await stream.ids()) == 2


async def test_a_failing_redis_is_left_alone_for_a_while(stream: FullStream) -> None:
    """After an error the stream is not examined again at once."""
    stream.connections.faults.append("request")
    assert not await stream.trim()
    assert not await stream.trimmer.trim([Stream(STREAM, 0)])
    assert len(stream.connections.calls) == 1


async def test_pending_entries_are_not_examined_each_time(
    stream: FullStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind many pending entries a part is deleted each time, without examining those again."""
    monkeypatch.setattr(module, "MAX_EXAMINED_PER_CALL", 5)
    monkeypatch.setattr(module, "MAX_TRIM_S", -1.0)
    entry_ids = await stream.fill(40)
    for group in ("log", "other"):
        await stream.read(group, 40)
        await stream.client.xack(STREAM, group, *entry_ids[20:])
    # Without time nothing is deleted.
    assert not await stream.trim()
    monkeypatch.setattr(module, "MAX_TRIM_S", 600.0)
    calls = stream.connections.calls
    calls.clear()
    assert await stream.trim()
    assert len(calls) == 5
    for _ in range(3):
        assert await stream.trim()
    assert len(calls) == 8
    assert await stream.ids() == entry_ids[:20]
    assert not await stream.trim()
    # Entries that were pending before are found once they are acknowledged.
    await stream.client.xack(STREAM, "log", entry_ids[7])
    await stream.client.xack(STREAM, "other", entry_ids[7])
    assert await stream.trim()
    assert await stream.ids() == entry_ids[:7] + entry_ids[8:20]


async def test_a_long_pending_list_hides_nothing(
    stream: FullStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pending entries that an operator deleted do not make others look acknowledged."""
    monkeypatch.setattr(module, "MAX_EXAMINED_PER_CALL", 4)
    entry_ids = await stream.fill(20)
    await stream.acknowledge("other", 20)
    await stream.read("log", 20)
    await stream.client.xack(STREAM, "log", entry_ids[18])
    await stream.client.xdel(STREAM, *entry_ids[1:15])
    for _ in range(3):
        await stream.trim()
    assert await stream.ids() == [entry_ids[0], *entry_ids[15:18], entry_ids[19]]


@pytest.mark.parametrize("seed", range(20))
async def test_random_histories_keep_what_is_not_acknowledged(
    stream: FullStream, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Only acknowledged entries are deleted, and some of them whenever there are any."""
    monkeypatch.setattr(module, "MAX_EXAMINED_PER_CALL", 3)
    monkeypatch.setattr(module, "MAX_TRIM_S", 600.0)
    random = Random(seed)
    was_read: dict[str, set[bytes]] = {"log": set(), "other": set()}
    pending: dict[str, set[bytes]] = {"log": set(), "other": set()}
    added: list[bytes] = []
    for _ in range(60):
        group = random.choice(["log", "other"])
        match random.randrange(4):
            case 0:
                added += await stream.fill(random.randrange(1, 4))
            case 1:
                found = await stream.read(group, random.randrange(1, 5))
                was_read[group].update(found)
                pending[group].update(found)
            case 2 if pending[group]:
                one = random.choice(sorted(pending[group]))
                pending[group].discard(one)
                await stream.client.xack(STREAM, group, one)
            case _:
                before = await stream.ids()
                has_trimmed = await stream.trim()
                after = await stream.ids()
                unacknowledged = {
                    entry_id
                    for name in was_read
                    for entry_id in pending[name] | ({*added} - was_read[name])
                }
                assert unacknowledged <= {*after}
                assert has_trimmed == (len(after) < len(before))
                measured = await measure_lags(
                    stream.connections, stream.keys, [(name, 0) for name in was_read]
                )
                assert [lag.new for lag in measured if isinstance(lag, Lag)] == [
                    len(added) - len(was_read[name]) + len(pending[name]) for name in was_read
                ]
                if not has_trimmed:
                    # The entry that the slowest group has read last stays while others follow it:
                    # without it Redis does not know how far the group is behind.
                    slowest = min(
                        max(map(added.index, ids), default=-1) for ids in was_read.values()
                    )
                    kept = {added[slowest]} if 0 <= slowest < len(added) - 1 else set()
                    assert {*before} - unacknowledged <= kept


def sessions(keys: Keys, partition: int) -> Iterator[str]:
    """Yield ids of sessions that are in a partition."""
    return (name for n in count() if keys.partition(name := f"vs_{n}") == partition)


async def admitted(inbox: InspectedInbox, sessions: Iterable[str]) -> list[str]:
    """Admit an event of each session, one after the other; return the outcomes."""
    events = [make_event(id=f"evt_{session}", session=session) for session in sessions]
    return [word for event in events for word in outcomes(await inbox.together(event))]


@pytest.fixture
def limited(open_inbox: OpenInbox) -> InspectedInbox:
    """Return an inbox with a low limit of entries."""
    return open_inbox(stream_max_entries=MAX_ENTRIES)


async def test_events_are_admitted_at_the_cost_of_history(
    connections: Connections, keys: Keys, limited: InspectedInbox
) -> None:
    """In a full stream events are admitted while there is history to delete, without a worker."""
    stream = FullStream(connections, keys)
    new = sessions(keys, 0)
    assert await admitted(limited, islice(new, MAX_ENTRIES)) == [Outcome.ADMITTED] * MAX_ENTRIES
    assert await admitted(limited, islice(new, 1)) == [UnavailableReason.BACKLOG_FULL]
    stuck = await stream.read("log", 3)
    await stream.acknowledge("log", MAX_ENTRIES)
    push(PAUSE_S)

    for _ in range(5):
        found = await admitted(limited, islice(new, MAX_ENTRIES - 3))
        assert found == [Outcome.ADMITTED] * (MAX_ENTRIES - 3)
        assert await stream.client.xlen(STREAM) <= MAX_ENTRIES
        await stream.acknowledge("log", MAX_ENTRIES)
    assert (await stream.ids())[:3] == stuck


async def test_a_batch_may_be_for_full_and_other_streams(
    connections: Connections, keys: Keys, limited: InspectedInbox
) -> None:
    """In one batch each event is admitted once, or has the reason why not."""
    client = connections.client
    held, acknowledged, *_ = streams = [keys.transitions(p) for p in range(keys.partitions)]
    for stream in (held, acknowledged):
        for _ in range(MAX_ENTRIES):
            await client.xadd(stream, FIELDS)
    [[_, entries]] = await client.xreadgroup("log", "w", {acknowledged: ">"})
    await client.xack(acknowledged, "log", *(entry_id for entry_id, _ in entries))

    new = [next(sessions(keys, partition)) for partition in range(keys.partitions)]
    found = await asyncio.gather(*(admitted(limited, [session]) for session in new))
    assert found == [
        [UnavailableReason.BACKLOG_FULL],
        *[[Outcome.ADMITTED]] * (keys.partitions - 1),
    ]
    lengths = [await client.xlen(stream) for stream in streams]
    assert lengths == [MAX_ENTRIES, *[1] * (keys.partitions - 1)]
    copies = [await client.hget(keys.session(session), "duplicates") for session in new]
    assert not any(copies)
