"""What is known of a finished run: plain facts, as clients, sinks, Redis and the system told them.

Nothing here says what should be: `checker` judges, `collecting` gathers. Times are Unix seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple


class Event(NamedTuple):
    """One event as it was sent, reduced to what its place in its session's life depends on."""

    id: str
    session_id: str
    type: str
    created: int
    status: str
    redaction: str | None = None
    error: str | None = None
    report: str | None = None


class Answer(NamedTuple):
    """One request with an event, and what was heard of it; no status when nothing was."""

    event_id: str
    receiver: str
    asked_at: float
    answered_at: float
    status: int | None = None
    word: str | None = None

    @property
    def is_acknowledgement(self) -> bool:
        """Whether Stripe would not send the event again."""
        return self.status is not None and 200 <= self.status < 300


class Place(NamedTuple):
    """Where a transition stands among those of its session."""

    session_id: str
    epoch: int
    sequence: int


class Transition(NamedTuple):
    """One transition: its place, the event it came from, and the status it leads to."""

    place: Place
    event_id: str
    current: str


class Mark(StrEnum):
    """What a sink noted of a call: that it began, or how it ended."""

    BEGAN = "began"
    TOOK = "took"
    FAILED = "failed"
    REFUSED = "refused"
    EXITED = "exited"


class Call(NamedTuple):
    """One line of a sink's journal, and when it was written."""

    mark: Mark
    transition: Transition
    at: float = 0.0


class DeadLetter(NamedTuple):
    """One dead letter, as Redis holds it."""

    transition: Transition
    reason: str
    attempts: int


class Remembered(NamedTuple):
    """What the ledger says was decided about one event."""

    outcome: str
    sequence: int


class Record(NamedTuple):
    """What the ledger holds of one session."""

    status: str
    order_key: int
    latest_id: str
    sequence: int
    epoch: int
    events: Mapping[str, Remembered]


class Crash(NamedTuple):
    """A moment at which Redis ended, and the event ids that it knew when it was back."""

    at: float
    survived: frozenset[str]


class Window(NamedTuple):
    """A time in which Redis itself could forget what it had acknowledged, and why."""

    since: float
    until: float
    cause: str


class Bound(NamedTuple):
    """A time in which events were acknowledged or delivered promptly, or a promise was broken.

    Attributes:
        since: From when on events count: by their first request, or by their acknowledgement.
        until: Up to when.
        within_s: How long each may take.
        cause: Why that was in doubt.
        handlers: The handlers whose deliveries are meant; without any, acknowledgements are.
    """

    since: float
    until: float
    within_s: float
    cause: str
    handlers: tuple[str, ...] = ()


class Probe(NamedTuple):
    """One request for a process's `/livez`, and how it ended; no status if it failed."""

    process: str
    at: float
    took_s: float
    status: int | None


class StrangerAnswer(NamedTuple):
    """The status of one response to a client that had nothing genuine to send."""

    kind: str
    status: int


class Reading(NamedTuple):
    """What one process uses."""

    memory_mib: float
    descriptors: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Attributes:
        events: All that was sent, by id.
        answers: Every request.
        journals: What each handler's sink wrote down, in order.
        letters: Each handler's dead letters.
        transitions: What the streams hold, and what was taken from streams that are trimmed.
        deleted: What an operator deleted from the streams.
        records: The ledger, by session.
        unsettled: How many transitions each handler's group has not settled.
        crashes: When Redis ended without warning, and what it still knew.
        rollbacks: When Redis was allowed to forget.
        bounds: When acknowledgements or deliveries had to be prompt.
        probes: Requests for `/livez`.
        strangers: Responses to clients that sent nothing genuine.
        skewed: Receivers whose clock was wrong.
        steadfast: Handlers that refused and failed nothing.
        attempts: After how many failures a handler's transition may be buried.
        horizon_s: How old an event may be.
        before: What each process that lived through the run used early in it.
        after: The same when all was quiet again.
        connections: How many connections Redis had, early and in the end.
        exits: How processes ended that were told to end.
        texts: Everything that was written anywhere, by where.
        canaries: Words that may be nowhere; for each, the places (by how they begin) it may be in.
    """

    events: Mapping[str, Event]
    answers: Sequence[Answer]
    journals: Mapping[str, Sequence[Call]]
    letters: Mapping[str, Sequence[DeadLetter]]
    transitions: Sequence[Transition]
    records: Mapping[str, Record]
    deleted: Sequence[Transition] = ()
    unsettled: Mapping[str, int] = field(default_factory=dict)
    crashes: Sequence[Crash] = ()
    rollbacks: Sequence[Window] = ()
    bounds: Sequence[Bound] = ()
    probes: Sequence[Probe] = ()
    strangers: Sequence[StrangerAnswer] = ()
    skewed: frozenset[str] = frozenset()
    steadfast: frozenset[str] = frozenset()
    attempts: int = 10
    horizon_s: int = 35 * 86_400
    before: Mapping[str, Reading] = field(default_factory=dict)
    after: Mapping[str, Reading] = field(default_factory=dict)
    connections: tuple[int, int] = (0, 0)
    exits: Mapping[str, int] = field(default_factory=dict)
    texts: Mapping[str, bytes] = field(default_factory=dict)
    canaries: Mapping[bytes, tuple[str, ...]] = field(default_factory=dict)
