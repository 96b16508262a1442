"""The sessions of one dispatcher, with their entries in order, and which wait for a retry.

Only bookkeeping: `dispatcher` decides when anything happens. An entry in memory is in one of two
forms:

    loaded    with its item; takes a slot of the dispatcher's window
    parked    with its id only; takes no slot, and is loaded again when it is its turn

A session that cannot go on is parked, so that it takes no slots of those that can.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

from .consumer import Delivery
from .retries import CircuitSession

# So that no session fills the window alone. Its further entries are parked.
MAX_LOADED_PER_SESSION = 16


class FinalFailure(NamedTuple):
    """Why an entry becomes a dead letter."""

    reason: str
    error: str = ""
    place: str = ""
    attempts: int = 0


class Session(CircuitSession):
    """The entries of one session, the oldest first.

    `key` is the session id, or the entry id of an entry that cannot be read.

    Attributes:
        deliveries: The entries. Those in front are loaded, the others are parked.
        loaded: How many of them are loaded.
        retry_at: When it may run again, in the event loop's time, while it waits for a retry.
        final_failure: Set if its first entry is to be a dead letter as soon as there is room.
    """

    __slots__ = ("deliveries", "final_failure", "loaded", "retry_at")

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.deliveries: list[Delivery] = []
        self.loaded = 0
        self.retry_at = 0.0
        self.final_failure: FinalFailure | None = None

    @property
    def first(self) -> Delivery:
        """The entry that is next."""
        return self.deliveries[0]

    def __lt__(self, other: Session) -> bool:
        return self.retry_at < other.retry_at


class Backlog:
    """All sessions of one dispatcher.

    Attributes:
        sessions: By key.
        loaded: How many entries are loaded.
        parked: How many entries are parked. The deliverer loads the first entry of a running
            session for the time of its attempt; it counts as parked all the same.
    """

    def __init__(self) -> None:
        self.sessions: dict[str, Session] = {}
        self.loaded = 0
        self.parked = 0
        self._retries: list[Session] = []

    def add(self, delivery: Delivery) -> Session | None:
        """Append an entry to its session; return the session if it is new."""
        item = delivery.item
        key = delivery.entry_id if item is None else item.session_id
        session = self.sessions.get(key)
        is_new = session is None
        if session is None:
            session = self.sessions[key] = Session(key)
        # Behind a parked entry all are parked: the loaded ones stay in front.
        may_load = session.loaded == len(session.deliveries) < MAX_LOADED_PER_SESSION
        session.deliveries.append(delivery)
        if item is not None and may_load:
            session.loaded += 1
            self.loaded += 1
        else:
            delivery.item = None
            self.parked += 1
        return session if is_new else None

    def remove_first(self, session: Session) -> None:
        """Remove a session's first entry, and with the last one the session."""
        session.deliveries.pop(0)
        if session.loaded:
            session.loaded -= 1
            self.loaded -= 1
        else:
            self.parked -= 1
        session.reset()
        session.final_failure = None
        if not session.deliveries:
            del self.sessions[session.key]

    def park(self, session: Session) -> None:
        """Park all entries of a session."""
        for delivery in session.deliveries[: max(1, session.loaded)]:
            delivery.item = None
        self.loaded -= session.loaded
        self.parked += session.loaded
        session.loaded = 0

    def schedule_retry(self, session: Session, at: float) -> None:
        """Park a session until a time."""
        self.park(session)
        session.retry_at = at
        heapq.heappush(self._retries, session)

    @property
    def next_retry_at(self) -> float | None:
        """When the next retry is due; None if there is none."""
        return self._retries[0].retry_at if self._retries else None

    def pop_due_retry(self, now: float) -> Session | None:
        """Return a session whose retry is due; None if there is none."""
        if self._retries and self._retries[0].retry_at <= now:
            return heapq.heappop(self._retries)
        return None
