"""The statuses of a session, and which may follow which."""

from __future__ import annotations

import pytest

from service.stripe.events import EVENT_TYPE_PREFIX
from service.stripe.verification_session import Redaction, VerificationSession
from service.transitions.lifecycle import (
    NEXT_STATUSES,
    Status,
    current_status,
    is_expected,
    is_reversal,
)


@pytest.mark.parametrize(
    ("previous", "current", "expected"),
    [
        ("verified", "requires_input", True),
        ("verified", "processing", True),
        ("verified", "canceled", True),
        ("canceled", "requires_input", True),
        ("canceled", "some_new_word", True),
        ("verified", "verified", False),
        ("verified", "redacted", False),
        ("canceled", "redacted", False),
        ("requires_input", "verified", False),
        ("redacted", "verified", False),
        (None, "verified", False),
    ],
)
def test_reversals(previous: str | None, current: str, expected: bool) -> None:
    """Every status after a final one reverses it, except itself and redacted."""
    assert is_reversal(previous, current) is expected


@pytest.mark.parametrize("redaction", [None, "processing", "validated", "new word", "redacted"])
@pytest.mark.parametrize("step", ["created", "verified", "redacted", "newer"])
def test_current_status(step: str, redaction: str | None) -> None:
    """The status is Stripe's, or `redacted` if the redaction status or the event type says so."""
    session = VerificationSession(
        id="vs_1", status="verified", redaction=Redaction(status=redaction)
    )
    expected = "redacted" if "redacted" in (redaction, step) else "verified"

    assert current_status(EVENT_TYPE_PREFIX + step, session) == expected


@pytest.mark.parametrize("previous", [*NEXT_STATUSES, "requires_action"])
@pytest.mark.parametrize("current", ["requires_action", "", "VERIFIED"])
def test_unknown_statuses_are_expected(previous: str | None, current: str) -> None:
    """A step from or to a status that the table does not know counts as expected."""
    assert is_expected(previous, current)
    assert all(is_expected(current, known) for known in Status)


def test_expected_is_what_the_table_lists() -> None:
    """Between known statuses, exactly the steps in the table are expected."""
    steps = {
        (previous, current)
        for previous in NEXT_STATUSES
        for current in Status
        if is_expected(previous, current)
    }

    assert steps == {
        (previous, current) for previous, then in NEXT_STATUSES.items() for current in then
    }
    assert set(NEXT_STATUSES) == {None, *Status}
