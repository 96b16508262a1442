"""Sessions, found by an event id or by your own reference.

Both stand in the transitions that the streams still hold. One search looks at the newest 1,000
of each partition, within Redis, and says where to go on. The calls are made one partition after the
other, so that Redis serves others between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec

from ..storage.connections import Connections
from ..storage.keys import Keys
from ..storage.scripts import Script
from ..transitions import stream_entry
from ..transitions.transition import StatusTransition

MAX_TEXT = 255
MAX_SEARCHED = 1000
# Of one partition; then the next search goes on there. One reference may belong to many sessions.
MAX_FOUND = 50
# By which field of a change a session is found.
_FIELDS = ("event_id", "client_reference_id")

_FIND_SESSIONS = Script(__package__, "find_sessions.lua")
# Where to go on in each partition: an entry's id, or nothing where the stream has ended.
_CURSOR = re.compile(r"(?:\d{1,15}-\d{1,19})?(?:,(?:\d{1,15}-\d{1,19})?)*", re.ASCII)
_NEWEST = "+"


class Found(NamedTuple):
    """What one search has found.

    Attributes:
        session_ids: The sessions, the one with the newest transition first.
        goes_on_at: Where to search on, further back; None if all was searched.
        searched: How many transitions were looked at.
    """

    session_ids: tuple[str, ...]
    goes_on_at: str | None
    searched: int


async def search(connections: Connections, keys: Keys, text: str, cursor: str = "") -> Found:
    """Return the sessions of which a transition has *text* as event id or client reference.

    Args:
        connections: Open clients.
        keys: The layout.
        text: The whole id or reference, up to 255 printable characters.
        cursor: Where an earlier search said that it goes on; empty to begin with the newest.

    Raises:
        RedisError: Redis did not answer.
        ValueError: The text is empty, too long or not printable, or the cursor is not one of ours.
    """
    if not (0 < len(text) <= MAX_TEXT and text.isprintable()):
        raise ValueError("not a text to search for")
    # As `stream_entry.pack` writes them. Metadata may look like them, so what is found is decoded.
    encoded = msgspec.json.encode(text)
    markers = [f'"{field}":'.encode() + encoded for field in _FIELDS]
    searched, goes_on_at = 0, []
    found: dict[str, tuple[int, ...]] = {}
    for partition, start in enumerate(_starts(keys, cursor)):
        last, count, entries = b"", 0, []
        if start:
            last, count, entries = await connections.run_one(
                _FIND_SESSIONS,
                [keys.transitions(partition)],
                [start, MAX_SEARCHED, MAX_FOUND, *markers],
            )
        goes_on_at.append(last.decode())
        searched += count
        for entry_id, transition in _matching(text, entries):
            number = tuple(map(int, entry_id.split(b"-")))
            found[transition.session_id] = max(number, found.get(transition.session_id, number))
    newest_first = sorted(found, key=lambda session_id: found[session_id], reverse=True)
    return Found(tuple(newest_first), ",".join(goes_on_at) if any(goes_on_at) else None, searched)


def _starts(keys: Keys, cursor: str) -> Sequence[str]:
    """Return from where each partition is searched back; empty where it was searched to its end."""
    if not cursor:
        return [_NEWEST] * keys.partitions
    places = cursor.split(",")
    if len(places) != keys.partitions or not _CURSOR.fullmatch(cursor):
        raise ValueError("not a cursor of ours")
    return [f"({place}" if place else "" for place in places]


def _matching(text: str, entries: Iterable[Any]) -> Iterable[tuple[bytes, StatusTransition]]:
    for entry_id, values in entries:
        with suppress(ValueError):
            transition = stream_entry.unpack(dict(zip(values[::2], values[1::2], strict=True)))
            if text in (transition.event_id, transition.client_reference_id):
                yield entry_id, transition
