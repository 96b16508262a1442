"""Redis, looked at: what the ledger knows of one session. Reads only; `inbox` writes.

The form of the hash is described in `lua/admit.lua`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

from ..storage.connections import Connections
from ..storage.layout import Keys
from ..transitions import stream_entry
from ..transitions.lifecycle import created_at
from ..transitions.transition import StatusTransition

# Of a session's events, and of the stream at the time of each.
MAX_LOOKED_FOR = 50
MAX_ENTRIES_LOOKED_AT = 1000
# By how much Redis's clock may be behind Stripe's.
MAX_AHEAD_S = 300

_OUTCOMES = {"a": "admitted", "l": "late", "u": "unchanged"}


class RememberedEvent(NamedTuple):
    """One event id the ledger remembers, and what was said to it."""

    event_id: str
    outcome: str
    sequence: int
    created: int


class SessionRecord(NamedTuple):
    """What the ledger knows of one session.

    Attributes:
        session_id: `vs_…`.
        status: The status now.
        previous: The status before.
        sequence: The number of transitions within *epoch*.
        epoch: When the numbering began anew, Unix milliseconds.
        latest_created: When the latest event was created, Unix seconds.
        duplicates: Copies answered as duplicates.
        expires_in_s: Seconds until the record is forgotten, if nothing comes.
        events: The events remembered, oldest first.
    """

    session_id: str
    status: str
    previous: str | None
    sequence: int
    epoch: int
    latest_created: int
    duplicates: int
    expires_in_s: int
    events: list[RememberedEvent]


async def read(connections: Connections, keys: Keys, session_id: str) -> SessionRecord | None:
    """Return the record of a session, or None when the ledger has no memory of it.

    Raises:
        RedisError: Redis did not answer.
        ValueError: What stands there is not one of our records.
    """
    key = keys.session(session_id)
    found = await connections.client.hgetall(key)
    if not found:
        return None
    expires_in_s = await connections.client.ttl(key)
    with suppress(KeyError, ValueError):
        return _record(session_id, found, expires_in_s)
    raise ValueError("unreadable")


# What became of events, by their ids.
Changes = Mapping[str, StatusTransition]


async def changes(connections: Connections, keys: Keys, record: SessionRecord) -> Changes:
    """Return the transitions of a record's events that the streams still hold.

    An entry is looked for where it should be: soon after its event was created. One that came much
    later, because Stripe had to send it again, is not found.

    Raises:
        RedisError: Redis did not answer.
    """
    stream = keys.transitions(keys.partition(record.session_id))
    found: dict[str, StatusTransition] = {}
    for event in [one for one in record.events if one.outcome == "admitted"][-MAX_LOOKED_FOR:]:
        if event.event_id not in found:
            first = str(max(0, event.created - MAX_AHEAD_S) * 1000)
            entries = await connections.client.xrange(stream, first, count=MAX_ENTRIES_LOOKED_AT)
            found |= {
                transition.event_id: transition
                for _, fields in entries
                if (transition := _transition(fields))
                and transition.session_id == record.session_id
            }
    return found


def _transition(fields: Mapping[bytes, bytes]) -> StatusTransition | None:
    with suppress(ValueError):
        return stream_entry.unpack(fields)
    return None


def _record(session_id: str, found: Mapping[bytes, bytes], expires_in_s: int) -> SessionRecord:
    sequence, epoch, _, _, _ = found[b"state"].split(b" ")
    _, latest, _ = found[b"latest"].split(b" ")
    length, words = found[b"status"].split(b" ", 1)
    events = [
        RememberedEvent(name.decode(), _OUTCOMES[outcome], int(number), int(created))
        for name, value in found.items()
        if name.startswith(b"evt_")
        for outcome, number, created, _ in [value.decode().split(" ", 3)]
    ]
    return SessionRecord(
        session_id=session_id,
        status=words[: int(length)].decode(),
        previous=words[int(length) :].decode() or None,
        sequence=int(sequence),
        epoch=int(epoch),
        latest_created=created_at(int(latest)),
        duplicates=int(found.get(b"duplicates", 0)),
        expires_in_s=expires_in_s,
        events=sorted(events, key=lambda event: (event.created, event.sequence)),
    )
