"""The rules of ordering for the checker, from the model that the admission tests use.

It uses no code of the service, so that a mistake there cannot hide itself.
"""

from __future__ import annotations

from copy import copy

from tests.support.session_record_model import Record, state_of, status_of
from tests.system.chaos.evidence import Event

PREFIX = "identity.verification_session."


def is_ours(event: Event) -> bool:
    """Say whether an event is about a verification session at all."""
    return event.type.startswith(PREFIX)


def outcome(record: Record, event: Event) -> str:
    """Return the outcome of an event that is new and not too old."""
    if record.is_late(event.fields):
        return "late"
    return "unchanged" if state_of(event.fields) == record.state else "admitted"


def after(record: Record, event: Event) -> Record:
    """Return the record after an event that is not late."""
    changed = copy(record)
    changed.move_up(event.fields)
    changed.state, changed.status = state_of(event.fields), status_of(event.fields)
    return changed
