"""The laws of responses: to Stripe in time, to hostile clients no success, to probes always.

Each law yields its violations.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.system.chaos import ordering
from tests.system.chaos.facts import Facts

# Long enough for a busy machine, and far below what a blocked process takes to answer.
MAX_PROBE_S = 3.0


def slow_acknowledgement(facts: Facts) -> Iterator[str]:
    """Events first sent within a bound's time are acknowledged within its limit."""
    for bound in facts.run.bounds:
        if bound.handlers:
            continue
        for event_id, answers in facts.answers.items():
            asked_at = min(answer.asked_at for answer in answers)
            took_s = facts.acknowledged_at(event_id) - asked_at
            if bound.since <= asked_at <= bound.until and took_s > bound.within_s:
                yield f"{event_id} after {took_s:.1f} s, {bound.cause}"


def wrongly_expired(facts: Facts) -> Iterator[str]:
    """Only an event that is too old by the true time is called expired."""
    for answer in facts.run.answers:
        event = facts.run.events[answer.event_id]
        is_too_old = event.created < answer.answered_at - facts.run.horizon_s
        if answer.word == "expired" and ordering.is_ours(event) and not is_too_old:
            yield f"{event.id} by {answer.receiver}"


def hostile_mishandled(facts: Facts) -> Iterator[str]:
    """A request that is not genuine gets no success, and no server error but 503."""
    for answer in facts.run.hostile_responses:
        if answer.status < 300 or (answer.status >= 500 and answer.status != 503):
            yield f"{answer.status} for {answer.kind}"


def not_live(facts: Facts) -> Iterator[str]:
    """`/livez` answers 200 within a moment as long as the process runs."""
    for probe in facts.run.probes:
        if probe.status != 200 or probe.took_s > MAX_PROBE_S:
            yield f"{probe.process}: {probe.status} after {probe.took_s:.1f} s"
