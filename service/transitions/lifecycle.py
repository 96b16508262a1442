"""The lifecycle of a session: its statuses, and which may follow which.

The order of its events is decided in `ordering`.
Stripe's lifecycle: https://docs.stripe.com/identity/how-sessions-work
"""

from __future__ import annotations

from enum import StrEnum

from ..stripe.events import EVENT_TYPE_PREFIX
from ..stripe.verification_session import VerificationSession


class Status(StrEnum):
    """The statuses of a session: Stripe's four, and our own REDACTED, which ends every session."""

    REQUIRES_INPUT = "requires_input"
    PROCESSING = "processing"
    VERIFIED = "verified"
    CANCELED = "canceled"
    REDACTED = "redacted"


# The statuses that may follow each status. None stands for a session that is not known yet, whose
# first event should be its creation. `requires_input` follows itself if a user declines before any
# check runs, and it follows `verified` if staff override the result. Final statuses follow
# themselves when redaction begins.
NEXT_STATUSES: dict[str | None, frozenset[str]] = {
    None: frozenset({Status.REQUIRES_INPUT}),
    Status.REQUIRES_INPUT: frozenset({Status.REQUIRES_INPUT, Status.PROCESSING, Status.CANCELED}),
    Status.PROCESSING: frozenset({Status.VERIFIED, Status.REQUIRES_INPUT}),
    Status.VERIFIED: frozenset({Status.VERIFIED, Status.REQUIRES_INPUT, Status.REDACTED}),
    Status.CANCELED: frozenset({Status.CANCELED, Status.REDACTED}),
    Status.REDACTED: frozenset(),
}

FINAL = frozenset({Status.VERIFIED, Status.CANCELED})

# The order of event types within one second. A check may start and fail within a second, but no
# user resubmits that fast: so requires_input ranks above processing.
TYPE_RANKS = {
    EVENT_TYPE_PREFIX + "created": 0,
    EVENT_TYPE_PREFIX + "processing": 1,
    EVENT_TYPE_PREFIX + "requires_input": 2,
    EVENT_TYPE_PREFIX + "verified": 3,
    EVENT_TYPE_PREFIX + "canceled": 3,
    EVENT_TYPE_PREFIX + "redacted": 4,
}
_REDACTED = EVENT_TYPE_PREFIX + "redacted"


def is_expected(previous: str | None, current: str) -> bool:
    """Say whether *current* may follow *previous*; it may if either status is unknown."""
    if current not in NEXT_STATUSES:
        return True
    followers = NEXT_STATUSES.get(previous)
    return followers is None or current in followers


def is_reversal(previous: str | None, current: str) -> bool:
    """Say whether a final status changed into another one that is not `redacted`."""
    return previous in FINAL and current not in (previous, Status.REDACTED)


def current_status(event_type: str, session: VerificationSession) -> str:
    """Return the status of the session: Stripe's, or `redacted` once redaction has finished."""
    is_redacted = session.redaction_status == Status.REDACTED or event_type == _REDACTED
    return Status.REDACTED if is_redacted else session.status
