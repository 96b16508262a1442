"""Sessions are found by event ids and client references, a bounded piece of history at a time."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from service.monitoring import session_search
from service.monitoring.session_search import Found, search
from service.storage.connections import Connections
from service.storage.keys import Keys
from service.transitions import stream_entry
from service.transitions.transition import SessionChange


async def add(
    connections: Connections,
    keys: Keys,
    session: str,
    event: str = "evt_1",
    **more: Any,
) -> None:
    """Append a transition as admission writes it."""
    change = msgspec.convert(
        {
            "event_id": event,
            "event_type": "identity.verification_session.verified",
            "occurred_at": "2026-01-01T00:00:00Z",
            "session_id": session,
            "current": "verified",
        }
        | more,
        SessionChange,
    )
    fields = {"change": stream_entry.pack(change), "previous": "", "sequence": 1, "epoch": 1}
    await connections.client.xadd(keys.transitions(keys.partition(session)), fields)


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
    reference: str, connections: Connections, keys: Keys
) -> None:
    """The whole text must match, whatever characters it has; the newest session is first."""
    await add(connections, keys, "vs_1", "evt_1", client_reference_id=reference)
    await add(connections, keys, "vs_2", "evt_2", client_reference_id=reference + "0")
    await add(connections, keys, "vs_3", "evt_3", client_reference_id=reference)
    await add(connections, keys, "vs_1", "evt_4")

    found = await search(connections, keys, reference)
    assert found == Found(("vs_3", "vs_1"), None, 4)
    assert (await search(connections, keys, "evt_4")).session_ids == ("vs_1",)
    assert (await search(connections, keys, reference[:-1] or "-")).session_ids == ()


async def test_other_texts_of_a_change_do_not_match(connections: Connections, keys: Keys) -> None:
    """Metadata may have the names of our fields, and entries that are not ours are skipped."""
    looks_like = {"event_id": "evt_x", "client_reference_id": "evt_x", "k": '"event_id":"evt_x"'}
    await add(connections, keys, "vs_1", metadata=looks_like)
    stream = keys.transitions(0)
    await connections.client.xadd(stream, {"change": '{"event_id":"evt_x"'})
    await connections.client.xadd(stream, {"nothing": "ours"})

    assert await search(connections, keys, "evt_x") == Found((), None, 3)
    assert (await search(connections, keys, "verified")).session_ids == ()


async def test_history_is_searched_piece_by_piece(
    connections: Connections, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search looks at few entries of each partition, and returns few; the next one goes on."""
    monkeypatch.setattr(session_search, "MAX_SEARCHED", 3)
    monkeypatch.setattr(session_search, "MAX_FOUND", 2)
    for n in range(40):
        await add(connections, keys, f"vs_{n}", f"evt_{n}", client_reference_id="shared" * (n % 2))

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
