"""Lives of sessions: what happens to them after their creation, and the pauses between."""

from __future__ import annotations

from random import Random
from typing import Any, Final

from .sessions import Session
from .stand_in import StripeStandIn

# Methods of `Lifecycle`, each with its arguments.
LIVES: Final = (
    "cancel",
    "redact, finish_redaction",
    "reject consent_declined, submit, verify",
    "submit, verify",
    "submit, reject selfie_face_mismatch, submit, verify, redact, finish_redaction",
    "submit, verify, override requires_input",
    "submit, reject document_expired, override verified",
)
# The minimum of seconds before a change: people are slower than checks and requests. Within less,
# nothing in the events shows which of them came first.
MIN_WAIT_S: Final = {"submit": 6, "override": 1}
MAX_EXTRA_WAIT_S: Final = 2


def max_duration_s(life: str) -> int:
    """Return how many seconds a life takes at most."""
    methods = [change.split()[0] for change in life.split(", ")]
    return sum(MIN_WAIT_S.get(method, 0) + MAX_EXTRA_WAIT_S for method in methods)


MAX_LIFE_S: Final = max(map(max_duration_s, LIVES))


def live(stand_in: StripeStandIn, life: str, random: Random, **given: Any) -> Session:
    """Take a new session through a life, often with several changes in one second."""
    session = stand_in.sessions.create(**given)
    for change in life.split(", "):
        method, *arguments = change.split()
        wait_s = MIN_WAIT_S.get(method, 0)
        stand_in.clock.advance(random.randint(wait_s, wait_s + MAX_EXTRA_WAIT_S))
        getattr(stand_in.sessions, method)(session.id, *arguments)
    return session


def final_states(stand_in: StripeStandIn) -> dict[str, str]:
    """Return what each session is, in the words of the service."""
    return {
        one.id: "redacted" if one.redaction == "redacted" else one.status
        for one in stand_in.sessions.all.values()
    }
