"""A torn append-only file: wherever it ends, no event is there by half.

TEST_AOF_CUTS says how often it is torn (25), TEST_AOF_SEED where to begin (1): a failing test names
its seed, and TEST_AOF_SEED=<seed> TEST_AOF_CUTS=1 tears it there again.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest
import redis

from service.config import Settings
from service.delivery.consumer import Consumer
from service.delivery.consumer_groups import create_groups
from service.delivery.dead_letters import EntryFilter, read_dead_letters, replay
from service.delivery.leases import Lease, take_or_renew
from service.delivery.stream_watcher import StreamWatcher
from service.inbox.admission import Inbox
from service.secret import Secret
from service.storage.connections import Connections, connect
from service.storage.keys import Keys
from service.storage.layout import claim
from service.stripe.events import Event, parse
from service.stripe.signatures import VerifiedPayload
from service.transitions.transition import make_change
from tests.support.harness import event
from tests.support.servers import server

CUTS = int(os.environ.get("TEST_AOF_CUTS", "25"))
FIRST_SEED = int(os.environ.get("TEST_AOF_SEED", "1"))
KEYS = Keys("idv", 1)
SESSIONS = 6
SETTLES, BURIES = HANDLERS = ("settles", "buries")
STEPS = ("created", "processing", "requires_input", "processing", "verified")
BEGAN = 1_760_000_000

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Yield the data directory of a stopped server that has seen everything the service does."""
    directory = tmp_path_factory.mktemp("log")
    with server(directory, "--appendonly", "yes", "--appendfsync", "always") as running:
        asyncio.run(_live(running.url))
    return directory


async def _live(url: str) -> None:
    """Admit every kind of event, several at once; ack, dead-letter and replay in between."""
    async with connect(Secret(url)) as connections:
        await _work(connections)


async def _work(connections: Connections) -> None:
    settings = Settings(secrets={}, max_event_age_days=3650)
    await claim(connections, KEYS)
    await create_groups(connections, KEYS, HANDLERS)
    inbox = Inbox(connections, KEYS, settings)
    stream_watcher = StreamWatcher(connections)
    leases = [Lease(connections, KEYS, handler=h, partition=0, worker="w") for h in HANDLERS]
    consumers = [Consumer(lease, KEYS, stream_watcher) for lease in leases]
    assert await take_or_renew(connections, leases, 600) == [0, 0]
    for step in range(len(STEPS)):
        events = [_event(session, step) for session in range(SESSIONS)]
        # A copy, and one that is late.
        events += [events[0], _event(1, 0, "late_")]
        await asyncio.gather(*(inbox.admit(one, make_change(one)) for one in events))
        for consumer in consumers:
            for delivery in await consumer.read(SESSIONS - 1):
                if consumer.handler == SETTLES:
                    await consumer.ack(delivery)
                else:
                    await consumer.dead_letter(delivery, reason="refused", error="E", attempts=1)
        entries = [one async for one in read_dead_letters(connections, KEYS, BURIES, EntryFilter())]
        await replay(connections, KEYS, BURIES, entries[:2], name="again")


def _event(session: int, step: int, kind: str = "") -> Event:
    word = STEPS[step]
    body = event(
        word,
        id=f"evt_{kind}{session}_{step}",
        session=f"vs_{session}",
        status="requires_input" if word == "created" else word,
        created=BEGAN + 60 * step,
    )
    parsed = parse(VerifiedPayload(body, "fingerprint"))
    assert isinstance(parsed, Event)
    return parsed


def test_the_whole_log_holds_everything(log: Path, tmp_path: Path) -> None:
    """The whole log restores everything, so that the tests below tear something of value."""
    found = _found(log, tmp_path, None)
    assert found["sessions"].total() == SESSIONS * len(STEPS)
    assert found["places"].keys() == {"dead", "replayed", "unread"}
    assert found["places"]["dead"] > 10


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + CUTS))
def test_a_torn_log_shows_no_half(log: Path, tmp_path: Path, seed: int) -> None:
    """Record and entry, ack and dead letter, dead letter and replay: both or neither are there."""
    _found(log, tmp_path, seed)


def _found(log: Path, copy: Path, seed: int | None) -> dict[str, Counter[Any]]:
    """Restart on a copy of the log, torn if there is a seed; check it, and count its contents."""
    shutil.copytree(log, copy, dirs_exist_ok=True)
    if seed is not None:
        [last] = (copy / "appendonlydir").glob("*.incr.aof")
        os.truncate(last, Random(seed).randint(0, last.stat().st_size))
    with (
        server(copy, "--appendonly", "yes") as running,
        redis.Redis(port=running.port, decode_responses=True) as client,
    ):
        entries = dict(client.xrange(KEYS.transitions(0)))
        sessions = _records_match(client, entries)
        return {"sessions": sessions, "places": _each_is_somewhere(client, entries)}


def _records_match(client: Any, entries: dict[str, Any]) -> Counter[str]:
    """Assert that each session's record knows its entries in the stream, and no others."""
    streamed = Counter(_session(fields) for fields in entries.values())
    recorded: Counter[str] = Counter()
    for key in client.scan_iter("idv:*:session:*"):
        record = client.hgetall(key)
        verdicts = [value.split() for name, value in record.items() if name.startswith("evt_")]
        admitted = sorted(int(words[1]) for words in verdicts if words[0] == "a")
        sequence, _epoch, _server, _hash, _kind = record["state"].split()
        assert admitted == [*range(1, int(sequence) + 1)]
        assert "status" in record
        assert client.ttl(key) > 0
        recorded[key.rpartition(":")[2]] = len(admitted)
    assert recorded == streamed
    return recorded


def _each_is_somewhere(client: Any, entries: dict[str, Any]) -> Counter[str]:
    """Assert that each entry is in exactly one place for the handler that dead-letters all."""
    stream = KEYS.transitions(0)
    groups = {one["name"]: one for one in client.xinfo_groups(stream)} if entries else {}
    if BURIES not in groups:
        assert not client.exists(KEYS.dead_letters(0, BURIES))
        return Counter()
    last_read = _order(groups[BURIES]["last-delivered-id"])
    pending = {one["message_id"] for one in client.xpending_range(stream, BURIES, "-", "+", 1000)}
    places = [
        ("unread" if _order(entry_id) > last_read else "pending", _named(fields))
        for entry_id, fields in entries.items()
        if entry_id in pending or _order(entry_id) > last_read
    ]
    places += [("dead", _named(one)) for _, one in client.xrange(KEYS.dead_letters(0, BURIES))]
    places += [("replayed", _named(one)) for _, one in client.xrange(KEYS.replays(0, BURIES))]
    assert Counter(name for _, name in places) == Counter(map(_named, entries.values()))
    return Counter(place for place, _ in places)


def _session(fields: dict[str, str]) -> str:
    return str(orjson.loads(fields["change"])["session_id"])


def _named(fields: dict[str, str]) -> tuple[str, str]:
    return _session(fields), fields["sequence"]


def _order(entry_id: str) -> tuple[int, ...]:
    return tuple(map(int, entry_id.split("-")))
