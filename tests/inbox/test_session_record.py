"""Reading a session's record, and its transitions."""

from __future__ import annotations

import time

import msgspec
import pytest

from service.config import DAY_S
from service.inbox import session_record
from service.storage.keys import Keys
from service.stripe.events import Event
from tests.support.admissions import (
    CREATED,
    NOW,
    PROCESSING,
    SESSION_ID,
    VERIFIED,
    InspectedInbox,
    make_event,
)

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


async def read(inbox: InspectedInbox) -> session_record.SessionRecord:
    """Return the record of the session that the tests are about."""
    record = await session_record.read(inbox.connections, inbox.keys, SESSION_ID)
    assert record is not None
    return record


async def find_transitions(
    inbox: InspectedInbox, record: session_record.SessionRecord
) -> session_record.Transitions:
    """Return the transitions of a record's events by the ids of these."""
    return await session_record.find_transitions(inbox.connections, inbox.keys, record)


async def test_an_unknown_session_is_none(inbox: InspectedInbox) -> None:
    """A session without a record is None, and reading it leaves no trace."""
    assert await session_record.read(inbox.connections, inbox.keys, "vs_unknown") is None
    assert not await inbox.client.exists(inbox.keys.session("vs_unknown"))


@pytest.mark.parametrize(
    "spoiled",
    [
        {"state": "was better"},
        {"state": "1 99999999999999 01234567 0123456789abcdef s"},
        {"status": "verified"},
        {"evt_1": "?"},
        {"evt_1": "a 1 1 n soon"},
        {"duplicates": "many"},
    ],
    ids=str,
)
async def test_a_broken_record_is_unreadable(
    spoiled: dict[str, str], inbox: InspectedInbox
) -> None:
    """A record that an operator broke is reported without quoting it."""
    await inbox.admit(CREATED)
    await inbox.client.hset(inbox.keys.session(SESSION_ID), mapping=spoiled)
    with pytest.raises(ValueError, match=r"^unreadable$"):
        await session_record.read(inbox.connections, inbox.keys, SESSION_ID)


async def test_a_record_has_status_numbers_and_events(inbox: InspectedInbox) -> None:
    """A record has its status, numbers and every remembered event, in the order of arrival."""
    await inbox.admit(PROCESSING)
    first = await read(inbox)
    assert (first.status, first.previous, first.duplicates) == ("processing", None, 0)
    await inbox.admit(CREATED, VERIFIED, VERIFIED)
    record = await read(inbox)

    assert record.epoch / 1000 == pytest.approx(time.time(), abs=60)
    entries = [
        one.decode() for one, _ in await inbox.client.xrange(inbox.keys.transitions(PARTITION))
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


async def test_ids_of_sessions_that_were_read_are_shown(inbox: InspectedInbox) -> None:
    """A session that was read itself has a remembered id like an event, and a transition."""
    again = msgspec.structs.replace(VERIFIED, id="read:evt_thin_1")
    await inbox.admit(PROCESSING, again, again)
    record = await read(inbox)

    assert [(event.event_id, event.outcome) for event in record.events] == [
        (PROCESSING.id, "admitted"),
        ("read:evt_thin_1", "admitted"),
    ]
    assert record.duplicates == 1
    assert "read:evt_thin_1" in await find_transitions(inbox, record)


async def test_statuses_may_hold_any_letters(inbox: InspectedInbox) -> None:
    """A status and the one before it are separated by length, whatever they hold."""
    await inbox.admit(
        make_event("created", "überprüft 7 "), make_event("processing", "à revoir", at=10)
    )
    record = await read(inbox)

    assert (record.status, record.previous) == ("à revoir", "überprüft 7 ")


async def test_transitions_are_found_by_the_ids_of_their_entries(inbox: InspectedInbox) -> None:
    """The transition of each admitted event is found among those of others, as long as it is kept.

    Also one that was appended long after its event was created.
    """
    others = [
        make_event(session=name, id=f"evt_{name}")
        for n in range(100)
        if inbox.keys.partition(name := f"vs_{n}") == PARTITION
    ]
    await inbox.admit(PROCESSING, CREATED, *others, VERIFIED)
    record = await read(inbox)

    found = await find_transitions(inbox, record)
    assert {name: (one.previous, one.current) for name, one in found.items()} == {
        PROCESSING.id: (None, "processing"),
        VERIFIED.id: ("processing", "verified"),
    }
    # Trimmed entries are gone, and unreadable ones are skipped.
    stream = inbox.keys.transitions(PARTITION)
    await inbox.client.xtrim(stream, maxlen=0)
    assert await find_transitions(inbox, record) == {}
    entry_id = str(record.events[-1].entry_id)
    await inbox.client.delete(stream)
    await inbox.client.xadd(stream, {"nothing": "ours"}, id=entry_id)
    assert await find_transitions(inbox, record) == {}


async def test_only_the_latest_transitions_are_looked_up(
    inbox: InspectedInbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more transitions are looked up than the bound, the latest ones."""
    monkeypatch.setattr(session_record, "MAX_LOOKUPS", 1)
    await inbox.admit(PROCESSING, VERIFIED)
    record = await read(inbox)
    assert {*await find_transitions(inbox, record)} == {VERIFIED.id}


async def test_a_session_without_transitions_has_none(inbox: InspectedInbox) -> None:
    """Where the ids of all admitted events were forgotten, nothing is looked up."""
    await inbox.admit(PROCESSING)
    await inbox.client.hdel(inbox.keys.session(SESSION_ID), PROCESSING.id)
    record = await read(inbox)
    assert await find_transitions(inbox, record) == {}
