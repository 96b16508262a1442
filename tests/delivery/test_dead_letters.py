"""Laws of replays: what is handed over again comes once, in order, through the running worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
import structlog.testing
from redis.exceptions import OutOfMemoryError, ResponseError

from service.config import Livemode, Settings
from service.delivery import consumer, dead_letters
from service.delivery.consumer import Consumer
from service.delivery.consumer_groups import Lag, measure_lags
from service.delivery.dead_letters import Entry, EntryFilter, ReplayCounts
from service.delivery.leases import Lease, LeaseLostError, take_or_renew
from service.delivery.stream_watcher import StreamWatcher
from service.delivery.worker import Worker
from service.errors import Undeliverable
from service.handlers import Handler
from service.inbox.admission import Inbox
from service.inbox.receiver import Receiver
from service.storage.connections import Connections
from service.storage.layout import Keys
from service.transitions import stream_entry
from service.transitions.transition import StatusTransition
from tests.support.harness import NOW, SECRET, event, eventually, signed
from tests.support.servers import until

HANDLER = "log"
QUICK = {
    "lease_ttl_s": 1.0,
    "shutdown_grace_s": 2.0,
    "retry_initial_delay_s": 0.01,
    "retry_max_delay_s": 0.05,
    "retry_max_attempts": 2,
}

Taken = tuple[str, int, bool]


class Post:
    """An empty server, what is on it, and one worker that may be started and stopped.

    Attributes:
        taken: Session, sequence, and whether it was a replay, of each call of the handler.
        act: What the handler does beside.
    """

    def __init__(self, connections: Connections, settings: Settings) -> None:
        self.connections = connections
        self.settings = settings
        self.keys = Keys(settings.redis_prefix, settings.partitions)
        self.client: Any = connections.client
        self.taken: list[Taken] = []
        self.seen: list[StatusTransition] = []
        self.act: Callable[[StatusTransition], Any] = lambda _: None
        self._work: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    async def admit(self, session: str, *sequences: int, kind: str = "processing") -> None:
        """Append transitions as admission writes them."""
        stream = self.keys.transitions(self.keys.partition(session))
        for n in sequences:
            await self.client.xadd(stream, fields(session, n, kind))

    async def dead_letter(
        self, session: str, n: int, *, reason: str = "exhausted", **more: str
    ) -> None:
        """Make a dead letter."""
        stream = self.keys.dead_letters(self.keys.partition(session), HANDLER)
        letter = {"entry_id": "1-0", "reason": reason, "error": "ValueError", "attempts": 3}
        await self.client.xadd(stream, fields(session, n) | letter | more)

    async def letters(self, **wanted: Any) -> list[Entry]:
        """Return the dead letters."""
        found = dead_letters.read_dead_letters(
            self.connections, self.keys, HANDLER, EntryFilter(**wanted)
        )
        return [entry async for entry in found]

    async def past(self, **wanted: Any) -> list[Entry]:
        """Return the past."""
        found = dead_letters.read_history(self.connections, self.keys, EntryFilter(**wanted))
        return [entry async for entry in found]

    async def replay(self, entries: list[Entry], name: str = "r1") -> ReplayCounts:
        """Replay entries, partition by partition."""
        replayed = left_out = 0
        for partition in sorted({entry.partition for entry in entries}):
            part = [entry for entry in entries if entry.partition == partition]
            done = await dead_letters.replay(self.connections, self.keys, HANDLER, part, name=name)
            replayed, left_out = replayed + done.replayed, left_out + done.left_out
        return ReplayCounts(replayed, left_out)

    async def ack(self, count: int) -> None:
        """Read and settle so much in each partition as a worker would that took everything."""
        for partition in range(self.keys.partitions):
            stream = self.keys.transitions(partition)
            found = await self.client.xreadgroup(HANDLER, "past", {stream: ">"}, count=count)
            for _, entries in found:
                await self.client.xack(stream, HANDLER, *(entry_id for entry_id, _ in entries))

    async def waiting(self) -> int:
        """Return how much is replayed and not settled."""
        streams = [self.keys.replays(p, HANDLER) for p in range(self.keys.partitions)]
        return sum([await self.client.xlen(stream) for stream in streams])

    async def settled(self) -> bool:
        """Say whether all that was replayed is settled."""
        return not await self.waiting()

    async def nothing_pends(self) -> bool:
        """Say whether all that was read is settled."""
        streams = [self.keys.transitions(p) for p in range(self.keys.partitions)]
        found = [await self.client.xpending(stream, HANDLER) for stream in streams]
        return not sum(one["pending"] for one in found)

    async def has_letters(self, count: int) -> bool:
        """Say whether there are so many dead letters."""
        return len(await self.letters()) == count

    def work(self) -> None:
        """Start the worker."""
        self._stopping = asyncio.Event()
        one = Worker(self.connections, self.keys, self.settings, {HANDLER: self._handler()})
        self._work = asyncio.create_task(one.run(self._stopping))

    async def stop(self) -> None:
        """Stop the worker, if one works."""
        if self._work is not None:
            self._stopping.set()
            await self._work
            self._work = None

    def _handler(self) -> Handler:
        async def handle(transition: StatusTransition) -> None:
            one = (transition.session_id, transition.sequence, transition.replay is not None)
            self.taken.append(one)
            self.seen.append(transition)
            await asyncio.sleep(0)
            self.act(transition)

        return handle


def fields(session: str, sequence: int, kind: str = "processing") -> dict[str, Any]:
    """Return a stream entry as admission writes it."""
    change = (
        f'{{"event_id":"evt_{session}_{sequence}","event_type":"identity.verification_session.'
        f'{kind}","occurred_at":"2026-01-01T00:00:00Z","session_id":"{session}",'
        '"current":"processing","metadata":{"k":"canary4711"}}'
    )
    return {"change": change, "previous": "", "sequence": sequence, "epoch": 1}


@pytest.fixture
async def post(
    make_settings: Callable[..., Settings], connections: Connections
) -> AsyncIterator[Post]:
    """Yield an empty server; the worker is stopped at the end."""
    opened = Post(connections, make_settings(**QUICK))
    yield opened
    await opened.stop()


async def test_a_replayed_letter_is_the_same_message_marked_as_a_replay(post: Post) -> None:
    """A dead letter goes through the running worker once, with its id, sequence and a mark."""
    await post.dead_letter("vs_a", 3)
    post.work()
    assert await post.replay(await post.letters(), "again") == (1, 0)
    await eventually(lambda: post.seen)

    [seen] = post.seen
    assert (seen.event_id, seen.sequence, seen.replay) == ("evt_vs_a_3", 3, "again")
    assert seen.metadata == {"k": "canary4711"}
    assert not await post.letters()
    await until(post.settled)


async def test_a_replay_waits_for_its_worker(post: Post) -> None:
    """What is replayed while no worker works is done when one comes, and after a stop goes on."""
    for n in range(40):
        await post.dead_letter(f"vs_{n}", 1)
    assert await post.replay(await post.letters()) == (40, 0)
    assert await post.waiting() == 40
    stuck = True

    def act(_: StatusTransition) -> None:
        if stuck:
            raise ConnectionError

    post.act = act
    post.work()
    await eventually(lambda: post.taken)
    await post.stop()
    assert await post.waiting() == 40

    stuck = False
    post.taken.clear()
    post.work()
    await eventually(lambda: len(post.taken) == 40)
    assert sorted({session for session, _, _ in post.taken}) == sorted(f"vs_{n}" for n in range(40))


async def test_one_sessions_order_holds_among_replayed_and_new(post: Post) -> None:
    """ReplayCounts and new entries of a session come one at a time, each kind in its order."""
    await post.admit("vs_a", *range(1, 31))
    await post.admit("vs_b", *range(1, 31))
    post.work()
    await eventually(lambda: len(post.taken) == 60)
    await until(post.nothing_pends)
    post.taken.clear()

    await post.replay(await post.past())
    await post.admit("vs_a", *range(31, 61))
    await eventually(lambda: len(post.taken) == 90)

    for session in ("vs_a", "vs_b"):
        again = [n for one, n, replayed in post.taken if replayed and one == session]
        assert again == list(range(1, 31))
    assert [n for _, n, replayed in post.taken if not replayed] == list(range(31, 61))


async def test_chains_hold_replayed_and_new_together(post: Post) -> None:
    """No two calls for one session run at once, though one is replayed and the other new."""
    running: list[str] = []
    most = 0

    async def handle(transition: StatusTransition) -> None:
        nonlocal most
        running.append(transition.session_id)
        most = max(most, len(running))
        post.taken.append((transition.session_id, transition.sequence, bool(transition.replay)))
        await asyncio.sleep(0.005)
        running.remove(transition.session_id)

    post._handler = lambda: handle  # type: ignore[method-assign]
    await post.admit("vs_a", *range(1, 11))
    await post.dead_letter("vs_a", 99)
    await post.replay(await post.letters())
    post.work()
    await eventually(lambda: len(post.taken) == 11)
    assert most == 1


async def test_a_replay_that_fails_again_is_a_dead_letter_again(post: Post) -> None:
    """What the handler refuses once more is buried anew, and may be replayed under a new name."""

    def refuse(_: StatusTransition) -> None:
        raise Undeliverable("refused")

    await post.dead_letter("vs_a", 1)
    post.act = refuse
    post.work()
    for name in ("r1", "r2"):
        await post.replay(await post.letters(), name)
        await until(post.settled)
        [letter] = await post.letters()
        assert letter.reason == "refused"
        assert letter.transition is not None
        assert letter.transition.replay == name
    assert [seen.replay for seen in post.seen] == ["r1", "r2"]


async def test_failures_of_a_replay_are_counted_and_survive(post: Post) -> None:
    """A replay is retried like new entries, up to the same number of attempts."""

    def fail(_: StatusTransition) -> None:
        raise ValueError

    post.act = fail
    await post.dead_letter("vs_a", 1)
    await post.replay(await post.letters())
    post.work()
    await until(lambda: post.has_letters(1))
    found = await post.letters()
    assert (found[0].reason, found[0].attempts, len(post.taken)) == ("exhausted", 2, 2)


async def test_the_past_stays_and_comes_in_order(post: Post) -> None:
    """The past is copied, not moved: a handler may have it as often as it is asked for."""
    await post.admit("vs_a", 1, 2, 3)
    await post.ack(3)
    assert await post.replay(await post.past()) == (3, 0)
    assert await post.replay(await post.past()) == (3, 0)
    assert len(await post.past()) == 3
    assert await post.waiting() == 6


async def test_what_is_not_settled_yet_is_left_out(post: Post) -> None:
    """Of the past only what the group has settled is replayed: what pends or is unread comes."""
    await post.admit("vs_a", *range(1, 6))
    stream = post.keys.transitions(post.keys.partition("vs_a"))
    [[_, entries]] = await post.client.xreadgroup(HANDLER, "past", {stream: ">"}, count=4)
    first, _, third, _ = (entry_id for entry_id, _ in entries)
    await post.client.xack(stream, HANDLER, first, third)

    assert await post.replay(await post.past()) == (2, 3)
    replayed = await post.client.xrange(post.keys.replays(post.keys.partition("vs_a"), HANDLER))
    assert [int(fields[b"sequence"]) for _, fields in replayed] == [1, 3]


async def test_the_past_needs_a_group(post: Post) -> None:
    """What a handler without a group has settled nobody knows: nothing is replayed to it."""
    await post.admit("vs_a", 1)
    await post.client.xgroup_destroy(post.keys.transitions(post.keys.partition("vs_a")), HANDLER)
    with pytest.raises(ResponseError, match="NOGROUP"):
        await post.replay(await post.past())
    assert await post.waiting() == 0


async def test_a_consumer_that_follows_the_rule_misses_nothing_by_a_replay(post: Post) -> None:
    """Where the last of a backlog is replayed, nobody skips what comes before it."""
    last = 0
    acted: list[int] = []

    def consume(transition: StatusTransition) -> None:
        nonlocal last
        if transition.sequence > last:
            acted.append(transition.sequence)
            last = transition.sequence

    post.act = consume
    await post.admit("vs_a", *range(1, 301))
    await post.replay((await post.past())[-10:])
    post.work()
    await until(lambda: last == 300)
    await until(post.nothing_pends)
    await until(post.settled)

    assert acted == list(range(1, 301))


@pytest.mark.parametrize("is_dead", [False, True])
async def test_a_replay_differs_in_its_name_alone(
    post: Post, settings: Settings, *, is_dead: bool
) -> None:
    """Whatever admission wrote comes again, field by field, as does what a handler is given."""
    inbox = Inbox(post.connections, post.keys, settings)
    receiver = Receiver(inbox, tolerance_s=300, livemode=Livemode.BOTH)
    for n, word in enumerate(("requires_input", "processing", "verified")):
        body = event(word, id=f"evt_{n}", status=word, created=NOW - 100 + 10 * n)
        signature = signed(body)["Stripe-Signature"].encode()
        await receiver.receive(body, signature, [SECRET], now=time.time())
    partition = post.keys.partition("vs_1")
    stream = post.keys.transitions(partition)
    written = [fields for _, fields in await post.client.xrange(stream)]
    assert [fields[b"previous"] for fields in written] == [b"", b"requires_input", b"processing"]

    if is_dead:
        for fields in written:
            letter = {"entry_id": "1-0", "reason": "exhausted", "error": "E", "attempts": 1}
            await post.client.xadd(post.keys.dead_letters(partition, HANDLER), fields | letter)
    await post.ack(3)
    await post.replay(await (post.letters() if is_dead else post.past()), "again")
    copied = [
        fields for _, fields in await post.client.xrange(post.keys.replays(partition, HANDLER))
    ]
    assert copied == [fields | {b"replay": b"again"} for fields in written]

    post.work()
    await eventually(lambda: len(post.seen) == 3)
    assert post.seen == [
        msgspec.structs.replace(stream_entry.unpack(fields), replay="again") for fields in written
    ]


@pytest.mark.parametrize("is_dead", [False, True])
async def test_since_is_exact_to_the_millisecond(post: Post, *, is_dead: bool) -> None:
    """An entry of that very millisecond is wanted, one of the millisecond before is not."""
    at = datetime(2026, 1, 31, 12, 0, 0, 500_000, UTC)
    ms = int(at.timestamp() * 1000)
    stream = post.keys.dead_letters(0, HANDLER) if is_dead else post.keys.transitions(0)
    letter = {"entry_id": "1-0", "reason": "exhausted", "error": "E", "attempts": 1}
    for entry_id in (f"{ms - 1}-9", f"{ms}-0", f"{ms + 1}-0"):
        await post.client.xadd(stream, fields("vs_a", 1) | letter, id=entry_id)

    find = post.letters if is_dead else post.past
    for shift_ms, count in ((-1, 3), (0, 2), (1, 1), (2, 0)):
        assert len(await find(since=at + timedelta(milliseconds=shift_ms))) == count


@pytest.mark.parametrize("count", [199, 200, 201, 400])
async def test_a_page_that_is_exactly_full_is_followed_by_the_next(post: Post, count: int) -> None:
    """All entries are found, each once, however they fall into pages."""
    await post.admit("vs_a", *range(1, count + 1))
    found = [entry.transition.sequence for entry in await post.past() if entry.transition]
    assert found == list(range(1, count + 1))


async def test_only_what_is_wanted_is_found(post: Post) -> None:
    """Filters for session, type, reason and time cover exactly what they say, together."""
    await post.dead_letter("vs_a", 1)
    await post.dead_letter("vs_b", 1, reason="refused")
    await post.admit("vs_a", 1, 2)
    await post.admit("vs_a", 3, kind="verified")
    now = datetime.now(UTC)
    verified = "identity.verification_session.verified"

    assert [e.reason for e in await post.letters(reason="refused")] == ["refused"]
    assert [e.reason for e in await post.letters(session_id="vs_a")] == ["exhausted"]
    assert not await post.letters(session_id="vs_a", reason="refused")
    assert len(await post.letters(since=now - timedelta(hours=1))) == 2
    assert len(await post.letters(since=datetime(1900, 1, 1, tzinfo=UTC))) == 2
    assert not await post.letters(since=now + timedelta(hours=1))
    [entry] = await post.past(event_type=verified)
    assert entry.transition is not None
    assert entry.transition.sequence == 3


async def test_what_cannot_be_read_is_shown_and_left(post: Post) -> None:
    """A letter without a readable transition is listed, passed over by replays, and droppable."""
    stream = post.keys.dead_letters(0, HANDLER)
    await post.client.xadd(stream, {"change": "x", "reason": "unreadable", "attempts": 0})
    [letter] = await post.letters()

    assert letter.transition is None
    assert not await post.letters(session_id="vs_a")
    assert await post.replay([letter]) == (0, 0)
    assert await dead_letters.drop(post.connections, post.keys, HANDLER, [letter]) == 1
    assert not await post.letters()


async def test_a_letter_replayed_twice_at_once_goes_once(post: Post) -> None:
    """Two who replay the same letters at the same time replayed each of them there once."""
    for n in range(50):
        await post.dead_letter("vs_a", n + 1)
    found = await post.letters()
    done = await asyncio.gather(*(post.replay(found, f"r{n}") for n in range(4)))
    assert sum(one.replayed for one in done) == await post.waiting() == 50


async def test_a_full_server_refuses_replays_and_lets_the_way_out_work(post: Post) -> None:
    """On a full Redis a replay is refused whole, while leasing, settling and burying go on."""
    await post.admit("vs_a", 1)
    await post.admit("vs_a", 2)
    await post.dead_letter("vs_b", 1)
    await post.replay(await post.letters())
    await post.dead_letter("vs_c", 1)

    def refuse(transition: StatusTransition) -> None:
        if transition.sequence == 2:
            raise Undeliverable("refused")

    post.act = refuse
    await post.client.config_set("maxmemory", 1)
    try:
        with pytest.raises(OutOfMemoryError):
            await post.replay(await post.letters())
        post.work()
        await eventually(lambda: len(post.taken) == 3)
        await until(lambda: post.has_letters(2))
        await post.stop()
        found = await post.letters()
    finally:
        await post.client.config_set("maxmemory", 0)

    assert {e.transition.session_id for e in found if e.transition} == {"vs_a", "vs_c"}
    assert await post.waiting() == 0


async def test_at_the_bound_delivery_stays_until_there_is_room(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no room for a dead letter nothing is dropped: it is said, and buried after a drop."""
    monkeypatch.setattr(consumer, "MAX_DEAD_LETTERS", 1)
    await post.dead_letter("vs_a", 1)
    await post.admit("vs_a", 2)

    def refuse(transition: StatusTransition) -> None:
        if transition.sequence == 2:
            raise Undeliverable("refused")

    post.act = refuse
    with structlog.testing.capture_logs() as lines:
        post.work()
        await eventually(
            lambda: [one for one in lines if one["event"] == "delivery.dead_letters_full"]
        )
        await post.admit("vs_other", 1)
        await eventually(lambda: ("vs_other", 1, False) in post.taken)
        [old] = await post.letters()
        assert old.reason == "exhausted"
        await dead_letters.drop(post.connections, post.keys, HANDLER, [old])
        await eventually(lambda: [one for one in lines if one["event"] == "delivery.dead_lettered"])
    [letter] = await post.letters()
    assert letter.reason == "refused"
    assert [one for one in post.taken if one[1] == 2] == [("vs_a", 2, False)]


async def test_replays_are_fenced(post: Post) -> None:
    """Whoever lost the lease can settle no replay, and the next owner takes it over."""
    await post.dead_letter("vs_a", 1)
    await post.replay(await post.letters())
    partition = post.keys.partition("vs_a")
    stream_watcher = StreamWatcher(post.connections, partition)
    first, second = (
        Consumer(
            Lease(post.connections, post.keys, handler=HANDLER, partition=partition, worker=name),
            post.keys,
            stream_watcher,
        )
        for name in ("w1", "w2")
    )
    await take_or_renew(post.connections, [first.lease], 10)
    [delivery] = await first.read(10)
    await post.client.delete(post.keys.lease(partition, HANDLER))
    await take_or_renew(post.connections, [second.lease], 10)
    with pytest.raises(LeaseLostError):
        await first.ack(delivery)

    [[again]] = [batch async for batch in second.claim_pending()]
    assert again.transition == delivery.transition
    await second.ack(again)
    assert await post.waiting() == 0


async def test_what_is_replayed_counts_as_unsettled(post: Post) -> None:
    """The lag of a handler holds what is replayed to it."""
    await post.dead_letter("vs_a", 1)
    await post.replay(await post.letters())
    place = (HANDLER, post.keys.partition("vs_a"))
    [lag] = await measure_lags(post.connections, post.keys, [place])
    assert isinstance(lag, Lag)
    assert (lag.entries, lag.dead_letters) == (1, 0)


async def test_a_replay_made_while_a_worker_idles_is_taken_soon(post: Post) -> None:
    """Whoever waits for new mail is woken by a replay, each time."""
    settings = replace(post.settings, handlers=("log",), partitions=1)
    post.settings, post.keys = settings, Keys(settings.redis_prefix, 1)
    await post.client.flushall()
    post.work()
    await post.admit("vs_a", 1)
    await eventually(lambda: post.taken)
    for n in range(1, 6):
        await post.replay(await post.past(), f"r{n}")
        await until(lambda: len(post.taken) > n)  # noqa: B023
