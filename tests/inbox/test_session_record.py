"""Reading a session's record, and its transitions."""

from __future__ import annotations

import time

import msgspec
import pytest

from service.config import DAY_S, Settings
from service.inbox import session_record
from service.inbox.admission import Inbox
from service.storage.connections import Connections
from service.storage.keys import Keys
from service.stripe.events import Event
from service.transitions.transition import make_change
from tests.support.admissions import CREATED, NOW, PROCESSING, SESSION_ID, VERIFIED, make_event

PARTITION = Keys("idv", 8).partition(SESSION_ID)


def known_event(
    event: Event, outcome: str, sequence: int, arrived: str | int
) -> session_record.KnownEvent:
    """Return an event as a record has it; *arrived* is an entry's id, or Unix milliseconds."""
    return session_record.KnownEvent(
        event.id,
        outcome,
        sequence,
        created=event.created,
        arrived_ms=int(str(arrived).partition("-")[0]),
        entry_id=arrived if isinstance(arrived, str) else None,
    )


async def test_an_unknown_session_is_none(connections: Connections, keys: Keys) -> None:
    """A session without a record is None, and reading it leaves no trace."""
    assert await session_record.read(connections, keys, "vs_unknown") is None
    assert not await connections.client.exists(keys.session("vs_unknown"))


@pytest.mark.parametrize(
    "spoiled",
    [
        {"state": "was better"},
        {"status": "verified"},
        {"evt_1": "?"},
        {"evt_1": "a 1 1 n soon"},
        {"duplicates": "many"},
    ],
    ids=str,
)
async def test_a_broken_record_is_unreadable(
    spoiled: dict[str, str], connections: Connections, keys: Keys, settings: Settings
) -> None:
    """A record that an operator broke is reported without quoting it."""
    await Inbox(connections, keys, settings).admit(CREATED, make_change(CREATED))
    await connections.client.hset(keys.session(SESSION_ID), mapping=spoiled)
    with pytest.raises(ValueError, match=r"^unreadable$"):
        await session_record.read(connections, keys, SESSION_ID)


async def test_a_record_has_status_numbers_and_events(
    connections: Connections, keys: Keys, settings: Settings
) -> None:
    """A record has its status, numbers and every remembered event, in the order of arrival."""
    inbox = Inbox(connections, keys, settings)
    await inbox.admit(PROCESSING, make_change(PROCESSING))
    first = await session_record.read(connections, keys, SESSION_ID)
    assert first is not None
    assert (first.status, first.previous, first.duplicates) == ("processing", None, 0)
    for event in (CREATED, VERIFIED, VERIFIED):
        await inbox.admit(event, make_change(event))
    record = await session_record.read(connections, keys, SESSION_ID)

    assert record is not None
    assert record.epoch / 1000 == pytest.approx(time.time(), abs=60)
    entries = [
        one.decode() for one, _ in await connections.client.xrange(keys.transitions(PARTITION))
    ]
    assert [event.arrived_ms / 1000 for event in record.events] == [
        pytest.approx(time.time(), abs=60)
    ] * 3
    assert 399 * DAY_S < record.expires_in_s <= 400 * DAY_S
    assert record == session_record.SessionRecord(
        session_id=SESSION_ID,
        status="verified",
        previous="processing",
        sequence=2,
        epoch=record.epoch,
        latest_created=NOW + 40,
        duplicates=1,
        expires_in_s=record.expires_in_s,
        events=[
            known_event(PROCESSING, "admitted", 1, entries[0]),
            known_event(CREATED, "late", 1, record.events[1].arrived_ms),
            known_event(VERIFIED, "admitted", 2, entries[1]),
        ],
    )


async def test_ids_of_sessions_that_were_read_are_shown(
    connections: Connections, keys: Keys, settings: Settings
) -> None:
    """A session that was read itself has a remembered id like an event, and a transition."""
    inbox = Inbox(connections, keys, settings)
    read = msgspec.structs.replace(VERIFIED, id="read:evt_thin_1")
    for event in (PROCESSING, read, read):
        await inbox.admit(event, make_change(event))
    record = await session_record.read(connections, keys, SESSION_ID)

    assert record is not None
    assert [(event.event_id, event.outcome) for event in record.events] == [
        (PROCESSING.id, "admitted"),
        ("read:evt_thin_1", "admitted"),
    ]
    assert record.duplicates == 1
    assert "read:evt_thin_1" in await session_record.find_transitions(connections, keys, record)


async def test_statuses_may_hold_any_letters(
    connections: Connections, keys: Keys, settings: Settings
) -> None:
    """A status and the one before it are separated by length, whatever they hold."""
    inbox = Inbox(connections, keys, settings)
    for step, status in (("created", "überprüft 7 "), ("processing", "à revoir")):
        event = make_event(step, status, at=0 if step == "created" else 10)
        await inbox.admit(event, make_change(event))
    record = await session_record.read(connections, keys, SESSION_ID)

    assert record is not None
    assert (record.status, record.previous) == ("à revoir", "überprüft 7 ")


async def test_transitions_are_found_by_the_ids_of_their_entries(
    connections: Connections, keys: Keys, settings: Settings
) -> None:
    """The transition of each admitted event is found among those of others, as long as it is kept.

    Also one that was appended long after its event was created.
    """
    inbox = Inbox(connections, keys, settings)
    others = [
        make_event(session=name, id=f"evt_{name}")
        for n in range(100)
        if keys.partition(name := f"vs_{n}") == keys.partition(SESSION_ID)
    ]
    for event in (PROCESSING, CREATED, *others, VERIFIED):
        await inbox.admit(event, make_change(event))
    record = await session_record.read(connections, keys, SESSION_ID)
    assert record is not None

    found = await session_record.find_transitions(connections, keys, record)
    assert {name: (one.previous, one.current) for name, one in found.items()} == {
        PROCESSING.id: (None, "processing"),
        VERIFIED.id: ("processing", "verified"),
    }
    # Trimmed entries are gone, and unreadable ones are skipped.
    stream = keys.transitions(keys.partition(SESSION_ID))
    await connections.client.xtrim(stream, maxlen=0)
    assert await session_record.find_transitions(connections, keys, record) == {}
    entry_id = str(record.events[-1].entry_id)
    await connections.client.delete(stream)
    await connections.client.xadd(stream, {"nothing": "ours"}, id=entry_id)
    assert await session_record.find_transitions(connections, keys, record) == {}


async def test_only_the_latest_transitions_are_looked_up(
    connections: Connections, keys: Keys, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more transitions are looked up than the bound, the latest ones."""
    monkeypatch.setattr(session_record, "MAX_LOOKUPS", 1)
    inbox = Inbox(connections, keys, settings)
    for event in (PROCESSING, VERIFIED):
        await inbox.admit(event, make_change(event))
    record = await session_record.read(connections, keys, SESSION_ID)
    assert record is not None
    assert {*await session_record.find_transitions(connections, keys, record)} == {VERIFIED.id}


async def test_a_session_without_transitions_has_none(
    connections: Connections, keys: Keys, settings: Settings
) -> None:
    """Where the ids of all admitted events were forgotten, nothing is looked up."""
    inbox = Inbox(connections, keys, settings)
    await inbox.admit(PROCESSING, make_change(PROCESSING))
    await connections.client.hdel(keys.session(SESSION_ID), PROCESSING.id)
    record = await session_record.read(connections, keys, SESSION_ID)
    assert record is not None
    assert await session_record.find_transitions(connections, keys, record) == {}
