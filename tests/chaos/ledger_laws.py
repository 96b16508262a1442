"""The laws of the way in: what Stripe was told, what the ledger holds, and in which order.

Each yields what breaks it. What Redis was allowed to forget is excused, and counted elsewhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise

import ordering
from evidence import Event, Place, Remembered, Transition
from facts import PASSED_BY, Facts


def unacknowledged(facts: Facts) -> Iterator[str]:
    """Sent again for long enough, every event is acknowledged."""
    yield from facts.run.events.keys() - facts.acknowledged.keys()


def refused(facts: Facts) -> Iterator[str]:
    """Nobody but a receiver with a wrong clock refuses what is genuine."""
    for answer in facts.run.answers:
        status = answer.status or 0
        is_refusal = 300 <= status < 500
        if is_refusal and answer.receiver not in facts.run.skewed:
            yield f"{answer.event_id} {status} {answer.word} by {answer.receiver}"


def broke_down(facts: Facts) -> Iterator[str]:
    """Of all answers above 499 there is 503 only, and nothing is ever traced back in a log."""
    for answer in facts.run.answers:
        status = answer.status or 0
        if status >= 500 and status != 503:
            yield f"{answer.event_id} {status} by {answer.receiver}"
    for where, text in facts.run.texts.items():
        if where.startswith("log") and b"Traceback" in text:
            yield f"a traceback in {where}"


def lost(facts: Facts) -> Iterator[str]:
    """What was acknowledged is in the ledger."""
    yield from (event.id for event in facts.kept() if not facts.is_known(event))


def not_durable(facts: Facts) -> Iterator[str]:
    """What was acknowledged before Redis ended is there when Redis is back."""
    for crash in facts.run.crashes:
        for event in facts.kept():
            earliest = min(answer.answered_at for answer in facts.acknowledged[event.id])
            if earliest < crash.at and event.id not in crash.survived:
                yield event.id


def admitted_twice(facts: Facts) -> Iterator[str]:
    """Of all copies of an event one at most is not called a duplicate."""
    for event in facts.events():
        words = [word for word in facts.words(event) if word not in PASSED_BY]
        if len(words) > 1:
            yield f"{event.id} {' '.join(words)}"


def wrong_verdict(facts: Facts) -> Iterator[str]:
    """What was said is what the ledger holds, and what the rules of ordering allow."""
    for event in facts.events():
        words, right = {*facts.words(event)}, _right_word(facts, event)
        if right is not None and words - {right}:
            yield f"{event.id} was called {' '.join(sorted(words))}, not {right}"
    for session_id, record in facts.run.records.items():
        if session_id not in facts.excused:
            sent = {one: said for one, said in record.events.items() if one in facts.run.events}
            yield from (f"{one} was never sent" for one in record.events.keys() - sent.keys())
            yield from _misjudged(facts.run.events, sent)


def _right_word(facts: Facts, event: Event) -> str | None:
    """Return the only word, but for duplicate, that may have been said to an event."""
    if not ordering.is_ours(event):
        return "ignored"
    first = min((answer.asked_at for answer in facts.answers[event.id]), default=0.0)
    if event.created < first - facts.run.horizon_s:
        return "expired"
    record = facts.run.records.get(event.session_id)
    remembered = record.events.get(event.id) if record else None
    return remembered.outcome if remembered else None


def _misjudged(events: Mapping[str, Event], remembered: Mapping[str, Remembered]) -> Iterator[str]:
    """Yield the events of one session whose verdict no order of arrival can explain."""
    life = sorted(
        (said.sequence, events[one])
        for one, said in remembered.items()
        if said.outcome == "admitted"
    )
    at = dict(life)
    highest = {sequence: ordering.position(event) for sequence, event in life}
    for one, said in remembered.items():
        if said.outcome == "unchanged":
            base = at.get(said.sequence)
            if base is None or not _echoes(base, events[one]):
                yield f"{one} is unchanged in the ledger"
            else:
                moved = ordering.position(events[one])
                highest[said.sequence] = max(highest[said.sequence], moved)
    for one, said in remembered.items():
        if said.outcome == "late":
            limit = highest.get(said.sequence)
            if limit is None or ordering.position(events[one]) >= limit:
                yield f"{one} is late in the ledger"
    for (sequence, before), (_, after) in pairwise(life):
        news = ordering.substance(before) != ordering.substance(after)
        if not news or ordering.position(after) < highest[sequence]:
            yield f"{after.id} is admitted in the ledger"


def _echoes(before: Event, after: Event) -> bool:
    same = ordering.substance(before) == ordering.substance(after)
    return same and ordering.position(after) >= ordering.position(before)


def gap(facts: Facts) -> Iterator[str]:
    """A session's transitions count 1, 2, 3 … in the ledger and on the streams alike."""
    streamed: dict[tuple[str, int], list[int]] = defaultdict(list)
    for one in facts.transitions:
        streamed[one.place.session_id, one.place.epoch].append(one.place.sequence)
    for session_id, record in facts.run.records.items():
        if session_id in facts.excused:
            continue
        counted = [*range(1, record.sequence + 1)]
        admitted = [one.sequence for one in record.events.values() if one.outcome == "admitted"]
        if sorted(admitted) != counted:
            yield f"{session_id} has {sorted(admitted)} in the ledger"
        found = streamed.pop((session_id, record.epoch), [])
        if sorted(found) != counted:
            yield f"{session_id} has {sorted(found)} on the streams, {record.sequence} counted"
    for (session_id, epoch), found in streamed.items():
        if session_id not in facts.excused:
            yield f"{session_id} has {sorted(found)} in an epoch of its own, {epoch}"


def shared_sequence(facts: Facts) -> Iterator[str]:
    """A place in a session's life is one event's, and an event's place is one, for everybody."""
    places: dict[str, set[Place]] = defaultdict(set)
    events: dict[Place, set[str]] = defaultdict(set)
    for one in facts.ways_out():
        places[one.event_id].add(one.place)
        events[one.place].add(one.event_id)
    yield from (f"{one} at {len(at)} places" for one, at in places.items() if len(at) > 1)
    yield from (f"{place} of {' '.join(sorted(of))}" for place, of in events.items() if len(of) > 1)


def not_newest(facts: Facts) -> Iterator[str]:
    """In the end a session is what its newest event says, in the ledger and on the streams."""
    last: dict[str, Transition] = {}
    for one in sorted(facts.transitions, key=lambda one: one.place):
        last[one.place.session_id] = one
    for session_id, record in facts.run.records.items():
        events = [facts.run.events[one] for one in record.events if one in facts.run.events]
        if session_id in facts.excused or not events:
            continue
        highest = max(map(ordering.position, events))
        right = {ordering.current(one) for one in events if ordering.position(one) == highest}
        if record.status not in right or ordering.stored_position(record.position) != highest:
            yield f"{session_id} is {record.status} in the ledger, not {' '.join(right)}"
        if session_id in last and last[session_id].current not in right:
            yield f"{session_id} ends as {last[session_id].current}, not {' '.join(right)}"
