"""Dead letters and history are found by filters, and replayed once and in order by the worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from redis.exceptions import OutOfMemoryError, ResponseError

from service.config import Livemode, Settings
from service.delivery import dead_letters
from service.delivery.dead_letters import Entry, EntryFilter, ReplayCounts
from service.delivery.worker import Worker
from service.errors import Undeliverable
from service.handlers import Handler
from service.inbox.admission import Inbox
from service.inbox.receiver import Receiver
from service.storage.connections import Connections
from service.storage.keys import Keys
from service.transitions import stream_entry
from service.transitions.transition import StatusTransition
from tests.support.harness import NOW, SECRET, event, signed
from tests.support.transitions import stored_entry
from tests.support.waiting import until

HANDLER = "log"
QUICK = {
    "lease_ttl_s": 1.0,
    "shutdown_grace_s": 2.0,
    "retry_initial_delay_s": 0.01,
    "retry_max_delay_s": 0.05,
    "retry_max_attempts": 2,
}

Taken = tuple[str, int, bool]


async def test_letters_named_by_their_ids_come_in_their_order(
    connections: Connections, keys: Keys
) -> None:
    """The second part of an id is a number: as a text, 10 would come before 9."""
    stream, ids = keys.dead_letters(3, HANDLER), [f"7-{n}" for n in (1, 2, 9, 10, 11)]
    for n, entry_id in enumerate(ids):
        await connections.client.xadd(stream, stored_entry("vs_1", n), id=entry_id)
    named = [f"3-{one}" for one in reversed(ids)] + ["3-7-10", "no id", "9-9-9"]

    chunks = dead_letters.letter_chunks(connections, keys, HANDLER, EntryFilter(), named)
    assert [entry.entry_id async for chunk in chunks for entry in chunk] == ids


class Deployment:
    """An empty server, and one worker that a test starts and stops.

    Attributes:
        taken: Session, sequence, and whether it was a replay, of each call of the handler.
        seen: The transition of each call.
        act: Called by the handler with each transition.
        overlaps: Whether two calls for one session ever ran at the same time.
    """

    def __init__(self, connections: Connections, settings: Settings) -> None:
        self.connections = connections
        self.settings = settings
        self.keys = Keys(settings.redis_prefix, settings.partitions)
        self.client: Any = connections.client
        self.taken: list[Taken] = []
        self.seen: list[StatusTransition] = []
        self.act: Callable[[StatusTransition], Any] = lambda _: None
        self.overlaps = False
        self._running: list[str] = []
        self._work: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    async def admit(self, session: str, *sequences: int, kind: str = "processing") -> None:
        """Append transitions as admission writes them."""
        stream = self.keys.transitions(self.keys.partition(session))
        for n in sequences:
            await self.client.xadd(stream, stored_entry(session, n, kind=kind))

    async def add_dead_letter(
        self, session: str, n: int, *, reason: str = "exhausted", **more: str
    ) -> None:
        """Add a dead letter."""
        stream = self.keys.dead_letters(self.keys.partition(session), HANDLER)
        letter = {"entry_id": "1-0", "reason": reason, "error": "ValueError", "attempts": 3}
        await self.client.xadd(stream, stored_entry(session, n) | letter | more)

    async def dead_letters(self, **wanted: Any) -> list[Entry]:
        """Return the dead letters."""
        found = dead_letters.read_dead_letters(
            self.connections, self.keys, HANDLER, EntryFilter(**wanted)
        )
        return [entry async for entry in found]

    async def history(self, **wanted: Any) -> list[Entry]:
        """Return the history."""
        found = dead_letters.history_chunks(self.connections, self.keys, EntryFilter(**wanted))
        return [entry async for chunk in found for entry in chunk]

    async def replay(self, entries: list[Entry], name: str = "r1") -> ReplayCounts:
        """Replay entries, partition by partition."""
        replayed = left_out = 0
        for partition in sorted({entry.partition for entry in entries}):
            part = [entry for entry in entries if entry.partition == partition]
            done = await dead_letters.replay(self.connections, self.keys, HANDLER, part, name=name)
            replayed, left_out = replayed + done.replayed, left_out + done.left_out
        return ReplayCounts(replayed, left_out)

    async def acknowledge(self, count: int) -> None:
        """Read and acknowledge up to *count* entries of each partition, as a worker would."""
        for partition in range(self.keys.partitions):
            stream = self.keys.transitions(partition)
            found = await self.client.xreadgroup(HANDLER, "past", {stream: ">"}, count=count)
            for _, entries in found:
                await self.client.xack(stream, HANDLER, *(entry_id for entry_id, _ in entries))

    async def count_replays(self) -> int:
        """Return how many replays are not acknowledged."""
        streams = [self.keys.replays(p, HANDLER) for p in range(self.keys.partitions)]
        return sum([await self.client.xlen(stream) for stream in streams])

    async def has_no_replays(self) -> bool:
        """Say whether all replays are acknowledged."""
        return not await self.count_replays()

    async def has_nothing_pending(self) -> bool:
        """Say whether everything that was read is acknowledged."""
        streams = [self.keys.transitions(p) for p in range(self.keys.partitions)]
        found = [await self.client.xpending(stream, HANDLER) for stream in streams]
        return not sum(one["pending"] for one in found)

    async def has_dead_letters(self, count: int) -> bool:
        """Say whether there are this many dead letters."""
        return len(await self.dead_letters()) == count

    def start_worker(self) -> None:
        """Start the worker."""
        self._stopping = asyncio.Event()
        one = Worker(self.connections, self.keys, self.settings, {HANDLER: self._handler()})
        self._work = asyncio.create_task(one.run(self._stopping))

    async def stop_worker(self) -> None:
        """Stop the worker, if it was started."""
        if self._work is not None:
            self._stopping.set()
            await self._work
            self._work = None

    def _handler(self) -> Handler:
        async def handle(transition: StatusTransition) -> None:
            one = (transition.session_id, transition.sequence, transition.replay is not None)
            self.taken.append(one)
            self.seen.append(transition)
            self.overlaps |= transition.session_id in self._running
            self._running.append(transition.session_id)
            await asyncio.sleep(0)
            self._running.remove(transition.session_id)
            self.act(transition)

        return handle


@pytest.fixture
async def deployment(
    make_settings: Callable[..., Settings], connections: Connections
) -> AsyncIterator[Deployment]:
    """Yield an empty server; the worker is stopped at the end."""
    opened = Deployment(connections, make_settings(**QUICK))
    yield opened
    await opened.stop_worker()


async def test_a_replay_waits_for_its_worker(deployment: Deployment) -> None:
    """Replays made without a worker are delivered when one starts, and after a stop go on."""
    for n in range(40):
        await deployment.add_dead_letter(f"vs_{n}", 1)
    assert await deployment.replay(await deployment.dead_letters()) == (40, 0)
    assert await deployment.count_replays() == 40
    stuck = True

    def act(_: StatusTransition) -> None:
        if stuck:
            raise ConnectionError

    deployment.act = act
    deployment.start_worker()
    await until(lambda: deployment.taken)
    await deployment.stop_worker()
    assert await deployment.count_replays() == 40

    stuck = False
    deployment.taken.clear()
    deployment.start_worker()
    await until(lambda: len(deployment.taken) == 40)
    assert sorted({session for session, _, _ in deployment.taken}) == sorted(
        f"vs_{n}" for n in range(40)
    )


async def test_replayed_and_new_entries_each_keep_their_order(deployment: Deployment) -> None:
    """Of each session replayed entries come in order, and so do new ones, one at a time."""
    await deployment.admit("vs_a", *range(1, 31))
    await deployment.admit("vs_b", *range(1, 31))
    deployment.start_worker()
    await until(lambda: len(deployment.taken) == 60)
    await until(deployment.has_nothing_pending)
    deployment.taken.clear()

    await deployment.replay(await deployment.history())
    await deployment.admit("vs_a", *range(31, 61))
    await until(lambda: len(deployment.taken) == 90)

    for session in ("vs_a", "vs_b"):
        again = [n for one, n, replayed in deployment.taken if replayed and one == session]
        assert again == list(range(1, 31))
    assert [n for _, n, replayed in deployment.taken if not replayed] == list(range(31, 61))
    assert not deployment.overlaps


async def test_a_replay_that_fails_again_is_a_dead_letter_again(deployment: Deployment) -> None:
    """It can be replayed again, under a new name."""

    def refuse(_: StatusTransition) -> None:
        raise Undeliverable("refused")

    await deployment.add_dead_letter("vs_a", 1)
    deployment.act = refuse
    deployment.start_worker()
    for name in ("r1", "r2"):
        await deployment.replay(await deployment.dead_letters(), name)
        await until(deployment.has_no_replays)
        [letter] = await deployment.dead_letters()
        assert letter.reason == "refused"
        assert isinstance(letter.item, StatusTransition)
        assert letter.item.replay == name
    assert [seen.replay for seen in deployment.seen] == ["r1", "r2"]


async def test_history_needs_a_group(deployment: Deployment) -> None:
    """What a handler without a group has acknowledged is unknown, so nothing is replayed."""
    await deployment.admit("vs_a", 1)
    await deployment.client.xgroup_destroy(
        deployment.keys.transitions(deployment.keys.partition("vs_a")), HANDLER
    )
    with pytest.raises(ResponseError, match="NOGROUP"):
        await deployment.replay(await deployment.history())
    assert await deployment.count_replays() == 0


async def test_a_consumer_that_follows_the_rule_misses_nothing_by_a_replay(
    deployment: Deployment,
) -> None:
    """A consumer that skips lower sequences gets a whole backlog of which the end is replayed."""
    last = 0
    acted: list[int] = []

    def consume(transition: StatusTransition) -> None:
        nonlocal last
        if transition.sequence > last:
            acted.append(transition.sequence)
            last = transition.sequence

    deployment.act = consume
    await deployment.admit("vs_a", *range(1, 301))
    await deployment.replay((await deployment.history())[-10:])
    deployment.start_worker()
    await until(lambda: last == 300)
    await until(deployment.has_nothing_pending)
    await until(deployment.has_no_replays)

    assert acted == list(range(1, 301))


@pytest.mark.parametrize("is_dead", [False, True])
async def test_a_replay_differs_only_by_its_name(
    deployment: Deployment, settings: Settings, *, is_dead: bool
) -> None:
    """The replayed entry has every field that admission wrote, and so has the transition."""
    inbox = Inbox(deployment.connections, deployment.keys, settings)
    receiver = Receiver(inbox, tolerance_s=300, livemode=Livemode.BOTH)
    for n, word in enumerate(("requires_input", "processing", "verified")):
        body = event(word, id=f"evt_{n}", status=word, created=NOW - 100 + 10 * n)
        signature = signed(body)["Stripe-Signature"].encode()
        await receiver.receive(body, signature, [SECRET], now=time.time())
    partition = deployment.keys.partition("vs_1")
    stream = deployment.keys.transitions(partition)
    written = [fields for _, fields in await deployment.client.xrange(stream)]
    assert [fields[b"previous"] for fields in written] == [b"", b"requires_input", b"processing"]

    if is_dead:
        for fields in written:
            letter = {"entry_id": "1-0", "reason": "exhausted", "error": "E", "attempts": 1}
            await deployment.client.xadd(
                deployment.keys.dead_letters(partition, HANDLER), fields | letter
            )
    await deployment.acknowledge(3)
    await deployment.replay(
        await (deployment.dead_letters() if is_dead else deployment.history()), "again"
    )
    copied = [
        fields
        for _, fields in await deployment.client.xrange(deployment.keys.replays(partition, HANDLER))
    ]
    assert copied == [fields | {b"replay": b"again"} for fields in written]

    deployment.start_worker()
    await until(lambda: len(deployment.seen) == 3)
    assert deployment.seen == [
        msgspec.structs.replace(stream_entry.unpack(fields), replay="again") for fields in written
    ]


@pytest.mark.parametrize("is_dead", [False, True])
async def test_since_is_exact_to_the_millisecond(deployment: Deployment, *, is_dead: bool) -> None:
    """An entry of that very millisecond matches, one of the millisecond before does not."""
    at = datetime(2026, 1, 31, 12, 0, 0, 500_000, UTC)
    ms = int(at.timestamp() * 1000)
    stream = deployment.keys.dead_letters(0, HANDLER) if is_dead else deployment.keys.transitions(0)
    letter = {"entry_id": "1-0", "reason": "exhausted", "error": "E", "attempts": 1}
    for entry_id in (f"{ms - 1}-9", f"{ms}-0", f"{ms + 1}-0"):
        await deployment.client.xadd(stream, stored_entry("vs_a", 1) | letter, id=entry_id)

    find = deployment.dead_letters if is_dead else deployment.history
    for shift_ms, count in ((-1, 3), (0, 2), (1, 1), (2, 0)):
        assert len(await find(since=at + timedelta(milliseconds=shift_ms))) == count


@pytest.mark.parametrize("count", [99, 100, 101, 200])
async def test_a_page_that_is_exactly_full_is_followed_by_the_next(
    deployment: Deployment, count: int
) -> None:
    """All entries are found, each once, however many pages they fill."""
    await deployment.admit("vs_a", *range(1, count + 1))
    items = [entry.item for entry in await deployment.history()]
    assert [item.sequence for item in items if isinstance(item, StatusTransition)] == list(
        range(1, count + 1)
    )


async def test_only_matching_entries_are_found(deployment: Deployment) -> None:
    """Filters for session, type, reason and time can be combined."""
    await deployment.add_dead_letter("vs_a", 1)
    await deployment.add_dead_letter("vs_b", 1, reason="refused")
    await deployment.admit("vs_a", 1, 2)
    await deployment.admit("vs_a", 3, kind="verified")
    now = datetime.now(UTC)
    verified = "identity.verification_session.verified"

    assert [e.reason for e in await deployment.dead_letters(reason="refused")] == ["refused"]
    assert [e.reason for e in await deployment.dead_letters(session_id="vs_a")] == ["exhausted"]
    assert not await deployment.dead_letters(session_id="vs_a", reason="refused")
    assert len(await deployment.dead_letters(since=now - timedelta(hours=1))) == 2
    assert len(await deployment.dead_letters(since=datetime(1900, 1, 1, tzinfo=UTC))) == 2
    assert not await deployment.dead_letters(since=now + timedelta(hours=1))
    [entry] = await deployment.history(event_type=verified)
    assert isinstance(entry.item, StatusTransition)
    assert entry.item.sequence == 3


async def test_a_stop_takes_effect_where_no_entry_matches(deployment: Deployment) -> None:
    """Each chunk that is read is passed on, though empty; after a stop no other one is."""
    await deployment.admit("vs_a", *range(1, 3 * dead_letters.MAX_PER_CALL))
    wanted, stopping = EntryFilter(session_id="vs_b"), asyncio.Event()
    passed: list[int] = []

    async def act(chunk: dead_letters.Chunk) -> None:
        passed.append(len(chunk))
        if len(passed) == 2:
            stopping.set()

    chunks = dead_letters.history_chunks(deployment.connections, deployment.keys, wanted)
    assert not await dead_letters.run_in_chunks(chunks, act, stopping)
    assert passed == [0, 0]


async def test_a_dead_letter_replayed_twice_at_once_is_moved_once(deployment: Deployment) -> None:
    """Of four replays of the same dead letters at once, one moves each of them."""
    for n in range(50):
        await deployment.add_dead_letter("vs_a", n + 1)
    found = await deployment.dead_letters()
    done = await asyncio.gather(*(deployment.replay(found, f"r{n}") for n in range(4)))
    assert sum(one.replayed for one in done) == await deployment.count_replays() == 50


async def test_a_full_server_refuses_replays_and_lets_workers_finish(
    deployment: Deployment,
) -> None:
    """Without memory a replay fails as a whole, while acknowledging and dead-lettering go on."""
    await deployment.admit("vs_a", 1)
    await deployment.admit("vs_a", 2)
    await deployment.add_dead_letter("vs_b", 1)
    await deployment.replay(await deployment.dead_letters())
    await deployment.add_dead_letter("vs_c", 1)

    def refuse(transition: StatusTransition) -> None:
        if transition.sequence == 2:
            raise Undeliverable("refused")

    deployment.act = refuse
    await deployment.client.config_set("maxmemory", 1)
    try:
        with pytest.raises(OutOfMemoryError):
            await deployment.replay(await deployment.dead_letters())
        deployment.start_worker()
        await until(lambda: len(deployment.taken) == 3)
        await until(lambda: deployment.has_dead_letters(2))
        await deployment.stop_worker()
        found = await deployment.dead_letters()
    finally:
        await deployment.client.config_set("maxmemory", 0)

    assert {e.item.session_id for e in found if e.item} == {"vs_a", "vs_c"}
    assert await deployment.count_replays() == 0


async def test_a_replay_wakes_an_idle_worker(deployment: Deployment) -> None:
    """Each replay wakes a worker that waits for new entries."""
    settings = replace(deployment.settings, handlers=("log",), partitions=1)
    deployment.settings, deployment.keys = settings, Keys(settings.redis_prefix, 1)
    await deployment.client.flushall()
    deployment.start_worker()
    await deployment.admit("vs_a", 1)
    await until(lambda: deployment.taken)
    for n in range(1, 6):
        await deployment.replay(await deployment.history(), f"r{n}")
        await until(lambda: len(deployment.taken) > n)  # noqa: B023
