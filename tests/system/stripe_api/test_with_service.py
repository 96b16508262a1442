"""The service takes what the stand-in pushes, and ends where the stand-in does."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tests.support.harness import SECRET
from tests.support.processes import open_sandbox
from tests.support.stripe_api import StripeStandIn
from tests.support.waiting import until

# What happens to a session after its creation: methods of `Lifecycle`, each with its arguments.
LIVES = (
    "cancel",
    "redact, finish_redaction",
    "reject consent_declined, submit",
    "submit, verify",
    "submit, reject selfie_face_mismatch, submit, verify, redact, finish_redaction",
    "submit, verify, override requires_input",
    "submit, reject document_expired, override verified",
)
TIMES = 6
# The minimum of seconds before a change: people are slower than checks and requests. Within less,
# nothing in the events shows which of them came first.
MIN_WAIT_S = {"submit": 6, "override": 1}


def live(stand_in: StripeStandIn, life: str, random: Random) -> None:
    """Take a new session through a life, often with several changes in one second."""
    session = stand_in.sessions.create()
    for change in life.split(", "):
        method, *arguments = change.split()
        wait_s = MIN_WAIT_S.get(method, 0)
        stand_in.clock.advance(random.randint(wait_s, wait_s + 2))
        getattr(stand_in.sessions, method)(session.id, *arguments)


def final_states(stand_in: StripeStandIn) -> dict[str, str]:
    """Return the state of each session as the service names it."""
    return {
        one.id: "redacted" if one.redaction == "redacted" else one.status
        for one in stand_in.sessions.all.values()
    }


async def test_sessions_end_in_the_service_as_at_stripe(tmp_path: Path) -> None:
    """Out of order, some twice, through a receiver and a worker."""
    stand_in, random = StripeStandIn(), Random(14)
    stand_in.clock.advance(-3600)
    with open_sandbox(tmp_path) as sandbox:
        receiver, worker = sandbox.start("serve").ready(), sandbox.start("work").ready()
        stand_in.subscribe(receiver.url, secret=SECRET.reveal().decode())
        stand_in.pushes.max_delay_s = 5
        stand_in.pushes.duplicate_share = 0.2
        for life in LIVES * TIMES:
            live(stand_in, life, random)
        stand_in.clock.advance(3600)
        assert await stand_in.pushes.push_due() > len(stand_in.events.all)
        assert {one.status for one in stand_in.pushes.attempts} == {200}

        def arrived() -> bool:
            lines = worker.lines("transition")
            states = {line["session_id"]: line["current"] for line in lines}
            return states == final_states(stand_in)

        await until(arrived)
