"""Events: one record for each change, which has a snapshot form (v1) and a thin form (v2).

https://docs.stripe.com/api/events/object and https://docs.stripe.com/api/v2/core/events/object
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from .accounts import API_VERSION, Scope
from .clock import rfc3339
from .errors import missing
from .persons import redacted

RETENTION_S: Final = 30 * 24 * 3600
_PERSONAL: Final = (
    *("client_reference_id", "client_secret", "last_error", "provided_details", "url"),
    "verified_outputs",
)


@dataclass(kw_only=True)
class Event:
    """One event in both forms.

    Attributes:
        id: The id of the snapshot, `evt_…`; None if there is only the thin form.
        thin_id: The id of the thin form, longer.
        type: The type of the snapshot; that of the thin form begins with `v1.`.
        scope: The account and the mode it belongs to.
        is_connected: Whether the account is a connected one, so that the event names it.
        created: Unix seconds with a fraction; the snapshot has whole seconds.
        listed_at: When lists begin to show it, Unix seconds.
        session_id: The session that it is about.
        session: That session: `data.object` of the snapshot.
        changes: What was before and after, for the thin form.
        sequence: The order in which events were made.
    """

    id: str | None
    thin_id: str
    type: str
    scope: Scope
    is_connected: bool
    created: float
    listed_at: float
    session_id: str
    session: Mapping[str, Any]
    changes: Mapping[str, Any]
    sequence: int

    @property
    def thin_type(self) -> str:
        """The type of the thin form."""
        return f"v1.{self.type}"

    def is_listed(self, now: float) -> bool:
        """Return whether lists show it."""
        return self.listed_at <= now

    def redact(self) -> None:
        """Replace what is personal, as Stripe does once the session is redacted."""
        shown = dict(self.session)
        report = shown["last_verification_report"]
        if isinstance(report, dict):
            shown["last_verification_report"] = report["id"]
        shown |= {name: redacted(shown[name]) for name in _PERSONAL if name in shown}
        self.session = shown | {"metadata": {}}
        self.changes = {when: redacted(values) for when, values in self.changes.items()}

    def as_snapshot(self) -> dict[str, Any]:
        """Return the snapshot form."""
        return {
            "id": self.id,
            "object": "event",
            **({"account": self.scope.account} if self.is_connected else {}),
            "api_version": API_VERSION,
            **({"context": self.scope.account} if self.is_connected else {}),
            "created": int(self.created),
            "data": {"object": self.session},
            "livemode": self.scope.livemode,
            "pending_webhooks": 1,
            "request": {"id": None, "idempotency_key": None},
            "type": self.type,
        }

    def as_notification(self, *, names_snapshot: bool = False) -> dict[str, Any]:
        """Return the thin form as it is pushed.

        Args:
            names_snapshot: Whether it holds `snapshot_event`; whether Stripe's does is not known.
        """
        notification = {
            "id": self.thin_id,
            "object": "v2.core.event",
            "context": self.scope.account if self.is_connected else None,
            "created": rfc3339(self.created),
            "livemode": self.scope.livemode,
            "reason": None,
            "related_object": {
                "id": self.session_id,
                "type": "identity.verification_session",
                "url": f"/v1/identity/verification_sessions/{self.session_id}",
            },
            "type": self.thin_type,
        }
        return notification | ({"snapshot_event": self.id} if names_snapshot and self.id else {})

    def as_thin_event(self) -> dict[str, Any]:
        """Return the thin form as it is read by its id: with its snapshot event's id."""
        return {
            **self.as_notification(),
            "changes": dict(self.changes),
            "data": {},
            "snapshot_event": self.id,
        }


class EventLog:
    """All events of all accounts."""

    def __init__(self) -> None:
        self.all: list[Event] = []
        self._ordered: defaultdict[Scope, list[Event]] = defaultdict(list)
        self._by_id: dict[str, Event] = {}
        self._about: defaultdict[str, list[Event]] = defaultdict(list)

    def add(self, event: Event) -> None:
        """Add an event; its time may be before that of others."""
        self.all.append(event)
        insort(self._ordered[event.scope], event, key=lambda one: (one.created, one.sequence))
        self._about[event.session_id].append(event)
        self._by_id[event.thin_id] = event
        if event.id is not None:
            self._by_id[event.id] = event

    def about(self, session_id: str) -> list[Event]:
        """Return the events of a session, in the order in which they were made."""
        return list(self._about[session_id])

    def retained(self, scope: Scope, now: float, since: float) -> list[Event]:
        """Return the events that can be read now, the newest first; lists may not show some yet.

        Args:
            scope: Whose.
            now: The present time, Unix seconds.
            since: When the first of them was created, Unix seconds.
        """
        ordered = self._ordered[scope]
        first = bisect_left(ordered, max(since, now - RETENTION_S), key=lambda one: one.created)
        return ordered[first:][::-1]

    def find(self, scope: Scope, id: str, now: float) -> Event:
        """Return an event by the id of either form; it can be read at once.

        Raises:
            ApiError: 404, if there is none, or none any more.
        """
        event = self._by_id.get(id)
        if event is None or event.scope != scope or now - event.created > RETENTION_S:
            raise missing("event", id)
        return event
