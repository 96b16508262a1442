"""What happens to sessions: each change makes one event, except where Stripe makes none.

The changes and their events: https://docs.stripe.com/identity/how-sessions-work
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from .accounts import Scope
from .clock import Clock
from .errors import ApiError, missing
from .sessions import Report, Session, has_report, last_error
from .tokens import Tokens


class Emits(Protocol):
    """Makes the event of a change."""

    def __call__(self, session: Session, word: str, changes: Mapping[str, Any]) -> None:
        """Make an event of the type `identity.verification_session.{word}`."""


class Lifecycle:
    """All sessions, and the changes that a test or a request can make to them.

    Methods that take an id raise `ApiError` for a session that does not exist (404), or whose
    status does not allow the change (400), and return the session.
    """

    def __init__(
        self,
        *,
        scope: Scope,
        clock: Clock,
        tokens: Tokens,
        emit: Emits,
        forget: Callable[[str], None],
    ) -> None:
        self._scope = scope
        self._clock = clock
        self._tokens = tokens
        self._emit = emit
        self._forget = forget
        self.all: dict[str, Session] = {}

    def create(
        self,
        *,
        scope: Scope | None = None,
        client_reference_id: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Session:
        """Create a session, which is open.

        Args:
            scope: The account and mode; by default the platform's test mode.
            client_reference_id: A reference of its creator's.
            metadata: Texts of its creator's.
        """
        session = Session(
            id=self._tokens.new_id("vs"),
            scope=scope or self._scope,
            created=self._clock.time(),
            customer=self._tokens.new_id("cus"),
            client_reference_id=client_reference_id,
            metadata=metadata or {},
        )
        self.all[session.id] = session
        self._emit(session, "created", {"before": {}, "after": _visible(session)})
        return session

    def create_verified(self, scope: Scope | None = None) -> Session:
        """Create a session, and let it be submitted and verified at once."""
        session = self.create(scope=scope)
        self.submit(session.id)
        return self.verify(session.id)

    def submit(self, id: str) -> Session:
        """Let the person submit everything, so that the checks run."""
        session = self._in_status(id, "requires_input", "submitted")
        return self._change(session, "processing", status="processing", error=None)

    def verify(self, id: str) -> Session:
        """Let all checks pass."""
        session = self._in_status(id, "processing", "verified")
        self._add_report(session, None)
        return self._change(session, "verified", status="verified", error=None)

    def reject(self, id: str, code: str = "document_expired") -> Session:
        """Let a check fail, or the person's visit end with an error.

        Errors of a visit, such as `consent_declined`, leave no report and also come to a session
        that was not submitted.
        """
        session = self.find(id)
        if has_report(code):
            self._in_status(id, "processing", "rejected")
            self._add_report(session, code)
        elif session.status not in {"processing", "requires_input"}:
            raise _not_allowed(session, "rejected")
        return self._change(session, "requires_input", status="requires_input", error=code)

    def cancel(self, id: str) -> Session:
        """Cancel an open session, for good."""
        session = self._in_status(id, "requires_input", "canceled")
        return self._change(session, "canceled", status="canceled")

    def override(self, id: str, status: str) -> Session:
        """Let staff decide otherwise after a review: `verified` or `requires_input`.

        Stripe says that there is an event with the new status, and no more; that it has the type
        of that status, and that only the status changes, are assumptions.
        """
        session = self.find(id)
        before = {"verified": "requires_input", "requires_input": "verified"}[status]
        if session.status != before or not session.report or session.redaction:
            raise _not_allowed(session, "overridden")
        return self._change(session, status, status=status, error=None)

    def redact(self, id: str) -> Session:
        """Begin a redaction. An open session is canceled by it, with an event; others get none."""
        session = self.find(id)
        if session.redaction:
            return session
        if session.status == "processing":
            raise _not_allowed(session, "redacted")
        session.redaction = "processing"
        if session.status == "requires_input":
            return self._change(session, "canceled", status="canceled")
        return session

    def finish_redaction(self, id: str) -> Session:
        """End a redaction: events that were made before it are redacted as well."""
        session = self.find(id)
        if session.redaction != "processing":
            raise _not_allowed(session, "redacted")
        self._forget(id)
        return self._change(session, "redacted", redaction="redacted")

    def find(self, id: str, scope: Scope | None = None) -> Session:
        """Return a session, of any account or of one.

        Raises:
            ApiError: 404, if there is none.
        """
        session = self.all.get(id)
        if session is None or scope not in {None, session.scope}:
            raise missing("verification_session", id, param="session")
        return session

    def _in_status(self, id: str, status: str, done: str) -> Session:
        session = self.find(id)
        if session.status != status or session.redaction:
            raise _not_allowed(session, done)
        return session

    def _add_report(self, session: Session, code: str | None) -> None:
        session.report = Report(
            id=self._tokens.new_id("vr"), created=self._clock.time(), error=code
        )

    def _change(self, session: Session, word: str, **fields: Any) -> Session:
        before = _visible(session)
        for name, value in fields.items():
            setattr(session, name, value)
        self._emit(session, word, {"before": before, "after": _visible(session)})
        return session


def _visible(session: Session) -> dict[str, Any]:
    return {"last_error": last_error(session), "status": session.status}


def _not_allowed(session: Session, done: str) -> ApiError:
    return ApiError(
        400,
        f"A VerificationSession with the status `{session.status}` cannot be {done}.",
        code="verification_session_unexpected_state",
    )
