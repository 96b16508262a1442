"""service.testing: the sample transitions with which users test their handlers."""

from __future__ import annotations

import pytest

from service.testing import transition


def test_the_default_is_a_session_that_has_just_been_verified() -> None:
    """Without arguments, the session went from `processing` to `verified`."""
    found = transition()

    statuses = (found.previous, found.current, found.stripe_status)
    assert statuses == ("processing", "verified", "verified")
    assert found.event_type.endswith(".verified")
    assert (found.expected, found.reversal) == (True, False)


def test_other_fields_follow_from_the_statuses() -> None:
    """Event type, `stripe_status`, `expected` and `reversal` follow, unless they are given."""
    rejected = transition(previous="verified", current="requires_input")
    redacted = transition(previous="verified", current="redacted")

    assert rejected.event_type.endswith(".requires_input")
    assert rejected.stripe_status == "requires_input"
    assert (rejected.reversal, rejected.expected) == (True, True)
    assert (redacted.reversal, redacted.stripe_status) == (False, "verified")
    assert redacted.client_reference_id is None
    assert not transition(previous="requires_input").expected
    assert transition(previous="requires_input", expected=True).expected
    assert transition(event_type="x", stripe_status="y").event_type == "x"


def test_an_unknown_field_is_an_error() -> None:
    """A misspelt field raises, instead of having no effect."""
    with pytest.raises(TypeError):
        transition(statsu="verified")
