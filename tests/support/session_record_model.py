"""The ledger written once more, from its six rules and over bare JSON: what it must say and hold.

Shares no line with the service. Holds no test; `test_inbox` and `test_inbox_machine` ask it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

DAY_S = 86_400
STEP_RANKS = ("created", "processing", "requires_input", "verified canceled", "redacted")
UNKNOWN_STEP_RANK = 2
FINAL = ("verified", "canceled")
SKEW_S = 5
# A record that reaches a multiple of so many fields forgets what no receiver would admit again,
# also one whose clock is behind; of a record with more than twice as many, only some of it.
PRUNED_EVERY = 64
CLOCKS_DIFFER_S = 300
FIELDS_BESIDE_IDS = 3


class Place(NamedTuple):
    """Where an event stands among those of its session; the greater is the later."""

    redaction: int
    created: int
    step: int
    event_id: str

    @property
    def order_key(self) -> int:
        """The place as one number, without the event id."""
        return int(f"{self.redaction}{self.created:011}{self.step}")


def place_of(event: Any) -> Place:
    """Return an event's place, by itself."""
    word = event["type"].rpartition(".")[2]
    redaction = _redaction_of(event)
    erased = 2 if redaction == "redacted" else int(redaction == "processing")
    ranks = (n for n, words in enumerate(STEP_RANKS) if word in words.split())
    return Place(erased, event["created"], next(ranks, UNKNOWN_STEP_RANK), event["id"])


def is_step(event: Any) -> bool:
    """Say whether an event says that something began; all others are results."""
    session, word = event["data"]["object"], event["type"].rpartition(".")[2]
    return bool(word == "created" or session["status"] == "processing")


def status_of(event: Any) -> str:
    """Return what the event says that the session now is."""
    redacted = _redaction_of(event) == "redacted"
    return "redacted" if redacted else str(event["data"]["object"]["status"])


def story_of(event: Any) -> tuple[Any, ...]:
    """Return what a handler would care about."""
    session = event["data"]["object"]
    error = (session["last_error"] or {}).get("code")
    report = session["last_verification_report"]
    return session["status"], _redaction_of(event), error, report


def _redaction_of(event: Any) -> str | None:
    word = (event["data"]["object"]["redaction"] or {}).get("status")
    return "redacted" if event["type"].endswith(".redacted") else word


class Answer(NamedTuple):
    """What the ledger must say to one event."""

    outcome: str
    sequence: int = 0
    previous: str | None = None
    after_final: bool = False


class Seen(NamedTuple):
    """One remembered event id: what was said to it, and to whom."""

    outcome: str
    sequence: int
    created: int
    nonce: str


@dataclass(eq=False)
class Epoch:
    """A stretch of a session's transitions that are numbered from 1.

    Attributes:
        server: Which server wrote them.
        above: The epoch before, if the ledger still knew it.
        began_ms: Filled in by the first who sees it; it never changes then.
    """

    server: int
    above: Epoch | None = None
    began_ms: int | None = None


@dataclass
class Record:
    """What must be known of one session.

    Attributes:
        latest: The latest event that was not late.
        result: The latest result that was not late, if any.
        is_from_step: Whether the last event that was not late is a step.
    """

    latest: Any = None
    result: Any = None
    is_from_step: bool = False
    story: tuple[Any, ...] = ()
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

    def rejects(self, event: Any) -> bool:
        """Say whether an event is late: rules 3 and 4."""
        if self.latest is None:
            return False
        place, latest = place_of(event), place_of(self.latest)
        result = None if self.result is None else place_of(self.result)
        if is_step(event):
            settled = result is not None and place.created <= result.created + SKEW_S
            return place < latest or settled or self.status in FINAL or latest.redaction > 0
        if result is not None and place < result:
            return True
        overtaken = place.created < latest.created - SKEW_S
        return self.is_from_step and place.redaction == 0 and overtaken

    def move_up(self, event: Any) -> None:
        """Take note of an event that is not late."""
        if self.latest is None or place_of(event) > place_of(self.latest):
            self.latest = event
        if not is_step(event):
            self.result = event
        self.is_from_step = is_step(event)


class Entry(NamedTuple):
    """One transition that must stand on a stream."""

    event: Any
    previous: str | None
    sequence: int
    epoch: Epoch


class Ledger:
    """All sessions and all streams.

    Args:
        partition_of: Says which stream a session's transitions go onto.
    """

    def __init__(self, partition_of: Callable[[str], int] = lambda _: 0) -> None:
        self.records: dict[str, Record] = {}
        self.streams: dict[int, list[Entry]] = {}
        self.server = 0
        self._partition_of = partition_of

    def change_server(self) -> None:
        """Let all be as it was, but on a server that may have lost what came after."""
        self.server += 1

    def stream(self, session_id: str) -> list[Entry]:
        """Return the stream that a session's transitions go onto."""
        return self.streams.setdefault(self._partition_of(session_id), [])

    def judge(
        self, event: Any, nonce: str, *, now: float, horizon_s: int, cap: int = 10**6
    ) -> Answer:
        """Judge the next event, and remember it as the ledger must."""
        session_id = event["data"]["object"]["id"]
        record = self.records.get(session_id) or Record()
        oldest = now - horizon_s
        if event["id"] in record.seen:
            return self._known(record, event, nonce)
        if event["created"] < oldest:
            return Answer("expired")
        story, before = story_of(event), record.status
        after_final = False
        if record.rejects(event):
            outcome = "late"
            after_final = event["created"] > record.latest["created"] + SKEW_S
        elif story == record.story:
            outcome = "unchanged"
            record.move_up(event)
        elif len(self.stream(session_id)) >= cap:
            return Answer("full")
        else:
            outcome, record.story = "admitted", story
            record.move_up(event)
            if record.epoch is None or record.epoch.server != self.server:
                record.epoch, record.sequence = Epoch(self.server, above=record.epoch), 0
            record.sequence += 1
            record.previous, record.status = before, status_of(event)
            self.stream(session_id).append(Entry(event, before, record.sequence, record.epoch))
        self.records[session_id] = record
        record.seen[event["id"]] = Seen(outcome, record.sequence, event["created"], nonce)
        if record.fields % PRUNED_EVERY == 0:
            spared = oldest - 2 * CLOCKS_DIFFER_S
            record.seen = {i: one for i, one in record.seen.items() if one.created >= spared}
        return Answer(outcome, record.sequence, before, after_final)

    @staticmethod
    def _known(record: Record, event: Any, nonce: str) -> Answer:
        """Answer whoever asks again what it was told, and anybody else that it is a duplicate."""
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
