"""Laws of looking at the ledger."""

from __future__ import annotations

import time

import pytest

from service.config import DAY_S, Settings
from service.inbox import session_record
from service.inbox.admission import Inbox
from service.storage.connections import Connections
from service.storage.layout import Keys
from service.transitions.transition import make_change
from tests.inbox.test_admission import CREATED, NOW, PROCESSING, SESSION_ID, VERIFIED, make_event


async def test_an_unknown_session_is_none(connections: Connections, keys: Keys) -> None:
    """Without a record there is nothing to tell, and looking leaves no trace."""
    assert await session_record.read(connections, keys, "vs_unknown") is None
    assert not await connections.client.exists(keys.session("vs_unknown"))


@pytest.mark.parametrize(
    "spoiled",
    [{"state": "was better"}, {"status": "verified"}, {"evt_1": "?"}, {"duplicates": "many"}],
    ids=str,
)
async def test_what_an_operator_made_of_a_record_is_no_record(
    spoiled: dict[str, str], connections: Connections, keys: Keys, settings: Settings
) -> None:
    """A record that cannot be read is said to be none of ours, and nothing of it is told."""
    await Inbox(connections, keys, settings).admit(CREATED, make_change(CREATED))
    await connections.client.hset(keys.session(SESSION_ID), mapping=spoiled)
    with pytest.raises(ValueError, match=r"^unreadable$"):
        await session_record.read(connections, keys, SESSION_ID)


async def test_a_record_tells_its_story(
    connections: Connections, keys: Keys, settings: Settings
) -> None:
    """Status, numbers and every remembered event are told, oldest event first."""
    inbox = Inbox(connections, keys, settings)
    for event in (PROCESSING, CREATED, VERIFIED, VERIFIED):
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


async def test_words_of_any_letters_are_told_whole(
    connections: Connections, keys: Keys, settings: Settings
) -> None:
    """Where one status ends and the one before it begins is no matter of what is in them."""
    inbox = Inbox(connections, keys, settings)
    for step, status in (("created", "überprüft 7 "), ("processing", "à revoir")):
        event = make_event(step, status, at=0 if step == "created" else 10)
        await inbox.admit(event, make_change(event))
    record = await session_record.read(connections, keys, SESSION_ID)

    assert record is not None
    assert (record.status, record.previous) == ("à revoir", "überprüft 7 ")


async def test_a_first_status_has_no_previous(
    connections: Connections, keys: Keys, settings: Settings
) -> None:
    """After one event there is a status and none before it."""
    await Inbox(connections, keys, settings).admit(CREATED, make_change(CREATED))
    record = await session_record.read(connections, keys, SESSION_ID)

    assert record is not None
    assert (record.status, record.previous, record.duplicates) == ("requires_input", None, 0)


async def test_changes_are_found_where_they_should_be(
    connections: Connections, keys: Keys, settings: Settings
) -> None:
    """Of each admitted event the transition is found in the stream, among those of others."""
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

    found = await session_record.changes(connections, keys, record)
    assert {name: (one.previous, one.current) for name, one in found.items()} == {
        PROCESSING.id: (None, "processing"),
        VERIFIED.id: ("processing", "verified"),
    }
    # What is trimmed is not there, and what cannot be read is passed over.
    stream = keys.transitions(keys.partition(SESSION_ID))
    await connections.client.xtrim(stream, maxlen=0)
    await connections.client.xadd(stream, {"nothing": "ours"})
    assert await session_record.changes(connections, keys, record) == {}


async def test_looking_for_changes_has_an_end(
    connections: Connections, keys: Keys, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a stream only so much is read as a busy one takes in soon after an event."""
    inbox = Inbox(connections, keys, settings)
    stream = keys.transitions(keys.partition(SESSION_ID))
    monkeypatch.setattr(session_record, "MAX_ENTRIES_PER_EVENT", 3)
    for n in range(3):
        await connections.client.xadd(stream, {"n": n})
    await inbox.admit(PROCESSING, make_change(PROCESSING))
    record = await session_record.read(connections, keys, SESSION_ID)
    assert record is not None
    assert await session_record.changes(connections, keys, record) == {}
    monkeypatch.setattr(session_record, "MAX_ENTRIES_PER_EVENT", 4)
    assert {*await session_record.changes(connections, keys, record)} == {PROCESSING.id}
