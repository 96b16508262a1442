"""What happened to one session: each arrival of an event, and what became of its transition.

Arrivals are those that the session's record remembers. What handlers did with a transition is read
from their groups, their dead letters and replays, and their streams of finished attempts. These
streams are short, so of an old transition it is only known that it was acknowledged.

What a timeline costs is bounded: the latest 50 transitions are looked up, in three to eight script
calls for each handler, which look at a bounded number of entries. The calls are made one after the
other, so that Redis serves others between them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec

from ..delivery.consumer import FAILURE_WEIGHT
from ..delivery.consumer_groups import group_names
from ..inbox import session_record
from ..inbox.session_record import KnownEvent, SessionRecord
from ..parsers import FETCH
from ..storage.connections import Connections
from ..storage.keys import Keys
from ..storage.scripts import Argument, Script, ScriptCall, raise_first
from ..transitions import stream_entry
from ..transitions.transition import StatusTransition
from . import finished_attempts
from .finished_attempts import Attempt, NotedAttempt
from .handler_state import CIRCUIT

# Bounds the time for which one call blocks Redis: about a millisecond.
MAX_ATTEMPTS_PER_CALL = 1000
# Of one transition at one handler, which may be retried thousands of times.
MAX_ATTEMPTS = 50

_FIND_ATTEMPTS = Script(__package__, "find_attempts.lua")
FIND_DELIVERIES = Script(__package__, "find_deliveries.lua")
# What the script says of an entry instead of its delivery count.
_UNREAD, ACKNOWLEDGED, _NO_GROUP = -1, -2, -3


class State(StrEnum):
    """What became of a transition at one handler.

    `CIRCUIT_OPEN` means that it waits: a destination of the handler cannot be reached. `SETTLED`
    means acknowledged, and no more is known: its attempts are not kept any more, its dead letter
    was dropped, or the handler's group was created after it.
    """

    WAITING = "waiting"
    CIRCUIT_OPEN = "circuit open"
    IN_PROGRESS = "in progress"
    RETRYING = "retrying"
    DELIVERED = "delivered"
    DEAD_LETTER = "dead letter"
    SETTLED = "settled"
    UNKNOWN = "unknown"


class Arrival(NamedTuple):
    """One event that arrived, and how it was judged.

    Attributes:
        event_id: Stripe's event id.
        outcome: `admitted`, `late` or `unchanged`.
        sequence: The session's sequence number after it.
        created_at: When Stripe created it.
        arrived_at: When it was judged, by Redis's clock.
        transition: The transition that it made; None if it made none, if that was deleted, or if it
            was not looked up.
        entry_id: The id of that transition in its stream; None if it made none.
        is_looked_up: Whether its transition is among the latest ones, which are looked up.
    """

    event_id: str
    outcome: str
    sequence: int
    created_at: datetime
    arrived_at: datetime
    transition: StatusTransition | None
    entry_id: str | None
    is_looked_up: bool = True


class HandlerOutcome(NamedTuple):
    """What became of a transition at one handler.

    Attributes:
        handler: The handler's name.
        state: What became of it; of its replay, where one is not acknowledged.
        attempts: The latest 50 finished attempts that are still known, oldest first.
        dead_letter_id: The id of its dead letter, as `dead show` takes it; None if there is none.
        failed: How many attempts have failed, of its latest replay where it was replayed.
    """

    handler: str
    state: State
    attempts: tuple[Attempt, ...]
    dead_letter_id: str | None
    failed: int


class Step(NamedTuple):
    """One arrival; and what became of its transition at each handler, if it made one."""

    arrival: Arrival
    outcomes: tuple[HandlerOutcome, ...]


class Timeline(NamedTuple):
    """What is known of one session: its record, and its steps in the order of arrival."""

    record: SessionRecord
    steps: tuple[Step, ...]

    @property
    def latest(self) -> StatusTransition | None:
        """The latest transition that a stream still holds."""
        known = [step.arrival.transition for step in self.steps if step.arrival.transition]
        return max(known, key=lambda one: (one.epoch, one.sequence), default=None)


async def read_timeline(
    connections: Connections, keys: Keys, session_id: str, handlers: Collection[str] = ()
) -> Timeline | None:
    """Return the timeline of a session, or None when the session is not known.

    Args:
        connections: Open clients.
        keys: The layout.
        session_id: `vs_…`.
        handlers: The handlers that are configured; others are found by their groups.

    Raises:
        RedisError: Redis did not answer.
        ValueError: What the session's key holds is not one of our records.
    """
    record = await session_record.read(connections, keys, session_id)
    if record is None:
        return None
    transitions = await session_record.find_transitions(connections, keys, record)
    admitted = record.latest_admitted
    existing = await group_names(connections, keys)
    looked_up = {event.event_id for event in admitted}
    names = [*handlers, *sorted(existing - {*handlers})]
    found = [
        await _find_deliveries(connections, keys, session_id, name, admitted)
        for name in names
        if name != FETCH
    ]
    return Timeline(
        record,
        tuple(
            Step(
                _arrival(
                    event,
                    transitions.get(event.event_id),
                    is_looked_up=event.event_id in looked_up,
                ),
                tuple(each[event.event_id] for each in found if event.event_id in each),
            )
            for event in record.events
        ),
    )


def _arrival(
    event: KnownEvent, transition: StatusTransition | None, *, is_looked_up: bool
) -> Arrival:
    return Arrival(
        event.event_id,
        event.outcome,
        event.sequence,
        created_at=datetime.fromtimestamp(event.created, UTC),
        arrived_at=_at(event.arrived_ms),
        transition=transition,
        entry_id=event.entry_id,
        is_looked_up=is_looked_up,
    )


async def _find_deliveries(
    connections: Connections,
    keys: Keys,
    session_id: str,
    handler: str,
    admitted: Sequence[KnownEvent],
) -> Mapping[str, HandlerOutcome]:
    """Return what became of each transition at one handler, by event id."""
    if not admitted:
        return {}
    partition = keys.partition(session_id)
    attempts = await _find_attempts(
        connections, keys.finished_attempts(partition, handler), admitted
    )
    # As `stream_entry.pack` writes it. Metadata of others may look like it: what is found is looked
    # up by the ids of our events.
    marker = b'"session_id":' + msgspec.json.encode(session_id)
    streams = [
        keys.transitions(partition),
        keys.replays(partition, handler),
        keys.dead_letters(partition, handler),
    ]
    asked = [handler, marker, *_asked(admitted, attempts)]
    replies = await connections.run(
        [
            ScriptCall(FIND_DELIVERIES, streams, asked),
            ScriptCall(CIRCUIT, [keys.circuit(handler)], []),
        ]
    )
    raise_first(replies)
    (states, letters, replays), is_circuit_open = replies
    letter_ids = {
        event_id: f"{partition}-{entry_id.decode()}" for event_id, entry_id in _events_of(letters)
    }
    replay_states = {
        event_id: state for state, entry in replays for event_id, _ in _events_of([entry])
    }
    return {
        event.event_id: outcome_of(
            handler,
            replay_states.get(event.event_id, state) if state == ACKNOWLEDGED else state,
            [one.attempt for one in attempts if one.event_id == event.event_id],
            letter_ids.get(event.event_id),
            is_circuit_open=bool(is_circuit_open),
        )
        for event, state in zip(admitted, states, strict=True)
    }


async def _find_attempts(
    connections: Connections, stream: str, admitted: Sequence[KnownEvent]
) -> list[NotedAttempt]:
    """Return the finished attempts of some transitions, the oldest first."""
    found: list[NotedAttempt] = []
    start = str(admitted[0].entry_id)
    while start:
        next_id, entries = await connections.run_one(
            _FIND_ATTEMPTS,
            [stream],
            [start, MAX_ATTEMPTS_PER_CALL, *(event.event_id for event in admitted)],
        )
        start = next_id.decode()
        found += finished_attempts.decode(entries)
    return found


def _asked(admitted: Sequence[KnownEvent], attempts: Sequence[NotedAttempt]) -> Iterator[Argument]:
    """Yield what `find_deliveries.lua` is asked for."""
    explained = {one.event_id for one in attempts if one.attempt.outcome != "failed"}
    yield len(admitted)
    for event in admitted:
        yield str(event.entry_id)
        yield int(event.event_id in explained)
    yield from (one.letter_id for one in attempts if one.letter_id)


def outcome_of(
    handler: str,
    state: int,
    attempts: Sequence[Attempt],
    dead_letter_id: str | None,
    *,
    is_circuit_open: bool,
) -> HandlerOutcome:
    """Return what became of an entry; *state* as `find_deliveries.lua` says it."""
    last = attempts[-1] if attempts else None
    failed = last.attempt - (last.outcome == "delivered") if last else 0
    if state >= 0:
        failed = state // FAILURE_WEIGHT
        found = State.RETRYING if failed else State.IN_PROGRESS
    elif state == _UNREAD:
        failed, found = 0, State.WAITING
    elif state == _NO_GROUP:
        found = State.UNKNOWN
    elif dead_letter_id is not None:
        found = State.DEAD_LETTER
    elif last and last.outcome == "delivered":
        found = State.DELIVERED
    else:
        found = State.SETTLED
    if is_circuit_open and found in (State.WAITING, State.IN_PROGRESS):
        found = State.CIRCUIT_OPEN
    latest = tuple(attempts[-MAX_ATTEMPTS:])
    return HandlerOutcome(handler, found, latest, dead_letter_id, failed)


def _events_of(entries: Iterable[Any]) -> Iterator[tuple[str, bytes]]:
    """Yield the event id and the entry id of those entries that are transitions."""
    for entry_id, values in entries:
        with suppress(ValueError):
            fields = dict(zip(values[::2], values[1::2], strict=True))
            yield stream_entry.unpack(fields).event_id, entry_id


def _at(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)
