"""The thin events of one session that are not fetched, and how far `fetch` is with each.

Until its event is fetched, the session's record knows nothing of a thin event: it waits in the
stream of notifications, is a dead letter of `fetch`, or waits to be replayed. These streams are
searched whole, 1,000 entries by a call, so that Redis serves others between the calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec

from ..delivery.dead_letters import Entry, entry_of
from ..delivery.sources import NOTIFICATIONS
from ..parsers import FETCH
from ..storage.connections import Connections
from ..storage.keys import Keys
from ..storage.scripts import Script, ScriptCall
from ..transitions.thin_notification import Notification
from .finished_attempts import Attempt
from .handler_state import CIRCUIT
from .session_search import MAX_FOUND, MAX_SEARCHED
from .session_timeline import ACKNOWLEDGED, FIND_DELIVERIES, HandlerOutcome, outcome_of

_FIND_SESSIONS = Script(__package__, "find_sessions.lua")


class Unfetched(NamedTuple):
    """A thin event that is not fetched, and how far `fetch` is with it."""

    notification: Notification
    outcome: HandlerOutcome

    @property
    def created_at(self) -> datetime:
        """When Stripe created it."""
        return datetime.fromtimestamp(self.notification.created, UTC)


async def find_unfetched(
    connections: Connections, keys: Keys, session_id: str
) -> tuple[Unfetched, ...]:
    """Return the thin events of a session that are not fetched, the first created first.

    To miss none that is fetched meanwhile, read the session's record after this, not before.

    Raises:
        RedisError: Redis did not answer.
    """
    partition = keys.partition(session_id)
    circuit = ScriptCall(CIRCUIT, [keys.circuit(FETCH)], [])
    is_circuit_open = bool(await connections.run_one(*circuit))
    found: dict[str, Unfetched] = {}
    # In the order in which an entry moves from one to the next, maybe meanwhile.
    for stream in (
        keys.notifications(partition),
        keys.dead_letters(partition, FETCH),
        keys.replays(partition, FETCH),
    ):
        entries = await _search(connections, stream, partition, session_id)
        states = await _find_states(connections, keys, stream, entries)
        for entry, state in zip(entries, states, strict=True):
            is_waiting = entry.reason is not None or state != ACKNOWLEDGED
            if is_waiting and isinstance(entry.item, Notification):
                outcome = _outcome(entry, state, is_circuit_open=is_circuit_open)
                found[entry.item.event_id] = Unfetched(entry.item, outcome)
    return tuple(sorted(found.values(), key=lambda one: one.notification.created))


async def _search(
    connections: Connections, stream: str, partition: int, session_id: str
) -> list[Entry]:
    """Return the entries of a stream about a session, the oldest first."""
    marker = b'"session_id":' + msgspec.json.encode(session_id)
    found: list[Entry] = []
    start = "+"
    while start:
        last, _, entries = await connections.run_one(
            _FIND_SESSIONS, [stream], [start, MAX_SEARCHED, MAX_FOUND, marker]
        )
        for entry_id, values in entries:
            fields = dict(zip(values[::2], values[1::2], strict=True))
            entry = entry_of(NOTIFICATIONS, partition, entry_id.decode(), fields)
            if entry.item and entry.item.session_id == session_id:
                found.append(entry)
        start = f"({last.decode()}" if last else ""
    return found[::-1]


async def _find_states(
    connections: Connections, keys: Keys, stream: str, entries: Sequence[Entry]
) -> list[int]:
    """Return how far entries of a stream are, as `find_deliveries.lua` says it."""
    if not entries:
        return []
    partition = entries[0].partition
    others = [keys.replays(partition, FETCH), keys.dead_letters(partition, FETCH)]
    # It is known what became of each that is acknowledged: it is fetched, or a dead letter.
    asked = [part for entry in entries for part in (entry.entry_id, 1)]
    [states, _, _] = await connections.run_one(
        FIND_DELIVERIES, [stream, *others], [FETCH, "", len(entries), *asked]
    )
    return list(states)


def _outcome(entry: Entry, state: int, *, is_circuit_open: bool) -> HandlerOutcome:
    if entry.reason is None:
        return outcome_of(FETCH, state, [], None, is_circuit_open=is_circuit_open)
    why = entry.error or entry.reason
    last = Attempt(
        entry.at, "dead_lettered", entry.attempts, why, entry.place or "", is_replay=False
    )
    return outcome_of(FETCH, ACKNOWLEDGED, [last], entry.id, is_circuit_open=is_circuit_open)
