"""The life of a session as a table, and what makes one event newer than another.

This is the one source for what may follow what; `simulate`, the README and the worker's
`expected` flag derive from it. Nothing here knows Redis, HTTP or Stripe's envelope.
Stripe's lifecycle: https://docs.stripe.com/identity/how-sessions-work
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from hashlib import blake2b
from typing import ClassVar

import msgspec

from .reports import Discreet
from .sessions import RelatedPerson, VerificationSession

EVENT_TYPE_PREFIX = "identity.verification_session."


class Status(StrEnum):
    """The statuses of a session: Stripe's four, and REDACTED, ours, which absorbs them all."""

    REQUIRES_INPUT = "requires_input"
    PROCESSING = "processing"
    VERIFIED = "verified"
    CANCELED = "canceled"
    REDACTED = "redacted"


# A first sight of a session (None) is expected to be its creation. `requires_input` follows
# itself when a user declines before any check runs; the final statuses follow themselves when
# redaction begins.
FOLLOWS: dict[str | None, frozenset[str]] = {
    None: frozenset({Status.REQUIRES_INPUT}),
    Status.REQUIRES_INPUT: frozenset({Status.REQUIRES_INPUT, Status.PROCESSING, Status.CANCELED}),
    Status.PROCESSING: frozenset({Status.VERIFIED, Status.REQUIRES_INPUT}),
    Status.VERIFIED: frozenset({Status.VERIFIED, Status.REDACTED}),
    Status.CANCELED: frozenset({Status.CANCELED, Status.REDACTED}),
    Status.REDACTED: frozenset(),
}

FINAL = frozenset({Status.VERIFIED, Status.CANCELED})

# Within one second a check may start and fail, while a user cannot resubmit that fast: so
# requires_input ranks above processing.
STEP_RANKS = {
    EVENT_TYPE_PREFIX + "created": 0,
    EVENT_TYPE_PREFIX + "processing": 1,
    EVENT_TYPE_PREFIX + "requires_input": 2,
    EVENT_TYPE_PREFIX + "verified": 3,
    EVENT_TYPE_PREFIX + "canceled": 3,
    EVENT_TYPE_PREFIX + "redacted": 4,
}
OTHER_STEP_RANK = 2
_REDACTED = EVENT_TYPE_PREFIX + "redacted"

# Stripe's ids are letters and digits behind `vs_`, so no session of Stripe's begins so; and since
# events are signed, nobody but a holder of the signing secret can send one that does.
SELFTEST_PREFIX = "vs_selftest_"

# One digit for the step below eleven for the seconds; the two ranks above.
_CREATED_UNIT = 10
_FINAL_UNIT = _CREATED_UNIT * 10**11
_REDACTION_UNIT = _FINAL_UNIT * 10


class SessionChange(Discreet, frozen=True, kw_only=True, gc=False):
    """What one event says of its session: the allow list of all that may leave the process.

    `metadata` and `client_reference_id` are yours: handlers receive them, `repr` does not tell.

    Attributes:
        event_id: Stripe's event id; the id of the message on every queue.
        event_type: Stripe's event type.
        occurred_at: When Stripe created the event (whole seconds, UTC).
        livemode: False for test mode; None when the event does not say.
        account: The connected account the event is of; None for one's own.
        session_id: The `vs_…` id.
        session_type: `document`, `id_number`, `verification_flow` or a newer word.
        current: The status now; `redacted` once redaction has finished.
        last_error_code: Why the latest attempt failed, as Stripe's word.
        redaction_status: `processing`, `redacted`, `validated` or a newer word.
        report_id: The latest verification report's `vr_…` id.
        client_reference_id: Your own reference, as you gave it to Stripe.
        related_customer: A `cus_…` id.
        related_customer_account: The id of an account acting as customer.
        related_person: The person and the account it belongs to.
        metadata: Your own keys and values, as you gave them to Stripe.
        traceparent: Where in a trace it was received (W3C Trace Context); absent without one.
    """

    shown: ClassVar[tuple[str, ...]] = ("event_id", "event_type", "session_id", "current")

    event_id: str
    event_type: str
    occurred_at: datetime
    livemode: bool | None = None
    account: str | None = None
    session_id: str
    session_type: str | None = None
    current: str
    last_error_code: str | None = None
    redaction_status: str | None = None
    report_id: str | None = None
    client_reference_id: str | None = None
    related_customer: str | None = None
    related_customer_account: str | None = None
    related_person: RelatedPerson | None = None
    metadata: dict[str, str] | None = None
    traceparent: str | msgspec.UnsetType = msgspec.UNSET


class StatusTransition(SessionChange, frozen=True, kw_only=True, gc=False):
    """One real change of one session, as every handler receives it. Holds no secret.

    Attributes:
        previous: The status before; None when the ledger had no memory of the session.
        sequence: 1, 2, 3 … without a gap within *epoch*.
        epoch: When the numbering began, in Unix milliseconds: with the ledger's record of this
            session, or anew where Redis may have lost transitions. A later one is greater.
        expected: False when no such step is known: an earlier event was missed (see `FOLLOWS`).
        replay: Which replay this is part of, when an operator asked for it to come again.
    """

    shown = (*SessionChange.shown, "previous", "sequence", "epoch", "replay")

    previous: str | None = None
    sequence: int
    epoch: int
    expected: bool
    replay: str | None = None


def is_selftest(session_id: str) -> bool:
    """Say whether a session is one of `selftest`'s own: settled by every handler, shown to none."""
    return session_id.startswith(SELFTEST_PREFIX)


def is_expected(previous: str | None, current: str) -> bool:
    """Say whether `FOLLOWS` lists the step; words it does not know are never held against it."""
    if current not in FOLLOWS:
        return True
    followers = FOLLOWS.get(previous)
    return followers is None or current in followers


def current_status(event_type: str, session: VerificationSession) -> str:
    """Return what the session now is: Stripe's word, or `redacted` once that has finished."""
    redacted = _redaction_rank(event_type, session) == 2  # noqa: PLR2004 - the rank's own scale
    return Status.REDACTED if redacted else session.status


def position(event_type: str, created: int, session: VerificationSession) -> int:
    """Return where this event stands in the life of its session, computed from it alone.

    The digits, highest first: redaction rank, final rank, *created* in eleven digits (Unix
    seconds), step rank. So redaction absorbs, final statuses stick, and the rest goes by time.
    The result stays below 2**53, exact in Lua's numbers.
    """
    return (
        _redaction_rank(event_type, session) * _REDACTION_UNIT
        + (session.status in FINAL) * _FINAL_UNIT
        + created * _CREATED_UNIT
        + STEP_RANKS.get(event_type, OTHER_STEP_RANK)
    )


def created_at(position: int) -> int:
    """Return the *created* that went into a position, in Unix seconds."""
    return position % _FINAL_UNIT // _CREATED_UNIT


def fingerprint(current: str, session: VerificationSession) -> str:
    """Return 16 hex digits that differ when something changed that a handler would care about.

    Args:
        current: As `current_status` says.
        session: The session as the event shows it.
    """
    parts = (
        current,
        session.status,
        session.redaction_status,
        session.last_error_code,
        session.report_id,
    )
    return blake2b(msgspec.json.encode(parts), digest_size=8).hexdigest()


def _redaction_rank(event_type: str, session: VerificationSession) -> int:
    """Return 0 for none, 1 for under way or an unknown word, 2 for redacted, by word or type."""
    status = session.redaction_status
    if status == "redacted" or event_type == _REDACTED:
        return 2
    return 0 if status is None else 1
