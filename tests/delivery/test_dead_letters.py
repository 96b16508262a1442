"""Dead letters and history are found by filters, and replayed once and in order by the worker."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from redis.exceptions import OutOfMemoryError, ResponseError

from service.config import Livemode
from service.delivery import dead_letters
from service.delivery.dead_letters import Entry, EntryFilter, ReplayCounts
from service.errors import Undeliverable
from service.inbox.admission import Inbox
from service.inbox.receiver import Receiver
from service.transitions import stream_entry
from service.transitions.transition import StatusTransition
from tests.support.harness import NOW, SECRET, event, signed
from tests.support.transitions import stored_entry
from tests.support.waiting import until
from tests.support.workers import CallLog, Deployment
from tests.support.workers import Entry as Call

HANDLER = "log"
LETTER = {"entry_id": "1-0", "reason": "exhausted", "error": "ValueError", "attempts": 3}


def add_letter(deployment: Deployment, session: str, sequence: int = 1, **changes: str) -> None:
    """Add a dead letter."""
    stream = deployment.keys.dead_letters(deployment.keys.partition(session), HANDLER)
    deployment.client.xadd(stream, stored_entry(session, sequence) | LETTER | changes)


async def letters(deployment: Deployment, **wanted: Any) -> list[Entry]:
    """Return the dead letters."""
    wanted_ones = EntryFilter(**wanted)
    found = dead_letters.read_dead_letters(
        deployment.connections, deployment.keys, HANDLER, wanted_ones
    )
    return [entry async for entry in found]


async def history(deployment: Deployment, **wanted: Any) -> list[Entry]:
    """Return the history."""
    found = dead_letters.history_chunks(
        deployment.connections, deployment.keys, EntryFilter(**wanted)
    )
    return [entry async for chunk in found for entry in chunk]


async def replay(deployment: Deployment, entries: list[Entry], name: str = "r1") -> ReplayCounts:
    """Replay entries, partition by partition."""
    replayed = left_out = 0
    for partition in sorted({entry.partition for entry in entries}):
        part = [entry for entry in entries if entry.partition == partition]
        done = await dead_letters.replay(
            deployment.connections, deployment.keys, HANDLER, part, name=name
        )
        replayed, left_out = replayed + done.replayed, left_out + done.left_out
    return ReplayCounts(replayed, left_out)


def count_replays(deployment: Deployment) -> int:
    """Return how many replays are not acknowledged."""
    keys = deployment.keys
    return sum(deployment.client.xlen(keys.replays(p, HANDLER)) for p in range(keys.partitions))


async def test_a_replay_waits_for_its_worker(deployment: Deployment) -> None:
    """Replays made without a worker are delivered when one starts, and after a stop go on."""
    sessions = {f"vs_{n}" for n in range(40)}
    for session in sessions:
        add_letter(deployment, session)
    assert await replay(deployment, await letters(deployment)) == (40, 0)
    assert count_replays(deployment) == 40

    async def fail(_: Call) -> None:
        raise ConnectionError

    stuck, log = CallLog(), CallLog()
    worker = deployment.start({HANDLER: stuck.handler(fail)})
    await until(lambda: stuck.calls)
    await deployment.stop(worker)
    assert count_replays(deployment) == 40

    deployment.start({HANDLER: log.handler()})
    await until(lambda: len(log.calls) == 40)
    assert {session for session, _ in log.calls} == sessions


async def test_replayed_and_new_entries_each_keep_their_order(deployment: Deployment) -> None:
    """Of each session replayed entries come in order, and so do new ones, one at a time."""
    running: list[str] = []
    overlaps: list[Call] = []

    async def act(one: Call) -> None:
        overlaps.extend([one] if one[0] in running else [])
        running.append(one[0])
        await asyncio.sleep(0)
        running.remove(one[0])

    log = CallLog()
    old = deployment.admit(2, 30)
    deployment.start({HANDLER: log.handler(act)})
    await deployment.deliver_all(lambda: log.returns)

    await replay(deployment, await history(deployment))
    new = deployment.admit(1, 30)
    await until(lambda: len(log.returns) == len(old) * 2 + len(new))

    replayed = [(one.session_id, one.sequence) for one in log.transitions if one.replay]
    for session in ("vs_s0", "vs_s1"):
        assert [n for one, n in replayed if one == session] == list(range(1, 31))
    assert [one.sequence for one in log.transitions if not one.replay][len(old) :] == [
        n for _, n in new
    ]
    assert not overlaps


async def test_a_replay_that_fails_again_is_a_dead_letter_again(deployment: Deployment) -> None:
    """It can be replayed again, under a new name; each replay wakes a worker that is idle."""

    async def refuse(_: Call) -> None:
        raise Undeliverable("refused")

    log = CallLog()
    add_letter(deployment, "vs_a")
    deployment.start({HANDLER: log.handler(refuse)})
    for name in ("r1", "r2"):
        await replay(deployment, await letters(deployment), name)
        await until(lambda: not count_replays(deployment))
        [letter] = await letters(deployment)
        assert letter.reason == "refused"
        assert isinstance(letter.item, StatusTransition)
        assert letter.item.replay == name
    assert [one.replay for one in log.transitions] == ["r1", "r2"]


async def test_history_needs_a_group(deployment: Deployment) -> None:
    """What a handler without a group has acknowledged is unknown, so nothing is replayed."""
    keys = deployment.keys
    [(session, _)] = deployment.admit(1)
    deployment.client.xgroup_destroy(keys.transitions(keys.partition(session)), HANDLER)
    with pytest.raises(ResponseError, match="NOGROUP"):
        await replay(deployment, await history(deployment))
    assert count_replays(deployment) == 0


async def test_a_consumer_that_follows_the_rule_misses_nothing_by_a_replay(
    deployment: Deployment,
) -> None:
    """A consumer that skips lower sequences gets a whole backlog of which the end is replayed."""
    acted = [0]

    async def consume(one: Call) -> None:
        acted.extend([one[1]] if one[1] > acted[-1] else [])

    log = CallLog()
    deployment.admit(1, 300)
    await replay(deployment, (await history(deployment))[-10:])
    deployment.start({HANDLER: log.handler(consume)})
    await deployment.deliver_all(lambda: log.returns)
    await until(lambda: not count_replays(deployment))

    assert acted == list(range(301))


@pytest.mark.parametrize("is_dead", [False, True])
async def test_a_replay_differs_only_by_its_name(deployment: Deployment, *, is_dead: bool) -> None:
    """The replayed entry has every field that admission wrote, and so has the transition."""
    keys, client = deployment.keys, deployment.client
    inbox = Inbox(deployment.connections, keys, deployment.settings)
    receiver = Receiver(inbox, tolerance_s=300, livemode=Livemode.BOTH)
    for n, word in enumerate(("requires_input", "processing", "verified")):
        body = event(word, id=f"evt_{n}", status=word, created=NOW - 100 + 10 * n)
        signature = signed(body)["Stripe-Signature"].encode()
        await receiver.receive(body, signature, [SECRET], now=time.time())
    partition = keys.partition("vs_1")
    stream = keys.transitions(partition)
    [[_, entries]] = client.xreadgroup(HANDLER, "past", {stream: ">"})
    client.xack(stream, HANDLER, *(entry_id for entry_id, _ in entries))
    written = [fields for _, fields in entries]
    assert [fields[b"previous"] for fields in written] == [b"", b"requires_input", b"processing"]

    if is_dead:
        for fields in written:
            client.xadd(keys.dead_letters(partition, HANDLER), fields | LETTER)
    await replay(deployment, await (letters if is_dead else history)(deployment), "again")
    copied = [fields for _, fields in client.xrange(keys.replays(partition, HANDLER))]
    assert copied == [fields | {b"replay": b"again"} for fields in written]

    log = CallLog()
    deployment.start({HANDLER: log.handler()})
    await until(lambda: len(log.transitions) == 3)
    assert log.transitions == [
        msgspec.structs.replace(stream_entry.unpack(fields), replay="again") for fields in written
    ]


@pytest.mark.parametrize("count", [99, 100, 101, 200])
async def test_a_page_that_is_exactly_full_is_followed_by_the_next(
    deployment: Deployment, count: int
) -> None:
    """All entries are found, each once, however many pages they fill."""
    admitted = deployment.admit(1, count)
    items = [entry.item for entry in await history(deployment)]
    assert [
        (item.session_id, item.sequence) for item in items if isinstance(item, StatusTransition)
    ] == admitted


async def test_only_matching_entries_are_found(deployment: Deployment) -> None:
    """Filters for session, type, reason and time can be combined."""
    add_letter(deployment, "vs_a")
    add_letter(deployment, "vs_b", reason="refused")
    deployment.admit(1, 2)
    stream = deployment.keys.transitions(deployment.keys.partition("vs_a"))
    deployment.client.xadd(stream, stored_entry("vs_a", 3, kind="verified"))
    hour, now = timedelta(hours=1), datetime.now(UTC)

    async def reasons(**wanted: Any) -> list[str | None]:
        return sorted([one.reason for one in await letters(deployment, **wanted)], key=str)

    assert await reasons(reason="refused") == ["refused"]
    assert await reasons(session_id="vs_a") == ["exhausted"]
    assert await reasons(session_id="vs_a", reason="refused") == []
    for since in (now - hour, datetime(1900, 1, 1, tzinfo=UTC)):
        assert await reasons(since=since) == ["exhausted", "refused"]
    assert await reasons(since=now + hour) == []
    verified = "identity.verification_session.verified"
    [entry] = await history(deployment, event_type=verified)
    assert isinstance(entry.item, StatusTransition)
    assert entry.item.sequence == 3


async def test_a_stop_takes_effect_where_no_entry_matches(deployment: Deployment) -> None:
    """Each chunk that is read is passed on, though empty; after a stop no other one is."""
    deployment.admit(1, 3 * dead_letters.MAX_PER_CALL)
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
        add_letter(deployment, "vs_a", n + 1)
    found = await letters(deployment)
    done = await asyncio.gather(*(replay(deployment, found, f"r{n}") for n in range(4)))
    assert sum(one.replayed for one in done) == count_replays(deployment) == 50


async def test_a_full_server_refuses_replays_and_lets_workers_finish(
    deployment: Deployment,
) -> None:
    """Without memory a replay fails as a whole, while acknowledging and dead-lettering go on."""

    async def refuse(one: Call) -> None:
        if one == ("vs_s0", 2):
            raise Undeliverable("refused")

    log = CallLog()
    deployment.admit(1, 2)
    add_letter(deployment, "vs_b")
    await replay(deployment, await letters(deployment))
    add_letter(deployment, "vs_c")
    deployment.client.config_set("maxmemory", 1)
    try:
        with pytest.raises(OutOfMemoryError):
            await replay(deployment, await letters(deployment))
        worker = deployment.start({HANDLER: log.handler(refuse)})
        await until(lambda: len(log.calls) == 3)
        await until(lambda: len(deployment.dead_letters()) == 2)
        await deployment.stop(worker)
    finally:
        deployment.client.config_set("maxmemory", 0)

    assert {session for session, _ in deployment.dead_letters()} == {"vs_s0", "vs_c"}
    assert count_replays(deployment) == 0
