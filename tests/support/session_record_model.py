"""Admission written once more, from its six rules and over plain JSON, for tests to compare with.

Notifications have the first two of the rules and streams of their own.

Shares no line with the service.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

DAY_S = 86_400
TYPE_RANKS = ("created", "processing", "requires_input", "verified canceled", "redacted")
UNKNOWN_TYPE_RANK = 2
FINAL = ("verified", "canceled")
SKEW_S = 5
# A record that reaches a multiple of so many fields is pruned: ids whose events are expired to
# every receiver, also to one whose clock is behind, are dropped. Above twice as many, some are.
PRUNE_EVERY = 64
CLOCK_TOLERANCE_S = 300
FIELDS_BESIDE_IDS = 3


class Order(NamedTuple):
    """The order of an event among those of its session; a greater one is later."""

    redaction: int
    created: int
    type_rank: int
    event_id: str

    @property
    def order_key(self) -> int:
        """The order key: all but the event id, as one number."""
        return int(f"{self.redaction}{self.created:011}{self.type_rank}")


def order_of(event: Any) -> Order:
    """Return an event's order, computed from the event alone."""
    word = event["type"].rpartition(".")[2]
    redaction = _redaction_of(event)
    erased = 2 if redaction == "redacted" else int(redaction == "processing")
    ranks = (n for n, words in enumerate(TYPE_RANKS) if word in words.split())
    return Order(erased, event["created"], next(ranks, UNKNOWN_TYPE_RANK), event["id"])


def is_step(event: Any) -> bool:
    """Return whether an event is a step: it says that something began. All others are results."""
    session, word = event["data"]["object"], event["type"].rpartition(".")[2]
    return bool(word == "created" or session["status"] == "processing")


def status_of(event: Any) -> str:
    """Return the status that the event gives the session."""
    redacted = _redaction_of(event) == "redacted"
    return "redacted" if redacted else str(event["data"]["object"]["status"])


def state_of(event: Any) -> tuple[Any, ...]:
    """Return what a state hash is made of."""
    session = event["data"]["object"]
    error = (session["last_error"] or {}).get("code")
    report = session["last_verification_report"]
    return session["status"], _redaction_of(event), error, report


def _redaction_of(event: Any) -> str | None:
    word = (event["data"]["object"]["redaction"] or {}).get("status")
    return "redacted" if event["type"].endswith(".redacted") else word


class Answer(NamedTuple):
    """The answer to one event."""

    outcome: str
    sequence: int = 0
    previous: str | None = None
    after_final: bool = False


class Seen(NamedTuple):
    """One known event id: its first answer, and the nonce of the caller."""

    outcome: str
    sequence: int
    created: int
    nonce: str


@dataclass(eq=False)
class Epoch:
    """A stretch of a session's transitions that are numbered from 1.

    Attributes:
        server: Which server wrote them.
        above: The epoch before, if there was a record of it.
        began_ms: Filled in when it is first seen; it does not change then.
    """

    server: int
    above: Epoch | None = None
    began_ms: int | None = None


@dataclass
class Record:
    """What is recorded of one session.

    Attributes:
        latest: The latest event that was not late.
        result: The latest result that was not late, if any.
        is_from_step: Whether the last event that was not late is a step.
    """

    latest: Any = None
    result: Any = None
    is_from_step: bool = False
    state: tuple[Any, ...] = ()
    status: str | None = None
    previous: str | None = None
    sequence: int = 0
    duplicates: int = 0
    epoch: Epoch | None = None
    seen: dict[str, Seen] = field(default_factory=dict)

    @property
    def has_earlier_result(self) -> bool:
        """Whether the latest result has to be known beside the latest event."""
        return self.result is not None and self.result is not self.latest

    @property
    def fields(self) -> int:
        """How many fields its hash has."""
        optional = self.has_earlier_result + bool(self.duplicates)
        return len(self.seen) + FIELDS_BESIDE_IDS + optional

    def is_late(self, event: Any) -> bool:
        """Say whether an event is late: rules 3 and 4."""
        if self.latest is None:
            return False
        order, latest = order_of(event), order_of(self.latest)
        result = None if self.result is None else order_of(self.result)
        if is_step(event):
            follows_result = result is not None and order.created <= result.created + SKEW_S
            return order < latest or follows_result or self.status in FINAL or latest.redaction > 0
        if result is not None and order < result:
            return True
        is_overtaken = order.created < latest.created - SKEW_S
        return self.is_from_step and order.redaction == 0 and is_overtaken

    def move_up(self, event: Any) -> None:
        """Record an event that is not late as the latest."""
        if self.latest is None or order_of(event) > order_of(self.latest):
            self.latest = event
        if not is_step(event):
            self.result = event
        self.is_from_step = is_step(event)


class Entry(NamedTuple):
    """One transition that must be in a stream."""

    event: Any
    previous: str | None
    sequence: int
    epoch: Epoch


class Model:
    """All records and all streams.

    Args:
        partition_of: Says which stream a session's transitions go onto.

    Attributes:
        noted: The nonce of each known notification, by its id.
    """

    def __init__(self, partition_of: Callable[[str], int] = lambda _: 0) -> None:
        self.records: dict[str, Record] = {}
        self.streams: dict[int, list[Entry]] = {}
        self.noted: dict[str, str] = {}
        self.notifications: dict[int, list[Any]] = {}
        self.server = 0
        self._partition_of = partition_of

    def change_server(self) -> None:
        """Move everything to another server, which may have lost the last writes."""
        self.server += 1

    def stream(self, session_id: str) -> list[Entry]:
        """Return the stream that a session's transitions go onto."""
        return self.streams.setdefault(self._partition_of(session_id), [])

    def note(
        self,
        notification: Any,
        nonce: str,
        *,
        now: float,
        age_limit_s: int,
        max_entries: int = 10**6,
    ) -> Answer:
        """Return the answer to the next notification, and remember it."""
        stream = self.notifications.setdefault(self._partition_of(notification.session_id), [])
        if notification.event_id in self.noted:
            is_mine = self.noted[notification.event_id] == nonce
            return Answer("queued" if is_mine else "duplicate")
        if notification.created < now - age_limit_s:
            return Answer("expired")
        if len(stream) >= max_entries:
            return Answer("full")
        self.noted[notification.event_id] = nonce
        stream.append(notification)
        return Answer("queued")

    def admit(
        self, event: Any, nonce: str, *, now: float, age_limit_s: int, max_entries: int = 10**6
    ) -> Answer:
        """Return the answer to the next event, and record it."""
        session_id = event["data"]["object"]["id"]
        record = self.records.get(session_id) or Record()
        min_created = now - age_limit_s
        if event["id"] in record.seen:
            return self._known(record, event, nonce)
        if event["created"] < min_created:
            return Answer("expired")
        state, before = state_of(event), record.status
        after_final = False
        if record.is_late(event):
            outcome = "late"
            after_final = event["created"] > record.latest["created"] + SKEW_S
        elif state == record.state:
            outcome = "unchanged"
            record.move_up(event)
        elif len(self.stream(session_id)) >= max_entries:
            return Answer("full")
        else:
            outcome, record.state = "admitted", state
            record.move_up(event)
            if record.epoch is None or record.epoch.server != self.server:
                record.epoch, record.sequence = Epoch(self.server, above=record.epoch), 0
            record.sequence += 1
            record.previous, record.status = before, status_of(event)
            self.stream(session_id).append(Entry(event, before, record.sequence, record.epoch))
        self.records[session_id] = record
        record.seen[event["id"]] = Seen(outcome, record.sequence, event["created"], nonce)
        if record.fields % PRUNE_EVERY == 0:
            min_kept = min_created - 2 * CLOCK_TOLERANCE_S
            record.seen = {i: one for i, one in record.seen.items() if one.created >= min_kept}
        return Answer(outcome, record.sequence, before, after_final)

    @staticmethod
    def _known(record: Record, event: Any, nonce: str) -> Answer:
        """Return the first answer to the same caller, and `duplicate` to any other."""
        seen = record.seen[event["id"]]
        if seen.nonce != nonce:
            record.duplicates += 1
            return Answer("duplicate", seen.sequence)
        late = seen.outcome == "late"
        after_final = late and event["created"] > record.latest["created"] + SKEW_S
        if seen.outcome != "admitted":
            return Answer(seen.outcome, seen.sequence, record.status, after_final)
        newest = seen.sequence == record.sequence
        return Answer("admitted", seen.sequence, record.previous if newest else None)
