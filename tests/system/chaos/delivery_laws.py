"""The laws of delivery, and of what a run leaves behind: texts, memory, files, exit codes.

Each law yields its violations.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from tests.system.chaos.evidence import Call, Mark, Place, Transition
from tests.system.chaos.facts import Facts

# The allowed growth from early in the run to its quiet end: pools keep their connections, and the
# allocator keeps the memory of hundreds of concurrent requests.
MEMORY_GROWTH_MIB = 48.0
DESCRIPTOR_GROWTH = 40
CONNECTION_GROWTH = 60
# An entry is quarantined after two deaths of its worker, and dead-lettered after the third.
FEWEST_EXITS = 3


def undelivered(facts: Facts) -> Iterator[str]:
    """Each transition was accepted by each handler, is its dead letter, or was deleted."""
    wanted = {*facts.run.transitions} - {*facts.run.deleted}
    for handler, taken in facts.taken.items():
        done = {one.place for one in taken} | facts.dead_lettered.get(handler, set())
        for one in wanted:
            if one.place not in done and one.place.session_id not in facts.excused:
                yield f"{one.event_id} to {handler}"


def unknown_delivery(facts: Facts) -> Iterator[str]:
    """Only transitions of the streams are delivered."""
    for handler, calls in facts.calls_by_handler():
        for one in {call.transition for call in calls} - facts.transitions:
            yield f"{one.event_id} to {handler}"


def out_of_order(facts: Facts) -> Iterator[str]:
    """A call begins only after the earlier ones of its session are accepted or dead-lettered."""
    places: dict[str, list[Place]] = defaultdict(list)
    for one in facts.transitions:
        places[one.place.session_id].append(one.place)
    deleted = {one.place for one in facts.run.deleted}
    for handler, calls in facts.calls_by_handler():
        done = facts.dead_lettered.get(handler, set()) | deleted
        for mark, one, _ in calls:
            missing = [p for p in places[one.place.session_id] if p < one.place and p not in done]
            if missing:
                yield f"{one.place} to {handler} before {min(missing)}"
            if mark is Mark.TOOK:
                done.add(one.place)


def repeat_ahead(facts: Facts) -> Iterator[str]:
    """A repeated delivery has no place above those that the consumer has seen."""
    for handler, taken in facts.taken.items():
        last: dict[str, Place] = {}
        seen: set[str] = set()
        for one in taken:
            place = one.place
            before = last.get(place.session_id)
            is_repeat = one.event_id in seen and place.session_id not in facts.excused
            if is_repeat and before and place > before:
                yield f"{one.event_id} again at {place} to {handler}"
            seen.add(one.event_id)
            last[place.session_id] = max(place, before or place)


def slow_delivery(facts: Facts) -> Iterator[str]:
    """Events acknowledged within a bound's time are delivered within its limit.

    Sessions whose handler failed or refused a call may wait, and thin events are fetched first.
    """
    deleted = {one.place for one in facts.run.deleted}
    for bound in facts.run.bounds:
        for handler in bound.handlers:
            calls = facts.run.calls.get(handler, ())
            taken_at, held_up = _taken_at(calls), _held_up(calls)
            for one in facts.transitions:
                acknowledged_at = facts.acknowledged_at(one.event_id)
                waits = one.place.session_id in held_up | facts.excused or one.place in deleted
                waits = waits or one.event_id in facts.run.thin
                if waits or not bound.since <= acknowledged_at <= bound.until:
                    continue
                took_s = taken_at.get(one.event_id, float("inf")) - acknowledged_at
                if took_s > bound.within_s:
                    yield f"{one.event_id} to {handler} after {took_s:.1f} s, {bound.cause}"


def _taken_at(calls: Sequence[Call]) -> dict[str, float]:
    found: dict[str, float] = {}
    for call in calls:
        if call.mark is Mark.TOOK:
            found.setdefault(call.transition.event_id, call.at)
    return found


def _held_up(calls: Sequence[Call]) -> set[str]:
    return {
        call.transition.place.session_id
        for call in calls
        if call.mark not in {Mark.BEGAN, Mark.TOOK}
    }


def consumer_behind(facts: Facts) -> Iterator[str]:
    """A consumer that follows the README's rule ends with the recorded status of each session.

    Where Redis forgot a transition that the consumer saw, this holds after the next change.
    """
    changed_again, deleted = (
        facts.changed_again(),
        {one.place.session_id for one in facts.run.deleted},
    )
    for handler, taken in facts.taken.items():
        believed = _consumed(taken)
        dead_lettered = {place.session_id for place in facts.dead_lettered.get(handler, ())}
        for session_id, record in facts.run.records.items():
            is_settled = session_id not in dead_lettered | deleted
            is_known = session_id not in facts.excused or session_id in changed_again
            if not (record.sequence and is_settled and is_known):
                continue
            if believed.get(session_id) != record.status:
                yield f"{session_id} is {record.status}, {believed.get(session_id)} at {handler}"


def _consumed(taken: Sequence[Transition]) -> dict[str, str]:
    """Return each session's status by the rule: ignore what is not above the last place."""
    last: dict[str, tuple[int, int]] = {}
    believed: dict[str, str] = {}
    for one in taken:
        place = (one.place.epoch, one.place.sequence)
        if place > last.get(one.place.session_id, (0, 0)):
            last[one.place.session_id] = place
            believed[one.place.session_id] = one.current
    return believed


def wrong_dead_letter(facts: Facts) -> Iterator[str]:
    """A dead letter was refused by its sink, failed often enough, or ended its worker."""
    for handler, dead_letters in facts.run.dead_letters.items():
        marks = Counter(
            (call.mark, call.transition.place) for call in facts.run.calls.get(handler, ())
        )
        for dead_letter in dead_letters:
            place = dead_letter.transition.place
            enough = {
                "exhausted": marks[Mark.FAILED, place] >= facts.run.attempts,
                "killed_worker": marks[Mark.EXITED, place] >= FEWEST_EXITS,
            }
            asked = enough.get(dead_letter.reason, marks[Mark.REFUSED, place] > 0)
            if handler in facts.run.steady or not asked:
                yield f"{dead_letter.transition.event_id} to {handler}, {dead_letter.reason}"


def unsettled(facts: Facts) -> Iterator[str]:
    """In the end no handler has unacknowledged transitions."""
    yield from (f"{count} of {name}" for name, count in facts.run.unsettled.items() if count)


def canary(facts: Facts) -> Iterator[str]:
    """Each canary is only in the places that it may be in; a secret's in none."""
    for word, places in facts.run.canaries.items():
        for where, text in facts.run.texts.items():
            if word in text and not where.startswith(places):
                yield f"{word.decode()} in {where}"


def memory(facts: Facts) -> Iterator[str]:
    """The memory of a process does not grow."""
    for process, before in facts.run.before.items():
        grown = facts.run.after[process].memory_mib - before.memory_mib
        if grown > MEMORY_GROWTH_MIB:
            yield f"{process} by {grown:.0f} MiB"


def descriptors(facts: Facts) -> Iterator[str]:
    """The open files of a process do not grow."""
    for process, before in facts.run.before.items():
        grown = facts.run.after[process].descriptors - before.descriptors
        if grown > DESCRIPTOR_GROWTH:
            yield f"{process} by {grown}"


def connections(facts: Facts) -> Iterator[str]:
    """The connections to Redis do not grow."""
    before, after = facts.run.connections
    if after - before > CONNECTION_GROWTH:
        yield f"from {before} to {after}"


def unclean_end(facts: Facts) -> Iterator[str]:
    """A process that gets SIGTERM exits with 0."""
    yield from (f"{process} with {code}" for process, code in facts.run.exits.items() if code)
