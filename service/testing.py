"""Sample transitions for tests of your own handlers. Nothing in this service uses it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from .stripe.events import EVENT_TYPE_PREFIX
from .transitions.lifecycle import Status, is_expected, is_reversal
from .transitions.transition import StatusTransition


def transition(**changes: Any) -> StatusTransition:
    """Return the transition of a session that has just been verified.

    Args:
        changes: Fields of `StatusTransition` to set. By default `event_type` and `stripe_status`
            fit `current`, `expected` and `reversal` fit `previous` and `current`, and a redacted
            session has no `client_reference_id`.

    Raises:
        TypeError: There is no such field.
    """
    current = changes.get("current", Status.VERIFIED.value)
    previous = changes.get("previous", Status.PROCESSING.value)
    fields: dict[str, Any] = {
        "event_id": "evt_1",
        "event_type": EVENT_TYPE_PREFIX + current,
        "occurred_at": datetime(2026, 1, 1, 12, 0, 2, tzinfo=UTC),
        "livemode": False,
        "session_id": "vs_1",
        "session_type": "document",
        "current": current,
        "stripe_status": Status.VERIFIED.value if current == Status.REDACTED else current,
        "report_id": "vr_1",
        "client_reference_id": None if current == Status.REDACTED else "user_1",
        "metadata": {},
        "previous": previous,
        "sequence": 3,
        "epoch": 1_767_268_800_000,
        "expected": is_expected(previous, current),
        "reversal": is_reversal(previous, current),
    }
    return StatusTransition(**{**fields, **changes})
