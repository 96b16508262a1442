"""Verification sessions and reports as the API shows them.

https://docs.stripe.com/api/identity/verification_sessions/object
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final

from .accounts import Scope
from .persons import (
    VISIT_ERRORS,
    contact_check,
    document_check,
    id_number_check,
    provided_details,
    redacted,
    selfie_check,
    verified_outputs,
)
from .tokens import Tokens, canary

SESSION_OBJECT: Final = "identity.verification_session"
OPTIONS: Final[Mapping[str, Any]] = {
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
        customer: `cus_…`.
        client_reference_id: A reference of its creator's, if any.
        metadata: Texts of its creator's.
        status: `requires_input`, `processing`, `verified` or `canceled`.
        error: The code of `last_error`, if any.
        redaction: None, `processing` or `redacted`.
        report: That of the latest finished attempt.
    """

    id: str
    scope: Scope
    created: float
    customer: str
    client_reference_id: str | None
    metadata: Mapping[str, str]
    status: str = "requires_input"
    error: str | None = None
    redaction: str | None = None
    report: Report | None = None

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
    word = "live_" if session.scope.livemode else "test_"
    secret = url = None
    if session.is_open:
        secret = tokens.new_secret(f"{session.id}_secret_{word}")
        url = tokens.new_secret(f"https://verify.stripe.com/start/{word}")
    is_redacted = session.redaction == "redacted"
    return {
        "id": session.id,
        "object": SESSION_OBJECT,
        "client_reference_id": None if session.redaction else session.client_reference_id,
        "client_secret": secret,
        "created": int(session.created),
        "last_error": redacted(last_error(session)) if is_redacted else last_error(session),
        "last_verification_report": session.report.id if session.report else None,
        "livemode": session.scope.livemode,
        "metadata": {} if session.redaction else dict(session.metadata),
        "options": deepcopy(OPTIONS),
        "redaction": {"status": session.redaction} if session.redaction else None,
        "related_customer": session.customer,
        "related_customer_account": None,
        "status": session.status,
        "type": "document",
        "url": url,
    }


def full_session_object(session: Session, tokens: Tokens) -> dict[str, Any]:
    """Return a session with everything that can be expanded, the report included."""
    personal = {
        "provided_details": provided_details(),
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
    checks = _checks(report)
    return {
        "id": report.id,
        "object": "identity.verification_report",
        "client_reference_id": None if session.redaction else session.client_reference_id,
        "created": int(report.created),
        **(redacted(checks) if session.redaction == "redacted" else checks),
        "livemode": session.scope.livemode,
        "options": deepcopy(OPTIONS),
        "type": "document",
        "verification_session": session.id,
    }


def _checks(report: Report) -> dict[str, Any]:
    """Return all checks that a session can have, whatever its options ask for."""

    def error(check: str) -> dict[str, str] | None:
        code = report.error
        is_its_own = code is not None and code.startswith(f"{check}_")
        return {"code": code, "reason": canary(f"reason_{code}")} if code and is_its_own else None

    return {
        "document": document_check(error("document")),
        **{
            name: contact_check(name, value, error(name))
            for name, value in provided_details().items()
        },
        "id_number": id_number_check(error("id_number")),
        "selfie": selfie_check(error("selfie")),
    }


def has_report(code: str | None) -> bool:
    """Return whether an attempt that ends with this error, or with none, leaves a report."""
    return code not in VISIT_ERRORS
