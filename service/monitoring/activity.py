"""What the processes of a deployment have published of themselves: their life, counts, reversals.

Written by `publisher`. Each name and number here comes from our own processes; none is a value of a
session, except its id and its statuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime
from typing import NamedTuple

# A process writes a sign of life every 5 s. Without one for so long it does not count as alive.
ALIVE_S = 15.0


class Process(NamedTuple):
    """One process of the deployment.

    Attributes:
        name: Its host and process id.
        kind: `receiver`, `worker`, or `dev`, which is both.
        version: The version of this service that it runs.
        started_at: When it started.
        seen_s: Seconds since its last sign of life.
        ready: None while it is ready, else why it is not, as one word.
        works: The handlers that it calls.
        last_event_at: When it got its last verified event; None before the first.
    """

    name: str
    kind: str
    version: str
    started_at: datetime
    seen_s: float
    ready: str | None
    works: tuple[str, ...]
    last_event_at: datetime | None

    @property
    def is_alive(self) -> bool:
        """Whether its last sign of life is recent."""
        return self.seen_s <= ALIVE_S

    @property
    def receives(self) -> bool:
        """Whether it listens for Stripe."""
        return self.kind != "worker"


class Minute(NamedTuple):
    """What all processes counted within one minute.

    Attributes:
        at: The minute's beginning.
        received: Requests on the webhook path, by outcome or reason of rejection.
        delivered: For each handler its calls, by outcome: delivered, failed, retried,
            dead_lettered, selftest. A failed call is counted again as retried or dead_lettered.
    """

    at: datetime
    received: Mapping[str, int]
    delivered: Mapping[str, Mapping[str, int]]


class Day(NamedTuple):
    """What all processes counted within one day (UTC).

    Attributes:
        at: The day.
        reversals: Changes from a final status to another one that is not redacted.
        recovered: Events that no webhook had brought and the reconciler found.
        dead_lettered: Transitions whose delivery was given up.
    """

    at: date
    reversals: int
    recovered: int
    dead_lettered: int


class Reversal(NamedTuple):
    """A change from a final status to another one that is not redacted.

    Attributes:
        at: When it was admitted.
        session_id: The session.
        previous: The final status that it had.
        current: Its new status.
        event_id: The event that brought the change.
    """

    at: datetime
    session_id: str
    previous: str
    current: str
    event_id: str


class Activity(NamedTuple):
    """What the processes have published.

    Attributes:
        processes: All that gave a sign of life within ten minutes, receivers first, by name.
        minutes: The 60 minutes up to the present one, the oldest first; an empty one has no counts.
        days: The 7 days up to today, the oldest first.
        reversals: The latest, the newest first.
        last_event_at: When the last verified event came; None if none came within 7 days.
    """

    processes: tuple[Process, ...] = ()
    minutes: tuple[Minute, ...] = ()
    days: tuple[Day, ...] = ()
    reversals: tuple[Reversal, ...] = ()
    last_event_at: datetime | None = None

    @property
    def receivers(self) -> tuple[Process, ...]:
        """The processes that listen for Stripe."""
        return tuple(one for one in self.processes if one.receives)

    @property
    def workers(self) -> tuple[Process, ...]:
        """The processes that call handlers."""
        return tuple(one for one in self.processes if one.works)
