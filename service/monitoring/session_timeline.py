"""What happened to one session: each arrival of an event, and what became of its transition."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

from ..inbox.session_record import SessionRecord
from ..transitions.transition import StatusTransition


class State(StrEnum):
    """What became of a transition at one handler."""

    WAITING = "waiting"
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
        transition: The transition that it made; None if it made none, or if that was deleted.
        entry_id: The id of that transition in its stream; None if it made none.
    """

    event_id: str
    outcome: str
    sequence: int
    created_at: datetime
    arrived_at: datetime
    transition: StatusTransition | None
    entry_id: str | None


class Attempt(NamedTuple):
    """One finished attempt to deliver a transition to a handler.

    Attributes:
        at: When it ended.
        outcome: `delivered`, `failed` or `dead_lettered`.
        attempt: Its number, from 1.
        error: The class of the error, or why it became a dead letter; empty if it was delivered.
        place: Where that was raised: files, lines and functions.
        is_replay: Whether it was an attempt of a replay.
    """

    at: datetime
    outcome: str
    attempt: int
    error: str
    place: str
    is_replay: bool


class HandlerOutcome(NamedTuple):
    """What became of a transition at one handler.

    Attributes:
        handler: The handler's name.
        state: What became of it.
        attempts: The finished attempts that are still known, oldest first.
        dead_letter_id: The id of its dead letter, as `dead show` takes it; None if there is none.
        failed: How many attempts have failed.
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
