"""What is logged and counted of a decided event, whether it came as a webhook or was read."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Final, NamedTuple

from ..stripe.events import Event
from ..telemetry import metrics
from ..transitions.lifecycle import is_reversal
from ..transitions.transition import SessionChange, is_selftest
from .admission import Admission, Outcome

MAX_RECENT_REVERSALS = 200


class NotedReversal(NamedTuple):
    """A reversal that this process has admitted; `at` is Unix time in seconds."""

    at: float
    session_id: str
    previous: str
    current: str
    event_id: str


# Those that `monitoring` has not published yet, the oldest first.
recent_reversals: Final[deque[NotedReversal]] = deque(maxlen=MAX_RECENT_REVERSALS)


def record_decision(
    event: Event, change: SessionChange, admission: Admission
) -> tuple[dict[str, Any], bool]:
    """Count what is unusual; return the fields of the log line, and whether it is a warning."""
    fields: dict[str, Any] = {
        "event_id": event.id,
        "event_type": event.type,
        "session_id": change.session_id,
        **_statuses(admission, change),
        "sequence": admission.sequence,
        "after_final": admission.after_final,
        "last_error_code": change.last_error_code,
        "redaction_status": change.redaction_status,
        "report_id": change.report_id,
        "livemode": change.livemode,
        "account": change.account,
        "endpoint": change.endpoint,
    }
    is_warning = admission.after_final
    if event.skipped_fields:
        metrics.SKIPPED_FIELDS.inc(len(event.skipped_fields))
        fields["skipped_fields"] = event.skipped_fields
        is_warning = True
    if admission.after_final:
        metrics.EVENTS_AFTER_FINAL.inc()
    if fields.get("reversal") and not is_selftest(change.session_id):
        metrics.REVERSALS.inc()
        recent_reversals.append(
            NotedReversal(
                time.time(), change.session_id, fields["previous"], change.current, event.id
            )
        )
        is_warning = True
    return fields, is_warning


def _statuses(admission: Admission, change: SessionChange) -> dict[str, Any]:
    """Return what the session was and is; of an event that changes nothing, what it stays."""
    if admission.outcome is Outcome.ADMITTED:
        return {
            "previous": admission.previous,
            "current": change.current,
            "reversal": is_reversal(admission.previous, change.current),
        }
    if admission.outcome is Outcome.UNCHANGED:
        return {"status": change.current}
    return {"status": admission.previous, "ignored_status": change.current}
