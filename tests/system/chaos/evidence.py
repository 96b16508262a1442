"""The evidence of a finished run, from clients, sinks, Redis and the system. Times: Unix seconds.

`collecting` gathers it, `checker` judges it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple


class Event(NamedTuple):
    """One event that was sent, reduced to the fields that decide about its order and outcome."""

    id: str
    session_id: str
    type: str
    created: int
    status: str
    redaction: str | None = None
    error: str | None = None
    report: str | None = None

    @property
    def fields(self) -> Mapping[str, Any]:
        """The event as Stripe sends it, with these fields alone."""
        session = {
            "status": self.status,
            "redaction": {"status": self.redaction},
            "last_error": {"code": self.error},
            "last_verification_report": self.report,
        }
        named = {"id": self.id, "type": self.type, "created": self.created}
        return {**named, "data": {"object": session}}


class Answer(NamedTuple):
    """One request with an event, and its response; without status if there was none."""

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
    """The place of a transition among those of its session."""

    session_id: str
    epoch: int
    sequence: int


class Transition(NamedTuple):
    """One transition: its place, the event it came from, and the status it leads to."""

    place: Place
    event_id: str
    current: str


class Mark(StrEnum):
    """A stage of a call that a sink logs: that it began, or how it ended."""

    BEGAN = "began"
    TOOK = "took"
    FAILED = "failed"
    REFUSED = "refused"
    EXITED = "exited"


class Call(NamedTuple):
    """One line of a sink's call log, and when it was written."""

    mark: Mark
    transition: Transition
    at: float = 0.0


class DeadLetter(NamedTuple):
    """One dead letter in Redis."""

    transition: Transition
    reason: str
    attempts: int


class Remembered(NamedTuple):
    """The recorded outcome of one event."""

    outcome: str
    sequence: int


class Record(NamedTuple):
    """One session's record in Redis."""

    status: str
    order_key: int
    latest_id: str
    sequence: int
    epoch: int
    events: Mapping[str, Remembered]


class Crash(NamedTuple):
    """A moment at which Redis ended, and the event ids that it had after its restart."""

    at: float
    survived: frozenset[str]


class Window(NamedTuple):
    """A time in which Redis was allowed to forget what it had acknowledged, and why."""

    since: float
    until: float
    cause: str


class Bound(NamedTuple):
    """A time in which events have to be acknowledged or delivered promptly.

    Attributes:
        since: From when on events count: by their first request, or by their acknowledgement.
        until: Up to when.
        within_s: How long each may take.
        cause: The fault that might prevent it.
        handlers: The handlers whose deliveries are meant; acknowledgements if there are none.
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


class HostileResponse(NamedTuple):
    """The status of one response to a hostile client."""

    kind: str
    status: int


class Reading(NamedTuple):
    """The memory and the open files of one process."""

    memory_mib: float
    descriptors: int


class Decision(NamedTuple):
    """A log line about an event that a worker read from Stripe's API, and that was decided then."""

    event_id: str
    at: float
    is_recovered: bool = False


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Attributes:
        events: All events, unsent ones included, by id.
        answers: Every request.
        calls: The calls of each handler's sink, in order.
        dead_letters: Each handler's dead letters.
        transitions: Those in the streams; where streams are trimmed, also those that were accepted.
        deleted: Transitions that an operator deleted from the streams.
        records: The session records, by session id.
        unsent: The ids of events whose webhook was never sent.
        thin: The ids of the notifications that were sent instead of events, by the events' ids.
        states: The status of each session at Stripe; empty where Stripe's API cannot be asked.
        decisions: What the logs say about events that were read from Stripe's API.
        faults_ended: When the last fault was over.
        unsettled: How many transitions each handler has not acknowledged.
        crashes: Unexpected ends of Redis.
        rollbacks: Times in which Redis was allowed to forget.
        bounds: Times in which acknowledgements or deliveries had to be prompt.
        probes: Requests for `/livez`.
        hostile_responses: Responses to hostile clients.
        skewed: Receivers with a wrong clock.
        steady: Handlers that accept everything.
        attempts: After how many failures a transition may be dead-lettered.
        horizon_s: How old an event may be.
        before: What each process that lasted through the run used early in it.
        after: The same at the quiet end.
        connections: How many connections Redis had, early and in the end.
        exits: Exit codes of processes that got SIGTERM.
        texts: All text that the run has written, by where.
        canaries: Words, and the prefixes of the texts that each may be in.
    """

    events: Mapping[str, Event]
    answers: Sequence[Answer]
    calls: Mapping[str, Sequence[Call]]
    dead_letters: Mapping[str, Sequence[DeadLetter]]
    transitions: Sequence[Transition]
    records: Mapping[str, Record]
    deleted: Sequence[Transition] = ()
    unsent: frozenset[str] = frozenset()
    thin: Mapping[str, str] = field(default_factory=dict)
    states: Mapping[str, str] = field(default_factory=dict)
    decisions: Sequence[Decision] = ()
    faults_ended: float = 0.0
    unsettled: Mapping[str, int] = field(default_factory=dict)
    crashes: Sequence[Crash] = ()
    rollbacks: Sequence[Window] = ()
    bounds: Sequence[Bound] = ()
    probes: Sequence[Probe] = ()
    hostile_responses: Sequence[HostileResponse] = ()
    skewed: frozenset[str] = frozenset()
    steady: frozenset[str] = frozenset()
    attempts: int = 10
    horizon_s: int = 35 * 86_400
    before: Mapping[str, Reading] = field(default_factory=dict)
    after: Mapping[str, Reading] = field(default_factory=dict)
    connections: tuple[int, int] = (0, 0)
    exits: Mapping[str, int] = field(default_factory=dict)
    texts: Mapping[str, bytes] = field(default_factory=dict)
    canaries: Mapping[bytes, tuple[str, ...]] = field(default_factory=dict)
