"""Laws of full streams: new events outrank what is kept for replays, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from random import Random
from typing import Any

import pytest
import structlog.testing
from redis.exceptions import ConnectionError as RedisConnectionError

from service.config import Livemode, Settings
from service.delivery.consumer_groups import Lag, create_groups, measure_lags
from service.errors import Unavailable, UnavailableReason
from service.inbox import full_streams as module
from service.inbox.admission import Inbox, Outcome
from service.inbox.full_streams import PAUSE_S, FullStreamTrimmer
from service.inbox.receiver import Receiver
from service.storage.connections import Connections
from service.storage.layout import Keys
from service.storage.scripts import ScriptCall
from service.telemetry import metrics
from tests.support.harness import NOW, SECRET, event, signed
from tests.support.virtual_time import push

STREAM = "idv:{0}:transitions"
FIELDS: dict[Any, Any] = {"change": "{}", "previous": "", "sequence": 1, "epoch": 1}
CAP = 10


class Ground:
    """Partition 0 of an empty server, and two handlers' groups on it."""

    def __init__(self, connections: Connections, keys: Keys) -> None:
        self.connections = connections
        self.keys = keys
        self.client: Any = connections.client
        self.trimmer = FullStreamTrimmer(connections, keys)

    async def fill(self, count: int) -> list[bytes]:
        """Append so many entries; return their ids."""
        return [await self.client.xadd(STREAM, FIELDS) for _ in range(count)]

    async def read(self, group: str, count: int) -> list[bytes]:
        """Read as a group does; return the ids."""
        found = await self.client.xreadgroup(group, "w", {STREAM: ">"}, count=count)
        return [entry_id for _, entries in found for entry_id, _ in entries]

    async def settle(self, group: str, count: int) -> list[bytes]:
        """Read and settle so many; return the ids."""
        entry_ids = await self.read(group, count)
        await self.client.xack(STREAM, group, *entry_ids)
        return entry_ids

    async def ids(self) -> list[bytes]:
        """Return what the stream holds."""
        return [entry_id for entry_id, _ in await self.client.xrange(STREAM)]

    async def trim(self) -> bool:
        """Make room, however lately that was tried."""
        push(PAUSE_S)
        return await self.trimmer.trim([0])


@pytest.fixture
async def ground(connections: Connections, keys: Keys) -> Ground:
    """Return partition 0, on which the groups of `log` and `other` read."""
    opened = Ground(connections, keys)
    await create_groups(connections, keys, ["other"])
    await opened.client.xgroup_setid(STREAM, "other", "0", entries_read=0)
    return opened


async def test_what_all_have_settled_goes(ground: Ground) -> None:
    """Entries that every group has settled go, and no others; it is logged and counted."""
    entry_ids = await ground.fill(6)
    await ground.settle("log", 5)
    await ground.settle("other", 3)
    before = metrics.STREAM_TRIMMED.labels("full")._value.get()
    with structlog.testing.capture_logs() as lines:
        assert await ground.trim()
    # How far a group is behind could not be told without the entry that it has read last.
    assert await ground.ids() == entry_ids[2:]
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


async def test_a_pending_entry_holds_itself_alone(ground: Ground) -> None:
    """What is settled goes also where it stands between entries that are pending."""
    entry_ids = await ground.fill(6)
    for group in ("log", "other"):
        await ground.read(group, 6)
    await ground.client.xack(STREAM, "log", *entry_ids[1:])
    await ground.client.xack(STREAM, "other", *(entry_ids[i] for i in (0, 1, 2, 4, 5)))
    assert await ground.trim()
    assert await ground.ids() == [entry_ids[0], entry_ids[3]]
    assert not await ground.trim()


async def test_where_all_is_settled_all_goes(ground: Ground) -> None:
    """The last entry goes too when no group has anything before it."""
    await ground.fill(3)
    for group in ("log", "other"):
        await ground.settle(group, 3)
    assert await ground.trim()
    assert await ground.ids() == []


async def test_a_backlog_is_told_with_the_group_that_holds_it(ground: Ground) -> None:
    """Where nothing is settled the log names who is furthest behind, once in a while."""
    await ground.fill(4)
    await ground.settle("log", 3)
    with structlog.testing.capture_logs() as lines:
        assert not await ground.trim()
        assert not await ground.trimmer.trim([0])
    assert lines == [
        {
            "event": "backlog.filled",
            "log_level": "error",
            "partition": 0,
            "handler": "other",
            "transitions": 4,
        }
    ]
    await ground.settle("other", 2)
    assert not await ground.trimmer.trim([0])
    assert await ground.trim()


async def test_a_stream_without_a_group_is_a_backlog(ground: Ground) -> None:
    """Where no worker has ever started nothing is settled."""
    for group in ("log", "other"):
        await ground.client.xgroup_destroy(STREAM, group)
    await ground.fill(2)
    assert not await ground.trim()
    assert len(await ground.ids()) == 2


async def test_a_failing_redis_makes_no_room(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error is counted and not asked about again at once."""
    asked = 0

    async def run(calls: list[ScriptCall]) -> list[Exception]:
        nonlocal asked
        asked += 1
        return [RedisConnectionError()] * len(calls)

    monkeypatch.setattr(ground.connections, "run", run)
    assert not await ground.trim()
    assert not await ground.trimmer.trim([0])
    assert asked == 1


async def test_what_was_looked_at_is_not_looked_at_each_time(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind many pending entries room is found a little at a time, and each time at once."""
    monkeypatch.setattr(module, "MAX_EXAMINED_PER_CALL", 5)
    monkeypatch.setattr(module, "MAX_TRIM_S", -1.0)
    entry_ids = await ground.fill(40)
    for group in ("log", "other"):
        await ground.read(group, 40)
        await ground.client.xack(STREAM, group, *entry_ids[20:])
    # Without time to look there is none to find.
    assert not await ground.trim()
    monkeypatch.setattr(module, "MAX_TRIM_S", 600.0)
    asked = 0
    run = ground.connections.run

    async def counted(calls: list[ScriptCall]) -> list[Any]:
        nonlocal asked
        asked += len(calls)
        return await run(calls)

    monkeypatch.setattr(ground.connections, "run", counted)
    assert await ground.trim()
    assert asked == 5
    for _ in range(3):
        assert await ground.trim()
    assert asked == 8
    assert await ground.ids() == entry_ids[:20]
    assert not await ground.trim()
    # What was pending in front is found when it is settled.
    await ground.client.xack(STREAM, "log", entry_ids[7])
    await ground.client.xack(STREAM, "other", entry_ids[7])
    assert await ground.trim()
    assert await ground.ids() == entry_ids[:7] + entry_ids[8:20]


async def test_a_pending_list_longer_than_a_look_hides_nothing(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pending entries that an operator deleted do not make others pass for settled."""
    monkeypatch.setattr(module, "MAX_EXAMINED_PER_CALL", 4)
    entry_ids = await ground.fill(20)
    await ground.settle("other", 20)
    await ground.read("log", 20)
    await ground.client.xack(STREAM, "log", entry_ids[18])
    await ground.client.xdel(STREAM, *entry_ids[1:15])
    for _ in range(3):
        await ground.trim()
    assert await ground.ids() == [entry_ids[0], *entry_ids[15:18], entry_ids[19]]


async def test_redis_still_knows_how_far_each_group_is_behind(ground: Ground) -> None:
    """What goes leaves no hole before the place of any group."""
    await ground.fill(20)
    await ground.settle("log", 15)
    await ground.settle("other", 10)
    await ground.trim()
    measured = await measure_lags(ground.connections, ground.keys, [("log", 0), ("other", 0)])
    assert [lag.transitions for lag in measured if isinstance(lag, Lag)] == [5, 10]


@pytest.mark.parametrize("seed", range(20))
async def test_no_history_loses_what_is_not_settled_and_all_else_goes(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Whatever two groups read and settle: no unsettled entry goes, and room is made if any can."""
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
                added += await ground.fill(random.randrange(1, 4))
            case 1:
                found = await ground.read(group, random.randrange(1, 5))
                was_read[group].update(found)
                pending[group].update(found)
            case 2 if pending[group]:
                one = random.choice(sorted(pending[group]))
                pending[group].discard(one)
                await ground.client.xack(STREAM, group, one)
            case _:
                before = await ground.ids()
                has_made = await ground.trim()
                after = await ground.ids()
                unsettled = {
                    entry_id
                    for name in was_read
                    for entry_id in pending[name] | ({*added} - was_read[name])
                }
                assert unsettled <= {*after}
                assert has_made == (len(after) < len(before))
                # All but the one entry by which Redis knows how far a group is behind.
                if not has_made:
                    assert len({*before} - unsettled) <= 1


def sessions(keys: Keys, partition: int) -> Iterator[str]:
    """Yield ids of sessions that are in a partition."""
    return (name for n in count() if keys.partition(name := f"vs_{n}") == partition)


async def admitted(receiver: Receiver, sessions: Iterable[str]) -> list[str]:
    """Let an event of each session arrive, one after the other; return the outcomes."""
    outcomes = []
    for session in sessions:
        body = event(id=f"evt_{session}", session=session, created=NOW - 100)
        signature = signed(body)["Stripe-Signature"].encode()
        try:
            receipt = await receiver.receive(body, signature, [SECRET], now=NOW)
            outcomes.append(str(receipt.outcome))
        except Unavailable as error:
            outcomes.append(str(error.reason))
    return outcomes


@pytest.fixture
def receiver(connections: Connections, make_settings: Callable[..., Settings]) -> Receiver:
    """Return a receiver whose streams are soon full."""
    settings = make_settings(stream_max_entries=CAP)
    inbox = Inbox(connections, Keys(settings.redis_prefix, settings.partitions), settings)
    return Receiver(inbox, tolerance_s=10**9, livemode=Livemode.BOTH)


async def test_events_are_admitted_while_anything_is_settled(
    connections: Connections, keys: Keys, receiver: Receiver
) -> None:
    """At the cap events are admitted at the cost of history, without any worker's help."""
    ground = Ground(connections, keys)
    new = sessions(keys, 0)
    assert await admitted(receiver, islice(new, CAP)) == [Outcome.ADMITTED] * CAP
    assert await admitted(receiver, islice(new, 1)) == [UnavailableReason.BACKLOG_FULL]
    stuck = await ground.read("log", 3)
    await ground.settle("log", CAP)
    push(PAUSE_S)

    for _ in range(5):
        outcomes = await admitted(receiver, islice(new, CAP - 3))
        assert outcomes == [Outcome.ADMITTED] * (CAP - 3)
        assert await ground.client.xlen(STREAM) <= CAP
        await ground.settle("log", CAP)
    assert (await ground.ids())[:3] == stuck


async def test_events_that_wait_together_find_the_room_together(
    connections: Connections, keys: Keys, receiver: Receiver
) -> None:
    """One flight for full and other partitions: each event is admitted once, or told why not."""
    client = connections.client
    held, settled, *_ = streams = [keys.transitions(p) for p in range(keys.partitions)]
    for stream in (held, settled):
        for _ in range(CAP):
            await client.xadd(stream, FIELDS)
    [[_, entries]] = await client.xreadgroup("log", "w", {settled: ">"})
    await client.xack(settled, "log", *(entry_id for entry_id, _ in entries))

    new = [next(sessions(keys, partition)) for partition in range(keys.partitions)]
    told = await asyncio.gather(*(admitted(receiver, [session]) for session in new))
    assert told == [[UnavailableReason.BACKLOG_FULL], *[[Outcome.ADMITTED]] * (keys.partitions - 1)]
    lengths = [await client.xlen(stream) for stream in streams]
    assert lengths == [CAP, *[1] * (keys.partitions - 1)]
    copies = [await client.hget(keys.session(session), "duplicates") for session in new]
    assert not any(copies)
