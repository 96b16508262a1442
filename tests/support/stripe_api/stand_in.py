"""The stand-in itself: its state, and everything that a test can do to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .accounts import Directory, Scope
from .clock import Clock
from .destinations import (
    ACCOUNTS,
    PING,
    SELECTION_REQUIRED,
    SELF,
    Destination,
    Destinations,
    Payload,
)
from .events import Event, EventLog, Related, Request
from .faults import Faults
from .lifecycle import Lifecycle
from .pushes import Pushes
from .sessions import SESSION_OBJECT, Session, full_session_object, session_object
from .tokens import Tokens


class Recorded(NamedTuple):
    """One request that the API has answered.

    Attributes:
        method: `GET`, `POST` or `DELETE`.
        path: Without the query.
        query: As it was sent.
        account: The account that it named in a header; None if it named none.
        status: The HTTP status of the answer, as far as it began.
    """

    method: str
    path: str
    query: str
    account: str | None
    status: int | None


class StripeStandIn:
    """Plays Stripe: accounts, sessions, events, destinations, pushes and the API over them.

    Not for use by several threads. Everything that happens at random follows from the seed.

    Attributes:
        clock: The time.
        directory: Accounts and keys.
        sessions: The sessions, and what happens to them.
        events: The events.
        destinations: Where events are pushed.
        pushes: How they are pushed.
        faults: What goes wrong with requests.
        list_lag_s: How long lists do not show events that are made from now on.
        makes_twins: Whether events that are made from now on have a snapshot form.
        expands_everything: Whether events that are made from now on, and sessions that are read,
            hold all that can be expanded, whatever was asked for.
        requests: Every request so far.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.tokens = Tokens(seed)
        self.clock = Clock()
        self.directory = Directory(self.tokens)
        self.events = EventLog()
        self.destinations = Destinations()
        self.pushes = Pushes(self.clock)
        self.faults = Faults(seed=seed)
        self.sessions = Lifecycle(
            scope=self.scope(),
            clock=self.clock,
            tokens=self.tokens,
            emit=self._emit_about,
            forget=self._redact_events,
        )
        self.list_lag_s = 0.0
        self.makes_twins = True
        self.expands_everything = False
        self.requests: list[Recorded] = []

    def scope(self, account: str | None = None, *, livemode: bool = False) -> Scope:
        """Return the scope of an account, by default the platform."""
        return Scope(account or self.directory.platform.id, livemode)

    def subscribe(
        self,
        url: str | None,
        *,
        payload: Payload = "snapshot",
        events: list[str] | None = None,
        scope: Scope | None = None,
        accounts: bool = False,
        own: bool = True,
        **fields: Any,
    ) -> Destination:
        """Add a destination.

        Args:
            url: Where events are posted; None for the bus of a cloud.
            payload: `snapshot` or `thin`.
            events: The types; by default all six about verification sessions.
            scope: Who owns it; by default the platform, in test mode.
            accounts: Whether it gets the events of connected accounts.
            own: Whether it gets the events of its owner.
            fields: Further fields of `Destination`.
        """
        owner = scope or self.scope()
        long_id = self.tokens.new_long_id("ed", livemode=owner.livemode)
        fields.setdefault("secret", self.tokens.new_secret("whsec_"))
        fields.setdefault("type", "webhook_endpoint" if url else "amazon_eventbridge")
        fields.setdefault("application", self.tokens.new_id("ca") if accounts else None)
        return self.destinations.add(
            Destination(
                id=long_id if payload == "thin" else self.tokens.new_id("we"),
                scope=owner,
                payload=payload,
                url=url,
                enabled_events=all_types(payload) if events is None else events,
                events_from=[name for name, on in ((SELF, own), (ACCOUNTS, accounts)) if on],
                created=self.clock.time(),
                **fields,
            )
        )

    def ping(self, destination: Destination) -> Event:
        """Push a ping to a destination, and return its event, which has the thin form only."""
        url = f"/v2/core/event_destinations/{destination.id}"
        related = Related(destination.id, "v2.core.event_destination", url)
        event = self._new_event(PING, destination.scope, related, twin=False)
        self.events.add(event)
        self.pushes.schedule(event, destination)
        return event

    def _emit_about(
        self, session: Session, word: str, changes: Mapping[str, Any], request: Request | None
    ) -> None:
        snapshot_type = f"{SESSION_OBJECT}.{word}"
        platform = self.directory.accounts[session.scope.account].platform
        hearing = list(self.destinations.hearing(session.scope, platform))
        is_named = any(one.names(snapshot_type) for one in hearing)
        if snapshot_type in SELECTION_REQUIRED and not is_named:
            return
        related = Related(
            session.id, SESSION_OBJECT, f"/v1/identity/verification_sessions/{session.id}"
        )
        event = self._new_event(snapshot_type, session.scope, related, twin=self.makes_twins)
        rendered = full_session_object if self.expands_everything else session_object
        event.session = rendered(session, self.tokens)
        event.changes, event.request = changes, request
        self.events.add(event)
        for destination in hearing:
            has_form = destination.payload == "thin" or event.id is not None
            if has_form and destination.is_enabled and destination.selects(snapshot_type):
                self.pushes.schedule(event, destination)

    def _new_event(self, type: str, scope: Scope, related: Related, *, twin: bool) -> Event:
        now = self.clock.time()
        account = self.directory.accounts[scope.account]
        return Event(
            id=self.tokens.new_id("evt") if twin else None,
            thin_id=self.tokens.new_long_id("evt", livemode=scope.livemode),
            type=type,
            scope=scope,
            is_connected=account.platform is not None,
            created=now,
            listed_at=now + self.list_lag_s,
            session=None,
            changes={},
            related=related,
            request=None,
            sequence=len(self.events.all),
        )

    def _redact_events(self, session_id: str) -> None:
        for event in self.events.about(session_id):
            event.redact()


def all_types(payload: Payload) -> list[str]:
    """Return the six types about verification sessions, as a destination names them."""
    words = ("canceled", "created", "processing", "redacted", "requires_input", "verified")
    prefix = "v1." if payload == "thin" else ""
    return [f"{prefix}{SESSION_OBJECT}.{word}" for word in words]
