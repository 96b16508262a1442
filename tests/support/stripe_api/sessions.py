"""Verification sessions and reports as the API shows them, before anything is expanded away.

https://docs.stripe.com/api/identity/verification_sessions/object
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Final

from .accounts import Scope
from .persons import (
    VISIT_ERRORS,
    contact_check,
    document_check,
    id_number_check,
    redacted,
    selfie_check,
    verified_outputs,
)
from .tokens import Tokens, canary

SESSION_OBJECT: Final = "identity.verification_session"
REPORT_OBJECT: Final = "identity.verification_report"
DEFAULT_OPTIONS: Final[Mapping[str, Any]] = {
    "document": {
        "allowed_types": ["driving_license", "id_card", "passport"],
        "require_id_number": False,
        "require_live_capture": True,
        "require_matching_selfie": True,
    }
}


@dataclass(kw_only=True)
class Report:
    """The result of one attempt.

    Attributes:
        id: `vr_…`.
        created: Unix seconds.
        error: The code of the check that failed, if one did.
    """

    id: str
    created: float
    error: str | None = None


@dataclass(kw_only=True)
class Session:
    """The state of a verification session.

    Attributes:
        id: `vs_…`.
        scope: The account and the mode it belongs to.
        created: Unix seconds.
        type: `document`, `id_number` or `verification_flow`.
        status: `requires_input`, `processing`, `verified` or `canceled`.
        error: The code of `last_error`, if any.
        redaction: None, `processing` or `redacted`.
        reports: One for each finished attempt, the oldest first.
        given: What its creator gave: `client_reference_id`, `metadata`, `options` and others.
    """

    id: str
    scope: Scope
    created: float
    type: str = "document"
    status: str = "requires_input"
    error: str | None = None
    redaction: str | None = None
    reports: list[Report] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def report(self) -> Report | None:
        """The report of the latest attempt."""
        return self.reports[-1] if self.reports else None

    @property
    def is_open(self) -> bool:
        """Whether the person may still open it in a browser or an app."""
        return self.status == "requires_input" and self.redaction is None


def last_error(session: Session) -> dict[str, str] | None:
    """Return `last_error`, whose reason is written for the person."""
    if session.error is None:
        return None
    return {"code": session.error, "reason": canary(f"reason_{session.error}")}


def session_object(session: Session, tokens: Tokens) -> dict[str, Any]:
    """Return a session without what must be expanded: as an event holds it.

    Every call gives an open session a new `client_secret` and a new `url`.
    """
    given = session.given
    word = "live_" if session.scope.livemode else "test_"
    secret = url = None
    if session.is_open:
        secret = tokens.new_secret(f"{session.id}_secret_{word}")
        url = tokens.new_secret(f"https://verify.stripe.com/start/{word}")
    is_redacted = session.redaction == "redacted"
    shown = {
        "id": session.id,
        "object": SESSION_OBJECT,
        "client_reference_id": None if session.redaction else given.get("client_reference_id"),
        "client_secret": secret,
        "created": int(session.created),
        "last_error": redacted(last_error(session)) if is_redacted else last_error(session),
        "last_verification_report": session.report.id if session.report else None,
        "livemode": session.scope.livemode,
        "metadata": {} if session.redaction else dict(given.get("metadata", {})),
        "options": deepcopy(given.get("options", {})),
        "redaction": {"status": session.redaction} if session.redaction else None,
        "related_customer": given.get("related_customer"),
        "related_customer_account": given.get("related_customer_account"),
        "status": session.status,
        "type": session.type,
        "url": url,
    }
    optional = ("related_person", "verification_flow")
    return shown | {name: given[name] for name in optional if name in given}


def full_session_object(session: Session, tokens: Tokens) -> dict[str, Any]:
    """Return a session with everything that can be expanded, the report included."""
    personal = {
        "provided_details": session.given.get("provided_details"),
        "verified_outputs": verified_outputs() if session.status == "verified" else None,
    }
    report = session.report
    return {
        **session_object(session, tokens),
        **(redacted(personal) if session.redaction == "redacted" else personal),
        "last_verification_report": report and full_report_object(session, report),
    }


def full_report_object(session: Session, report: Report) -> dict[str, Any]:
    """Return a report with everything that can be expanded."""
    checks = _checks(session, report)
    flow = session.given.get("verification_flow")
    return {
        "id": report.id,
        "object": REPORT_OBJECT,
        "client_reference_id": None
        if session.redaction
        else session.given.get("client_reference_id"),
        "created": int(report.created),
        **(redacted(checks) if session.redaction == "redacted" else checks),
        "livemode": session.scope.livemode,
        "options": deepcopy(session.given.get("options", {})),
        "type": session.type,
        **({"verification_flow": flow} if flow else {}),
        "verification_session": session.id,
    }


def _checks(session: Session, report: Report) -> dict[str, Any]:
    """Return all checks that the type of a session can have, whatever its options ask for."""

    def error(check: str) -> dict[str, str] | None:
        code = report.error
        is_its_own = code is not None and code.startswith(f"{check}_")
        return {"code": code, "reason": canary(f"reason_{code}")} if code and is_its_own else None

    checks = {"id_number": id_number_check(error("id_number"))}
    if session.type == "id_number":
        return checks
    details = session.given.get("provided_details") or {}
    return {
        "document": document_check(error("document")),
        **{name: contact_check(name, value, error(name)) for name, value in details.items()},
        **checks,
        "selfie": selfie_check(error("selfie")),
    }


def has_report(code: str | None) -> bool:
    """Return whether an attempt that ends with this error, or with none, leaves a report."""
    return code not in VISIT_ERRORS
