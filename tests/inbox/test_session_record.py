"""Reading a session's record, and its transitions."""

from __future__ import annotations

import time

import msgspec
import pytest

from service.config import DAY_S, Settings
from service.inbox import session_record
from service.inbox.admission import Inbox
from service.storage.connections import Connections
from service.storage.layout import Keys
from service.transitions.transition import make_change
from tests.support.admissions import CREATED, NOW, PROCESSING, SESSION_ID, VERIFIED, make_event


async def test_an_unknown_session_is_none(connections: Connections, keys: Keys) -> None:
    """A session without a record is None, and reading it leaves no trace."""
    assert await session_record.read(connections, keys, "vs_unknown") is None
    assert not await connections.client.exists(keys.session("vs_unknown"))


@pytest.mark.parametrize(
    "spoiled",
    [{"state": "was better"}, {"status": "verified"}, {"evt_1": "?"}, {"duplicates": "many"}],
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
    """A record has its status, numbers and every remembered event, oldest first."""
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
            session_record.KnownEvent(CREATED.id, "late", 1, NOW),
            session_record.KnownEvent(PROCESSING.id, "admitted", 1, NOW + 10),
            session_record.KnownEvent(VERIFIED.id, "admitted", 2, NOW + 40),
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
    assert record.events == [
        session_record.KnownEvent(PROCESSING.id, "admitted", 1, NOW + 10),
        session_record.KnownEvent("read:evt_thin_1", "admitted", 2, NOW + 40),
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


async def test_transitions_are_found_soon_after_their_events(
    connections: Connections, keys: Keys, settings: Settings
) -> None:
    """The transition of each admitted event is found in the stream, among those of others."""
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
    await connections.client.xadd(stream, {"nothing": "ours"})
    assert await session_record.find_transitions(connections, keys, record) == {}


async def test_few_entries_are_read_for_each_event(
    connections: Connections, keys: Keys, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each event no more entries are read than the bound."""
    inbox = Inbox(connections, keys, settings)
    stream = keys.transitions(keys.partition(SESSION_ID))
    monkeypatch.setattr(session_record, "MAX_ENTRIES_PER_EVENT", 3)
    for n in range(3):
        await connections.client.xadd(stream, {"n": n})
    await inbox.admit(PROCESSING, make_change(PROCESSING))
    record = await session_record.read(connections, keys, SESSION_ID)
    assert record is not None
    assert await session_record.find_transitions(connections, keys, record) == {}
    monkeypatch.setattr(session_record, "MAX_ENTRIES_PER_EVENT", 4)
    assert {*await session_record.find_transitions(connections, keys, record)} == {PROCESSING.id}
