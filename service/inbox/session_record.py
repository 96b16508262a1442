"""The record of one session, read from Redis. `admit.lua` writes it, and describes its form."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

from ..storage.connections import Connections
from ..storage.layout import Keys
from ..transitions import stream_entry
from ..transitions.ordering import created_at
from ..transitions.transition import StatusTransition

MAX_LOOKUPS = 50
MAX_ENTRIES_PER_EVENT = 1000
# By how much Redis's clock may be behind Stripe's.
MAX_CLOCK_LAG_S = 300

# The second is that of a session that was read itself: see `admit.lua`.
_EVENT_ID_PREFIXES = (b"evt_", b"read:")
_OUTCOMES = {"a": "admitted", "l": "late", "u": "unchanged"}


class KnownEvent(NamedTuple):
    """One event whose id is remembered, and what became of it."""

    event_id: str
    outcome: str
    sequence: int
    created: int


class SessionRecord(NamedTuple):
    """What is remembered of one session.

    Attributes:
        session_id: `vs_…`.
        status: The status now.
        previous: The status before.
        sequence: The number of transitions within *epoch*.
        epoch: When the numbering began anew, Unix milliseconds.
        latest_created: When the latest event was created, Unix seconds.
        duplicates: How many copies were answered as duplicates.
        expires_in_s: Seconds until the record expires, if no further event arrives.
        events: The events that are remembered, oldest first.
    """

    session_id: str
    status: str
    previous: str | None
    sequence: int
    epoch: int
    latest_created: int
    duplicates: int
    expires_in_s: int
    events: list[KnownEvent]


async def read(connections: Connections, keys: Keys, session_id: str) -> SessionRecord | None:
    """Return the record of a session, or None when the session is not known.

    Raises:
        RedisError: Redis did not answer.
        ValueError: What the key holds is not one of our records.
    """
    key = keys.session(session_id)
    found = await connections.client.hgetall(key)
    if not found:
        return None
    expires_in_s = await connections.client.ttl(key)
    with suppress(KeyError, ValueError):
        return _record(session_id, found, expires_in_s)
    raise ValueError("unreadable")


# By the ids of their events.
Transitions = Mapping[str, StatusTransition]


async def find_transitions(
    connections: Connections, keys: Keys, record: SessionRecord
) -> Transitions:
    """Return the transitions of a record's events that the streams still hold.

    An entry is looked up soon after its event was created. One that was appended much later,
    because Stripe had to send the event again, is not found.

    Raises:
        RedisError: Redis did not answer.
    """
    stream = keys.transitions(keys.partition(record.session_id))
    found: dict[str, StatusTransition] = {}
    for event in [one for one in record.events if one.outcome == "admitted"][-MAX_LOOKUPS:]:
        if event.event_id not in found:
            first = str(max(0, event.created - MAX_CLOCK_LAG_S) * 1000)
            entries = await connections.client.xrange(stream, first, count=MAX_ENTRIES_PER_EVENT)
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
    sequence, epoch, _server, _hash, _kind = found[b"state"].split(b" ")
    _kind, order_key, _event_id = found[b"latest"].split(b" ")
    length, words = found[b"status"].split(b" ", 1)
    events = [
        KnownEvent(field.decode(), _OUTCOMES[letter], int(number), int(created))
        for field, value in found.items()
        if field.startswith(_EVENT_ID_PREFIXES)
        for letter, number, created, _nonce in [value.decode().split(" ", 3)]
    ]
    return SessionRecord(
        session_id=session_id,
        status=words[: int(length)].decode(),
        previous=words[int(length) :].decode() or None,
        sequence=int(sequence),
        epoch=int(epoch),
        latest_created=created_at(int(order_key)),
        duplicates=int(found.get(b"duplicates", 0)),
        expires_in_s=expires_in_s,
        events=sorted(events, key=lambda event: (event.created, event.sequence)),
    )
