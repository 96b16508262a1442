"""The stand-in itself: its state, and everything that a test can do to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .accounts import Directory, Scope
from .clock import Clock
from .destinations import (
    ACCOUNTS,
    SELECTION_REQUIRED,
    SELF,
    Destination,
    Destinations,
    Payload,
)
from .events import Event, EventLog
from .faults import Faults
from .lifecycle import Lifecycle
from .pushes import Pushes
from .sessions import SESSION_OBJECT, Session, full_session_object, session_object
from .tokens import Tokens


class Recorded(NamedTuple):
    """One request that the API has answered.

    Attributes:
        path: Without the query.
        account: The account that it named in a header; None if it named none.
        status: The HTTP status of the answer, as far as it began.
    """

    path: str
    account: str | None
    status: int | None


class StripeStandIn:
    """Plays Stripe: accounts, sessions, events, destinations, pushes and the API over them.

    Not for use by several threads. What happens at random is the same each time.

    Attributes:
        clock: The time.
        directory: Accounts and keys.
        sessions: The sessions, and what happens to them.
        events: The events.
        destinations: Where events are pushed.
        pushes: How they are pushed.
        faults: What goes wrong with requests.
        list_lag_s: How long lists do not show events that are made from now on.
        makes_snapshots: Whether events that are made from now on have a snapshot form.
        expands_everything: Whether events that are made from now on, and sessions that are read,
            hold all that can be expanded, which the service never asks for.
        requests: Every request so far.
    """

    def __init__(self) -> None:
        self.tokens = Tokens()
        self.clock = Clock()
        self.directory = Directory(self.tokens)
        self.events = EventLog()
        self.destinations = Destinations()
        self.pushes = Pushes(self.clock)
        self.faults = Faults()
        self.sessions = Lifecycle(
            scope=self.scope(),
            clock=self.clock,
            tokens=self.tokens,
            emit=self._emit_about,
            forget=self._redact_events,
        )
        self.list_lag_s = 0.0
        self.makes_snapshots = True
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
        is_enabled: bool = True,
    ) -> Destination:
        """Add a destination.

        Args:
            url: Where events are posted; None for the bus of a cloud.
            payload: `snapshot` or `thin`.
            events: The types; by default all six about verification sessions.
            scope: Who owns it; by default the platform, in test mode.
            accounts: Whether it gets the events of connected accounts.
            own: Whether it gets the events of its owner.
            is_enabled: Whether it gets any at present.
        """
        owner = scope or self.scope()
        long_id = self.tokens.new_long_id("ed", livemode=owner.livemode)
        return self.destinations.add(
            Destination(
                id=long_id if payload == "thin" else self.tokens.new_id("we"),
                scope=owner,
                payload=payload,
                url=url,
                secret=self.tokens.new_secret("whsec_"),
                enabled_events=all_types(payload) if events is None else events,
                events_from=[name for name, on in ((SELF, own), (ACCOUNTS, accounts)) if on],
                created=self.clock.time(),
                is_enabled=is_enabled,
            )
        )

    def show(self, session: Session) -> dict[str, Any]:
        """Return a session as it is read, and as events hold it."""
        render = full_session_object if self.expands_everything else session_object
        return render(session, self.tokens)

    def _emit_about(self, session: Session, word: str, changes: Mapping[str, Any]) -> None:
        snapshot_type = f"{SESSION_OBJECT}.{word}"
        platform = self.directory.accounts[session.scope.account].platform
        hearing = list(self.destinations.hearing(session.scope, platform))
        is_named = any(one.names(snapshot_type) for one in hearing)
        if snapshot_type in SELECTION_REQUIRED and not is_named:
            return
        event = self._new_event(snapshot_type, session, changes, is_connected=platform is not None)
        self.events.add(event)
        for destination in hearing:
            has_form = destination.payload == "thin" or event.id is not None
            if has_form and destination.is_enabled and destination.selects(snapshot_type):
                self.pushes.schedule(event, destination)

    def _new_event(
        self, type: str, session: Session, changes: Mapping[str, Any], *, is_connected: bool
    ) -> Event:
        now = self.clock.time()
        return Event(
            id=self.tokens.new_id("evt") if self.makes_snapshots else None,
            thin_id=self.tokens.new_long_id("evt", livemode=session.scope.livemode),
            type=type,
            scope=session.scope,
            is_connected=is_connected,
            created=now,
            listed_at=now + self.list_lag_s,
            session_id=session.id,
            session=self.show(session),
            changes=changes,
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
