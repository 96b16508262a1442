"""What one dispatcher has in hand: sessions, their entries in order, and which of them wait.

Only numbers and order; when anything happens is decided in `dispatch`. A session that cannot go
on is parked: of its entries only the ids stay in memory, and they take no place of others.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

from .consumer import Delivery
from .retries import CircuitSession

# Of one session, so that no session fills what is there for all. The rest is kept by id.
MAX_LOADED_PER_SESSION = 16


class Letter(NamedTuple):
    """Why an entry becomes a dead letter."""

    reason: str
    error: str
    place: str
    attempts: int


class Session(CircuitSession):
    """The entries of one session, the oldest first.

    `key` is the session id, or the entry id of an entry that cannot be read.

    Attributes:
        deliveries: The entries. Those in front are loaded, the others are kept by id.
        loaded: How many of them hold their transition.
        due: When it may go on, in the event loop's time, while it is parked.
        letter: What its first entry is to become, where there was no room for it yet.
    """

    __slots__ = ("deliveries", "due", "letter", "loaded")

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.deliveries: list[Delivery] = []
        self.loaded = 0
        self.due = 0.0
        self.letter: Letter | None = None

    @property
    def first(self) -> Delivery:
        """The entry that is next."""
        return self.deliveries[0]

    def __lt__(self, other: Session) -> bool:
        return self.due < other.due


class Backlog:
    """All sessions of one dispatcher.

    Attributes:
        sessions: By key.
        loaded: Entries whose transitions are in memory.
        parked: Entries kept by id. The first of a session that works is loaded for as long.
    """

    def __init__(self) -> None:
        self.sessions: dict[str, Session] = {}
        self.loaded = 0
        self.parked = 0
        self._resting: list[Session] = []

    def add(self, delivery: Delivery) -> Session | None:
        """Append an entry to its session; return the session if that had none before."""
        transition = delivery.transition
        key = delivery.entry_id if transition is None else transition.session_id
        session = self.sessions.get(key)
        is_new = session is None
        if session is None:
            session = self.sessions[key] = Session(key)
        # Behind an entry that is not loaded none is: what is loaded stays in front.
        all_loaded = session.loaded == len(session.deliveries) < MAX_LOADED_PER_SESSION
        session.deliveries.append(delivery)
        if transition is not None and all_loaded:
            session.loaded += 1
            self.loaded += 1
        else:
            delivery.transition = None
            self.parked += 1
        return session if is_new else None

    def remove_first(self, session: Session) -> None:
        """Remove a session's first entry, and the session with its last."""
        session.deliveries.pop(0)
        if session.loaded:
            session.loaded -= 1
            self.loaded -= 1
        else:
            self.parked -= 1
        session.reset()
        session.letter = None
        if not session.deliveries:
            del self.sessions[session.key]

    def park(self, session: Session) -> None:
        """Keep only the ids of a session's entries."""
        for delivery in session.deliveries[: max(1, session.loaded)]:
            delivery.transition = None
        self.loaded -= session.loaded
        self.parked += session.loaded
        session.loaded = 0

    def rest(self, session: Session, until: float) -> None:
        """Park a session until a time."""
        self.park(session)
        session.due = until
        heapq.heappush(self._resting, session)

    @property
    def next_due(self) -> float | None:
        """When the next of the resting sessions may go on."""
        return self._resting[0].due if self._resting else None

    def pop_due(self, now: float) -> Session | None:
        """Return a resting session whose time has come."""
        if self._resting and self._resting[0].due <= now:
            return heapq.heappop(self._resting)
        return None
