"""Sessions are found by event ids and client references, a bounded piece of history at a time."""

from __future__ import annotations

import pytest

from service.config import Settings
from service.inbox.admission import Inbox
from service.monitoring import session_search
from service.monitoring.session_search import Found, search
from service.storage.connections import Connections
from service.storage.keys import Keys
from tests.support.admissions import InspectedInbox, make_event


@pytest.fixture
def inbox(connections: Connections, settings: Settings, keys: Keys) -> InspectedInbox:
    """Return an inbox of the deployment that is searched."""
    return InspectedInbox(Inbox(connections, keys, settings), connections.client, keys)


async def all_found(connections: Connections, keys: Keys, text: str) -> list[Found]:
    """Return what each search finds until all was searched."""
    found = [await search(connections, keys, text)]
    while found[-1].goes_on_at:
        found.append(await search(connections, keys, text, found[-1].goes_on_at))
    return found


@pytest.mark.parametrize(
    "reference", ["user-7", 'say "hi" \\ back', "überprüft 🙂", "[%w].*-", "x" * 255], ids=ascii
)
async def test_sessions_are_found_by_event_and_reference(
    reference: str, connections: Connections, keys: Keys, inbox: InspectedInbox
) -> None:
    """The whole text must match, whatever characters it has; the newest session is first."""
    await inbox.admit(
        make_event(session="vs_1", client_reference_id=reference),
        make_event(session="vs_2", client_reference_id=reference + "0"),
        make_event(session="vs_3", client_reference_id=reference),
        make_event("verified", "verified", id="evt_4", session="vs_1", at=9),
    )

    found = await search(connections, keys, reference)
    assert found == Found(("vs_3", "vs_1"), None, 4)
    assert (await search(connections, keys, "evt_4")).session_ids == ("vs_1",)
    assert (await search(connections, keys, reference[:-1] or "-")).session_ids == ()


async def test_other_texts_of_a_change_do_not_match(
    connections: Connections, keys: Keys, inbox: InspectedInbox
) -> None:
    """Metadata may have the names of our fields, and entries that are not ours are skipped."""
    looks_like = {"event_id": "evt_x", "client_reference_id": "evt_x", "k": '"event_id":"evt_x"'}
    await inbox.admit(make_event("verified", "verified", metadata=looks_like))
    stream = keys.transitions(0)
    await connections.client.xadd(stream, {"change": '{"event_id":"evt_x"'})
    await connections.client.xadd(stream, {"nothing": "ours"})

    assert await search(connections, keys, "evt_x") == Found((), None, 3)
    assert (await search(connections, keys, "verified")).session_ids == ()


async def test_history_is_searched_piece_by_piece(
    connections: Connections, keys: Keys, inbox: InspectedInbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search looks at few entries of each partition, and returns few; the next one goes on."""
    monkeypatch.setattr(session_search, "MAX_SEARCHED", 3)
    monkeypatch.setattr(session_search, "MAX_FOUND", 2)
    for n in range(40):
        await inbox.admit(make_event(session=f"vs_{n}", client_reference_id="shared" * (n % 2)))

    pieces = await all_found(connections, keys, "shared")
    assert len(pieces) > 2
    ids = [session_id for piece in pieces for session_id in piece.session_ids]
    assert sorted(ids) == sorted(f"vs_{n}" for n in range(1, 40, 2))
    assert sum(piece.searched for piece in pieces) == 40
    assert all(piece.searched <= 3 * keys.partitions for piece in pieces)
    nothing = await all_found(connections, keys, "nothing")
    assert {piece.session_ids for piece in nothing} == {()}
    assert sum(piece.searched for piece in nothing) == 40


@pytest.mark.parametrize("text", ["", "x" * 256, "a\nb", "\x00", "a\ud800"], ids=ascii)
async def test_strange_texts_are_refused(text: str, connections: Connections, keys: Keys) -> None:
    """A text is up to 255 printable characters."""
    with pytest.raises(ValueError, match="text"):
        await search(connections, keys, text)


@pytest.mark.parametrize(
    "cursor",
    ["1-1", "+", ",,,,,,,x", "1-1," * 8, "(1-1,,,,,,,", "9" * 20 + "-1,,,,,,,", "٣-1,,,,,,,"],
)
async def test_strange_cursors_are_refused(
    cursor: str, connections: Connections, keys: Keys
) -> None:
    """A cursor has a place for each partition, or none."""
    with pytest.raises(ValueError, match="cursor"):
        await search(connections, keys, "evt_1", cursor)
