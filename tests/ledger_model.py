"""The ledger written once more, from the design and over bare JSON: what it must say and hold.

Shares no line with the service. Holds no test; `test_inbox` and `test_inbox_machine` ask it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

DAY_S = 86_400
STEPS = ("created", "processing", "requires_input", "verified canceled", "redacted")
UNKNOWN_STEP = 2
# A record that reaches a multiple of so many fields forgets what no receiver would admit again,
# also one whose clock is behind; of a record with more than twice as many, only some of it.
PRUNED_EVERY = 64
CLOCKS_DIFFER_S = 300
FIELDS_BESIDE_IDS = 2

Place = tuple[int, int, int, int]


def place_of(event: Any) -> Place:
    """Return redaction rank, final rank, created and step rank."""
    session, step = event["data"]["object"], event["type"].rpartition(".")[2]
    redaction = (session["redaction"] or {}).get("status")
    erased = 2 if redaction == "redacted" or step == "redacted" else int(redaction is not None)
    rank = next((n for n, words in enumerate(STEPS) if step in words.split()), UNKNOWN_STEP)
    return erased, int(session["status"] in ("verified", "canceled")), event["created"], rank


def status_of(event: Any) -> str:
    """Return what the event says that the session now is."""
    return "redacted" if place_of(event)[0] == 2 else str(event["data"]["object"]["status"])


def story_of(event: Any) -> tuple[Any, ...]:
    """Return what a handler would care about."""
    session = event["data"]["object"]
    redaction = (session["redaction"] or {}).get("status")
    error = (session["last_error"] or {}).get("code")
    report = session["last_verification_report"]
    return status_of(event), session["status"], redaction, error, report


class Answer(NamedTuple):
    """What the ledger must say to one event."""

    outcome: str
    sequence: int = 0
    previous: str | None = None
    contradicts: bool = False


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
    """What must be known of one session."""

    place: Place = (0, 0, 0, 0)
    story: tuple[Any, ...] = ()
    status: str | None = None
    previous: str | None = None
    sequence: int = 0
    duplicates: int = 0
    epoch: Epoch | None = None
    seen: dict[str, Seen] = field(default_factory=dict)

    @property
    def fields(self) -> int:
        """How many fields its hash has."""
        return len(self.seen) + FIELDS_BESIDE_IDS + bool(self.duplicates)

    @property
    def position(self) -> int:
        """Its place as one number."""
        erased, final, created, step = self.place
        return int(f"{erased}{final}{created:011}{step}")


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
        place, story, before = place_of(event), story_of(event), record.status
        contradicts = False
        if place < record.place:
            outcome, contradicts = "late", place[2] > record.place[2]
        elif story == record.story:
            outcome, record.place = "unchanged", place
        elif len(self.stream(session_id)) >= cap:
            return Answer("full")
        else:
            outcome, record.place, record.story = "admitted", place, story
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
        return Answer(outcome, record.sequence, before, contradicts)

    @staticmethod
    def _known(record: Record, event: Any, nonce: str) -> Answer:
        """Answer whoever asks again what it was told, and anybody else that it is a duplicate."""
        seen = record.seen[event["id"]]
        if seen.nonce != nonce:
            record.duplicates += 1
            return Answer("duplicate", seen.sequence)
        contradicts = seen.outcome == "late" and event["created"] > record.place[2]
        if seen.outcome != "admitted":
            return Answer(seen.outcome, seen.sequence, record.status, contradicts)
        newest = seen.sequence == record.sequence
        return Answer("admitted", seen.sequence, record.previous if newest else None)
