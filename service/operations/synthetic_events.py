"""Lifecycles of synthetic sessions, as the events Stripe would send about them.

Without I/O: time and randomness are arguments. `sender` sends the events.
Their form is that of https://docs.stripe.com/api/identity/verification_sessions/object
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Final
from uuid import UUID

import orjson

API_VERSION: Final = "2026-07-29.dahlia"

_ALPHABET: Final = string.ascii_letters + string.digits
_HOUR_S: Final = 3600
_DAY_S: Final = 24 * _HOUR_S
_REASONS: Final[Mapping[str, str]] = {
    "document_expired": "The document is expired.",
    "consent_declined": "The user declined to consent to the verification.",
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One event of a lifecycle, and the state of the session in it.

    Attributes:
        event: The last word of the event's type.
        status: The session's status.
        after_s: The minimum and maximum number of seconds since the step before.
        error: The code of `last_error`.
        redaction: The value of `redaction.status`.
        reports: Whether the step comes with a new verification report.
        requested: Whether an API call caused it, rather than Stripe itself.
    """

    event: str
    status: str
    after_s: tuple[int, int]
    error: str | None = None
    redaction: str | None = None
    reports: bool = False
    requested: bool = False


_CREATED: Final = Step(event="created", status="requires_input", after_s=(0, 0), requested=True)
_SUBMITTED: Final = Step(event="processing", status="processing", after_s=(30, 600))
_VERIFIED: Final = Step(event="verified", status="verified", after_s=(2, 180), reports=True)
_EXPIRED_DOCUMENT: Final = Step(
    event="requires_input",
    status="requires_input",
    after_s=(2, 180),
    error="document_expired",
    reports=True,
)
_CONSENT_DECLINED: Final = Step(
    event="requires_input", status="requires_input", after_s=(10, 300), error="consent_declined"
)
# Of an override by staff, Stripe documents the status only, so nothing else changes here.
_REJECTED: Final = Step(event="requires_input", status="requires_input", after_s=(_HOUR_S, _DAY_S))
_APPROVED: Final = Step(event="verified", status="verified", after_s=(_HOUR_S, _DAY_S))
_CANCELED: Final = Step(event="canceled", status="canceled", after_s=(60, _HOUR_S), requested=True)
_CANCELED_BY_REDACTION: Final = replace(_CANCELED, redaction="processing")
_REDACTED: Final = Step(
    event="redacted", status="verified", after_s=(_HOUR_S, 4 * _DAY_S), redaction="redacted"
)
_REDACTED_CANCELED: Final = replace(_REDACTED, status="canceled")

LIFECYCLES: Final[Mapping[str, tuple[Step, ...]]] = {
    "verified": (_CREATED, _SUBMITTED, _VERIFIED),
    "retry-then-verified": (_CREATED, _SUBMITTED, _EXPIRED_DOCUMENT, _SUBMITTED, _VERIFIED),
    "canceled": (_CREATED, _CANCELED),
    "consent-declined": (_CREATED, _CONSENT_DECLINED),
    "redacted-after-verified": (_CREATED, _SUBMITTED, _VERIFIED, _REDACTED),
    "redacted-while-open": (_CREATED, _CANCELED_BY_REDACTION, _REDACTED_CANCELED),
    "rejected-on-review": (_CREATED, _SUBMITTED, _VERIFIED, _REJECTED),
    "approved-on-review": (_CREATED, _SUBMITTED, _EXPIRED_DOCUMENT, _APPROVED),
}


@dataclass(frozen=True, kw_only=True)
class SyntheticEvent:
    """One event, ready to be signed and sent. Its body holds synthetic bearer secrets.

    Attributes:
        id: `evt_sim…`; of a thin event `evt_test_sim…`.
        type: The whole type, `identity.verification_session.…`; of a thin event with `v1.` first.
        created: Unix time in whole seconds.
        session_id: `vs_sim…`.
        body: The JSON as Stripe lays it out, indented by two.
    """

    id: str
    type: str
    created: int
    session_id: str
    body: bytes = field(repr=False)


def lifecycle_events(
    name: str,
    *,
    random: Random,
    started_at: int,
    session_prefix: str = "vs_",
    livemode: bool = False,
) -> list[SyntheticEvent]:
    """Return the events of one new session that goes through a lifecycle, in order.

    Args:
        name: A key of `LIFECYCLES`.
        random: The source of ids and delays: the same state gives the same events.
        started_at: When the session is created, Unix time in whole seconds.
        session_prefix: What the session's id begins with.
        livemode: Whether the events are live events.
    """
    session = _new_session(random, started_at, session_prefix) | {"livemode": livemode}
    events = []
    created = started_at
    for step in LIFECYCLES[name]:
        created += random.randint(*step.after_s)
        session = _after(step, session, random)
        events.append(_event(step, session, random, created))
    return events


def thin_event(event: SyntheticEvent, *, random: Random) -> SyntheticEvent:
    """Return the thin form of a snapshot event: what happened, without the session.

    Its form is that of https://docs.stripe.com/api/v2/core/events/object
    """
    snapshot = orjson.loads(event.body)
    request = snapshot["request"]
    created = datetime.fromtimestamp(event.created, UTC)
    created += timedelta(milliseconds=random.randrange(1000))
    envelope: dict[str, Any] = {
        "id": f"evt_test_{_token(random, length=51)}",
        "object": "v2.core.event",
        "context": None,
        "created": created.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "livemode": snapshot["livemode"],
        "reason": {"type": "request", "request": request} if request["id"] else None,
        "related_object": {
            "id": event.session_id,
            "type": "identity.verification_session",
            "url": f"/v1/identity/verification_sessions/{event.session_id}",
        },
        "type": f"v1.{event.type}",
    }
    return replace(event, id=envelope["id"], type=envelope["type"], body=_encode(envelope))


def _new_session(random: Random, created: int, prefix: str) -> dict[str, Any]:
    user = f"user-{random.getrandbits(24):06x}"
    return {
        "id": prefix + _token(random),
        "object": "identity.verification_session",
        "client_reference_id": user,
        "client_secret": None,
        "created": created,
        "last_error": None,
        "last_verification_report": None,
        "livemode": False,
        "metadata": {"user_id": user, "attempt_group": "simulated"},
        "options": {
            "document": {
                "allowed_types": ["driving_license", "id_card", "passport"],
                "require_id_number": False,
                "require_live_capture": True,
                "require_matching_selfie": True,
            }
        },
        "redaction": None,
        "related_customer": f"cus_{_token(random)}",
        "related_customer_account": None,
        "status": "requires_input",
        "type": "document",
        "url": None,
    }


def _after(step: Step, session: Mapping[str, Any], random: Random) -> dict[str, Any]:
    """Return *session* after *step*, its keys in the same order."""
    is_open = step.status == "requires_input"
    changed: dict[str, Any] = {
        "client_secret": f"{session['id']}_secret_test_{_token(random)}" if is_open else None,
        "last_error": step.error and {"code": step.error, "reason": _REASONS[step.error]},
        "redaction": step.redaction and {"status": step.redaction},
        "status": step.status,
        "url": f"https://verify.stripe.com/start/test_{_token(random)}" if is_open else None,
    }
    if step.reports:
        changed["last_verification_report"] = f"vr_{_token(random)}"
    if step.redaction:
        changed |= {"client_reference_id": None, "metadata": {}}
    return {**session, **changed}


def _event(step: Step, session: Mapping[str, Any], random: Random, created: int) -> SyntheticEvent:
    """Wrap *session* in the envelope of https://docs.stripe.com/api/events/object."""
    event_id = f"evt_{_token(random)}"
    event_type = f"identity.verification_session.{step.event}"
    envelope = {
        "id": event_id,
        "object": "event",
        "api_version": API_VERSION,
        "created": created,
        "data": {"object": session},
        "livemode": session["livemode"],
        "pending_webhooks": 1,
        "request": {
            "id": f"req_{_token(random)}" if step.requested else None,
            "idempotency_key": _idempotency_key(random) if step.requested else None,
        },
        "type": event_type,
    }
    return SyntheticEvent(
        id=event_id,
        type=event_type,
        created=created,
        session_id=session["id"],
        body=_encode(envelope),
    )


def _encode(envelope: Mapping[str, Any]) -> bytes:
    return orjson.dumps(envelope, option=orjson.OPT_INDENT_2)


def _token(random: Random, *, length: int = 24) -> str:
    """Return an id without its prefix: as long as Stripe's, and visibly not Stripe's."""
    return "sim" + "".join(random.choices(_ALPHABET, k=length - len("sim")))


def _idempotency_key(random: Random) -> str:
    return str(UUID(int=random.getrandbits(128), version=4))
