"""The laws of what Stripe's API is asked for: no event is missed. They hold where it can be asked.

Each yields its violations.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.system.chaos import ordering
from tests.system.chaos.evidence import Mark, Transition
from tests.system.chaos.facts import NOT_RECORDED, Facts

# How long the latest change of a session may take to each handler after the last fault.
MAX_STALE_S = 120.0
# Answers and log lines get their times a moment after what they are about.
SLACK_S = 1.0


def missed(facts: Facts) -> Iterator[str]:
    """Every event is in its session's record, whether its webhook was sent or not.

    So are events that Redis was allowed to forget: Stripe still knows them.
    """
    if not facts.run.states:
        return
    for event in facts.run.events.values():
        is_recorded = ordering.is_ours(event) and not NOT_RECORDED & {*facts.outcomes(event)}
        if is_recorded and not facts.is_known(event):
            yield event.id


def not_as_at_stripe(facts: Facts) -> Iterator[str]:
    """In the end the recorded status of each session is that at Stripe."""
    for session_id, status in facts.run.states.items():
        record = facts.run.records.get(session_id)
        if record is None or record.status != status:
            yield f"{session_id} is {record and record.status}, but {status} at Stripe"


def stale(facts: Facts) -> Iterator[str]:
    """Each session's latest change reaches each handler soon after its creation and the faults."""
    for event_id, handler, seconds in staleness(facts):
        if seconds > MAX_STALE_S:
            yield f"{event_id} to {handler} after {seconds:.1f} s"


def staleness(facts: Facts) -> Iterator[tuple[str, str, float]]:
    """Yield the latest event of each session, a handler, and after how many seconds it got it.

    They count from the last fault, or from the event's creation if that was later.
    """
    if not facts.run.states:
        return
    latest: dict[str, Transition] = {}
    for one in sorted(facts.transitions, key=lambda one: one.place):
        latest[one.place.session_id] = one
    for handler, calls in facts.calls_by_handler():
        wanted = {one.event_id for one in latest.values()}
        for call in calls:
            event_id = call.transition.event_id
            if call.mark is Mark.TOOK and event_id in wanted:
                wanted.remove(event_id)
                since = max(facts.run.faults_ended, facts.run.events[event_id].created)
                yield event_id, handler, call.at - since


def false_alarm(facts: Facts) -> Iterator[str]:
    """Only events that no receiver had acknowledged are logged as recovered."""
    for event_id, at, is_recovered in facts.run.decisions:
        is_excused = facts.run.events[event_id].session_id in facts.excused
        was_known = facts.acknowledged_at(event_id) < at - SLACK_S
        if is_recovered and was_known and not is_excused:
            yield f"{event_id} was acknowledged"
