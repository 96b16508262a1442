"""The laws of admission: responses to Stripe, session records, sequence numbers, their order.

Each law yields its violations. What Redis was allowed to forget is excused; `checker` counts it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

from tests.support.session_record_model import Order, Record, order_of
from tests.system.chaos import ordering
from tests.system.chaos.evidence import Event, Place, Remembered, Transition
from tests.system.chaos.facts import NOT_RECORDED, Facts

# A server may admit for a moment after the time that was noted for its end.
SLACK_S = 1.0
# The record of a session without events; it is copied, never changed.
NEW = Record()


def unacknowledged(facts: Facts) -> Iterator[str]:
    """Every event that is sent often enough is acknowledged."""
    yield from facts.run.events.keys() - facts.run.unsent - facts.acknowledged.keys()


def refused(facts: Facts) -> Iterator[str]:
    """A genuine event is rejected only by a receiver with a wrong clock."""
    for answer in facts.run.answers:
        status = answer.status or 0
        is_refusal = 300 <= status < 500
        if is_refusal and answer.receiver not in facts.run.skewed:
            yield f"{answer.event_id} {status} {answer.word} by {answer.receiver}"


def broke_down(facts: Facts) -> Iterator[str]:
    """No response but 503 has a status above 499, and no log has a traceback."""
    for answer in facts.run.answers:
        status = answer.status or 0
        if status >= 500 and status != 503:
            yield f"{answer.event_id} {status} by {answer.receiver}"
    for where, text in facts.run.texts.items():
        if where.startswith("log") and b"Traceback" in text:
            yield f"a traceback in {where}"


def lost(facts: Facts) -> Iterator[str]:
    """What was acknowledged is in its session's record."""
    yield from (event.id for event in facts.kept() if not facts.is_known(event))


def not_durable(facts: Facts) -> Iterator[str]:
    """What was acknowledged before Redis ended is there after its restart."""
    for crash in facts.run.crashes:
        for event in facts.kept():
            earliest = min(answer.answered_at for answer in facts.acknowledged[event.id])
            known_by = {event.id, facts.run.thin.get(event.id)}
            if earliest < crash.at and not known_by & crash.survived:
                yield event.id


def admitted_twice(facts: Facts) -> Iterator[str]:
    """At most one copy of an event is answered with anything but `duplicate`."""
    for event in facts.events():
        words = [word for word in facts.outcomes(event) if word not in NOT_RECORDED]
        if len(words) > 1:
            yield f"{event.id} {' '.join(words)}"


def wrong_outcome(facts: Facts) -> Iterator[str]:
    """Each outcome is the recorded one, and allowed by the rules of ordering."""
    for event in facts.events():
        words, right = {*facts.outcomes(event)}, _right_word(facts, event)
        if right is not None and words - {right}:
            yield f"{event.id} was called {' '.join(sorted(words))}, not {right}"
    for session_id, record in facts.run.records.items():
        if session_id not in facts.excused:
            sent = {one: said for one, said in record.events.items() if one in facts.run.events}
            yield from (f"{one} was never sent" for one in record.events.keys() - sent.keys())
            recorded = [
                Recorded(event, said, *facts.decided_within(event))
                for event, said in ((facts.run.events[one], said) for one, said in sent.items())
            ]
            if not _explained(recorded):
                outcomes = " ".join(
                    f"{one.event.id}={one.said.outcome},{one.said.sequence}" for one in recorded
                )
                yield f"no order of arrival explains {outcomes} in the record of {session_id}"


def _right_word(facts: Facts, event: Event) -> str | None:
    """Return the only outcome, besides `duplicate`, that an event may have."""
    if not ordering.is_ours(event):
        return "ignored"
    first = min((answer.asked_at for answer in facts.answers[event.id]), default=0.0)
    if event.created < first - facts.run.horizon_s:
        return "expired"
    record = facts.run.records.get(event.session_id)
    remembered = record.events.get(event.id) if record else None
    return remembered.outcome if remembered else None


class Recorded(NamedTuple):
    """An event, its recorded outcome, and the earliest and latest time at which it was decided."""

    event: Event
    said: Remembered
    earliest: float
    latest: float

    def may_precede(self, others: Sequence[Recorded]) -> bool:
        """Say whether it may have been decided before all *others*."""
        return all(self.earliest <= one.latest for one in others)


def _explained(recorded: Sequence[Recorded], record: Record = NEW, sequence: int = 0) -> bool:
    """Say whether the rules give the recorded outcomes in an order that the times allow.

    Each sequence number is one more than the last, or the first of an epoch that began meanwhile.
    """
    left = [*recorded]
    while (late := _next_late(left, record, sequence)) is not None:
        left.remove(late)
    for number, one in enumerate(left):
        event, said = one.event, one.said
        rest = left[:number] + left[number + 1 :]
        expected = {"admitted": {1, sequence + 1}, "unchanged": {sequence}}.get(said.outcome, set())
        is_right = said.sequence in expected and ordering.outcome(record, event) == said.outcome
        may_be_next = is_right and one.may_precede(rest)
        if may_be_next and _explained(rest, ordering.after(record, event), said.sequence):
            return True
    return not left


def _next_late(left: Sequence[Recorded], record: Record, sequence: int) -> Recorded | None:
    """Return an event that may have been late now: it changes nothing, so the sooner the better."""
    for one in left:
        is_late = one.said == Remembered("late", sequence)
        if is_late and ordering.outcome(record, one.event) == "late" and one.may_precede(left):
            return one
    return None


def gap(facts: Facts) -> Iterator[str]:
    """Within an epoch transitions count 1, 2, 3 …, in streams and records alike."""
    streamed: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for one in facts.transitions:
        streamed[one.place.session_id][one.place.epoch].append(one.place.sequence)
    for session_id, record in facts.run.records.items():
        epochs = streamed.pop(session_id, {})
        if session_id in facts.excused:
            continue
        for epoch, found in epochs.items():
            if sorted(found) != [*range(1, len(found) + 1)]:
                yield f"{session_id} has {sorted(found)} on the streams in epoch {epoch}"
        now = (max(epochs, default=0), len(epochs[max(epochs)]) if epochs else 0)
        if now != (record.epoch, record.sequence):
            yield f"{session_id} is at {now} on the streams, not {record.epoch, record.sequence}"
        admitted = [one.sequence for one in record.events.values() if one.outcome == "admitted"]
        if sorted(admitted) != sorted(chain.from_iterable(epochs.values())):
            yield f"{session_id} has {sorted(admitted)} in its record"
    yield from (f"{one} is on the streams only" for one in streamed.keys() - facts.excused)


def needless_epoch(facts: Facts) -> Iterator[str]:
    """A session begins an epoch only after Redis ended or another server took over."""
    ends = [crash.at for crash in facts.run.crashes]
    ends += [window.until for window in facts.run.rollbacks]
    epochs: dict[str, set[int]] = defaultdict(set)
    for one in facts.transitions:
        epochs[one.place.session_id].add(one.place.epoch)
    for session_id, began in epochs.items():
        for before, after in pairwise(sorted(began)):
            if not any(before / 1000 - SLACK_S <= end <= after / 1000 for end in ends):
                yield f"{session_id} from {before} to {after}"


def shared_sequence(facts: Facts) -> Iterator[str]:
    """A place in a session belongs to one event, and an event has one place."""
    places: dict[str, set[Place]] = defaultdict(set)
    events: dict[Place, set[str]] = defaultdict(set)
    for one in facts.deliveries():
        places[one.event_id].add(one.place)
        events[one.place].add(one.event_id)
    yield from (f"{one} at {len(at)} places" for one, at in places.items() if len(at) > 1)
    yield from (f"{place} of {' '.join(sorted(of))}" for place, of in events.items() if len(of) > 1)


def not_newest(facts: Facts) -> Iterator[str]:
    """In the end a session has the status that its events give in order of their creation."""
    last: dict[str, Transition] = {}
    for one in sorted(facts.transitions, key=lambda one: one.place):
        last[one.place.session_id] = one
    for session_id, record in facts.run.records.items():
        events = [facts.run.events[one] for one in record.events if one in facts.run.events]
        if session_id in facts.excused or not events:
            continue
        right = _replayed(events)
        if record.status != right.status:
            yield f"{session_id} is {record.status} in its record, not {right.status}"
        keys = {(order.order_key, order.event_id) for order in map(_order, events)}
        if (record.order_key, record.latest_id) not in keys:
            yield f"{session_id} has {record.order_key} of {record.latest_id} as its latest event"
        if session_id in last and last[session_id].current != right.status:
            yield f"{session_id} ends as {last[session_id].current}, not {right.status}"


def _replayed(events: Sequence[Event]) -> Record:
    record = NEW
    for event in sorted(events, key=_order):
        if ordering.outcome(record, event) != "late":
            record = ordering.after(record, event)
    return record


def _order(event: Event) -> Order:
    return order_of(event.fields)
