"""Redis, looked at: what the ledger knows of one session. Reads only; `inbox` writes.

The form of the hash is described in `lua/admit.lua`.
"""

from __future__ import annotations

from typing import NamedTuple

from .connections import Connections
from .layout import Keys
from .transitions import created_at


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
        status: The status now; None when no event of it was ever admitted.
        previous: The status before.
        sequence: The number of transitions within *epoch*.
        epoch: When this record began, Unix milliseconds.
        latest_created: When the event that sets the position was created, Unix seconds.
        duplicates: Copies answered as duplicates.
        expires_in_s: Seconds until the record is forgotten, if nothing comes.
        events: The events remembered, oldest first.
    """

    session_id: str
    status: str | None
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
    """
    key = keys.session(session_id)
    found = await connections.client.hgetall(key)
    if not found:
        return None
    fields = {name.decode(): value.decode() for name, value in found.items()}
    events = [
        RememberedEvent(name, outcome, int(sequence), int(created))
        for name, value in fields.items()
        if name.startswith("evt_")
        for outcome, sequence, created, _ in [value.split(" ", 3)]
    ]
    return SessionRecord(
        session_id=session_id,
        status=fields.get("status"),
        previous=fields.get("previous") or None,
        sequence=int(fields.get("sequence", 0)),
        epoch=int(fields.get("epoch", 0)),
        latest_created=created_at(int(fields.get("position", 0))),
        duplicates=int(fields.get("duplicates", 0)),
        expires_in_s=await connections.client.ttl(key),
        events=sorted(events, key=lambda event: (event.created, event.sequence)),
    )
