"""Laws of the transitions that users test their handlers with."""

from __future__ import annotations

import pytest

from service.testing import transition
from service.transitions.transition import StatusTransition


def test_a_transition_needs_no_words() -> None:
    """Without any change it is the one of a session that has just been verified."""
    found = transition()

    assert isinstance(found, StatusTransition)
    assert (found.previous, found.current, found.stripe_status) == (
        *("processing", "verified", "verified"),
    )
    assert found.expected
    assert not found.reversal


def test_what_follows_from_the_statuses_goes_along() -> None:
    """A reversal says that it is one, and redaction does not hide Stripe's own status."""
    rejected = transition(previous="verified", current="requires_input")
    redacted = transition(previous="verified", current="redacted")

    assert (rejected.reversal, rejected.expected) == (True, True)
    assert rejected.stripe_status == "requires_input"
    assert (redacted.reversal, redacted.stripe_status) == (False, "verified")
    assert not transition(previous="requires_input").expected
    assert transition(previous="requires_input", expected=True).expected


def test_a_field_that_does_not_exist_is_refused() -> None:
    """A misspelt name is an error, not a field without effect."""
    with pytest.raises(TypeError):
        transition(statsu="verified")
