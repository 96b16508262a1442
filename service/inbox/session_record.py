"""The record of one session, read from Redis. `admit.lua` writes it, and describes its form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from ..storage.connections import Connections
from ..storage.keys import Keys
from ..storage.scripts import Script
from ..transitions import stream_entry
from ..transitions.ordering import created_at
from ..transitions.transition import StatusTransition

MAX_LOOKUPS = 50

_FIND_ENTRIES = Script(__package__, "find_entries.lua")
# The second is that of a session that was read itself: see `admit.lua`.
_EVENT_ID_PREFIXES = (b"evt_", b"read:")
_ADMITTED = "a"
# Times that can be shown: up to the years 5138 and 2286.
_CREATED = re.compile(r"[0-9]{1,11}")
_ARRIVED_MS = re.compile(r"[0-9]{1,13}")
_ENTRY_ID = re.compile(r"[0-9]{1,13}-[0-9]{1,19}")
_OUTCOMES = {_ADMITTED: "admitted", "l": "late", "u": "unchanged"}


class KnownEvent(NamedTuple):
    """One event whose id is remembered, and what became of it.

    Attributes:
        event_id: Stripe's event id.
        outcome: `admitted`, `late` or `unchanged`.
        sequence: The session's sequence number after it.
        created: When Stripe created it, Unix seconds.
        arrived_ms: When it was judged, Unix milliseconds by Redis's clock.
        entry_id: The id of its transition in the partition's stream; None if it made none.
    """

    event_id: str
    outcome: str
    sequence: int
    created: int
    arrived_ms: int
    entry_id: str | None


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
        events: The events that are remembered, in the order of their arrival.
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

    @property
    def latest_admitted(self) -> list[KnownEvent]:
        """The latest events that made a transition: so many as are ever looked up."""
        return [event for event in self.events if event.entry_id][-MAX_LOOKUPS:]


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
    """Return the transitions of a record's latest events, as far as the stream still holds them.

    Raises:
        RedisError: Redis did not answer.
    """
    admitted = record.latest_admitted
    stream = keys.transitions(keys.partition(record.session_id))
    entries = await connections.run_one(
        _FIND_ENTRIES, [stream], [str(event.entry_id) for event in admitted]
    )
    found = zip(admitted, map(_transition, entries), strict=True)
    return {event.event_id: transition for event, transition in found if transition}


def _transition(fields: Sequence[bytes] | None) -> StatusTransition | None:
    if not fields:
        return None
    with suppress(ValueError):
        return stream_entry.unpack(dict(zip(fields[::2], fields[1::2], strict=True)))
    return None


def known_event(field: bytes, value: bytes) -> KnownEvent:
    """Return what one field of a record says of one event.

    Raises:
        KeyError, ValueError: It is not one of ours.
    """
    letter, sequence, created, _nonce, arrived = value.decode().split(" ")
    is_admitted = letter == _ADMITTED
    form = _ENTRY_ID if is_admitted else _ARRIVED_MS
    if not form.fullmatch(arrived) or not _CREATED.fullmatch(created):
        raise ValueError("not an arrival")
    return KnownEvent(
        field.decode(),
        outcome=_OUTCOMES[letter],
        sequence=int(sequence),
        created=int(created),
        arrived_ms=int(arrived.partition("-")[0]),
        entry_id=arrived if is_admitted else None,
    )


def _arrival(event: KnownEvent) -> tuple[int, int, bool]:
    """Return what orders events by their arrival, also those of one millisecond."""
    return event.arrived_ms, event.sequence, event.entry_id is None


def _record(session_id: str, found: Mapping[bytes, bytes], expires_in_s: int) -> SessionRecord:
    sequence, epoch, _server, _hash, _kind = found[b"state"].split(b" ")
    _kind, order_key, _event_id = found[b"latest"].split(b" ")
    if not _ARRIVED_MS.fullmatch(epoch.decode()):
        raise ValueError("not an epoch")
    length, words = found[b"status"].split(b" ", 1)
    events = [
        known_event(field, value)
        for field, value in found.items()
        if field.startswith(_EVENT_ID_PREFIXES)
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
        events=sorted(events, key=_arrival),
    )
