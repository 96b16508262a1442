"""The laws of the way out, and of what a run leaves behind: in sinks, texts and processes.

Each yields what breaks it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from tests.system.chaos.evidence import Call, Mark, Place, Transition
from tests.system.chaos.facts import Facts

# How much more may be held, once all is quiet, than early in the run: pools keep what they opened,
# and the allocator what hundreds of requests in hand at once have taken.
MEMORY_GROWTH_MIB = 48.0
DESCRIPTOR_GROWTH = 40
CONNECTION_GROWTH = 60
# An entry is tried alone after two deaths; that many it must have had a part in.
FEWEST_EXITS = 3


def undelivered(facts: Facts) -> Iterator[str]:
    """Each handler took each transition, or it is a dead letter, or an operator deleted it."""
    wanted = {*facts.run.transitions} - {*facts.run.deleted}
    for handler, taken in facts.taken.items():
        done = {one.place for one in taken} | facts.buried.get(handler, set())
        for one in wanted:
            if one.place not in done and one.place.session_id not in facts.excused:
                yield f"{one.event_id} to {handler}"


def unknown_delivery(facts: Facts) -> Iterator[str]:
    """Nothing is handed over that is not on the streams."""
    for handler, calls in facts.journals():
        for one in {call.transition for call in calls} - facts.transitions:
            yield f"{one.event_id} to {handler}"


def out_of_order(facts: Facts) -> Iterator[str]:
    """No call begins before what comes before it in its session is taken or buried."""
    places: dict[str, list[Place]] = defaultdict(list)
    for one in facts.transitions:
        places[one.place.session_id].append(one.place)
    deleted = {one.place for one in facts.run.deleted}
    for handler, calls in facts.journals():
        done = facts.buried.get(handler, set()) | deleted
        for mark, one, _ in calls:
            missing = [p for p in places[one.place.session_id] if p < one.place and p not in done]
            if missing:
                yield f"{one.place} to {handler} before {min(missing)}"
            if mark is Mark.TOOK:
                done.add(one.place)


def repeat_ahead(facts: Facts) -> Iterator[str]:
    """What comes again is not above what its session's consumer has seen."""
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
    """What is acknowledged in a time of prompt deliveries is delivered promptly.

    Sessions that the handler itself held up, with a failure or a refusal, may wait.
    """
    deleted = {one.place for one in facts.run.deleted}
    for bound in facts.run.bounds:
        for handler in bound.handlers:
            calls = facts.run.journals.get(handler, ())
            taken_at, held_up = _taken_at(calls), _held_up(calls)
            for one in facts.transitions:
                acknowledged_at = facts.acknowledged_at(one.event_id)
                waits = one.place.session_id in held_up | facts.excused or one.place in deleted
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
    """A consumer that follows the README's rule ends with the ledger's status of each session.

    So it does although Redis has forgotten something that the consumer saw, as soon as the session
    has changed again.
    """
    moved_on, deleted = facts.moved_on(), {one.place.session_id for one in facts.run.deleted}
    for handler, taken in facts.taken.items():
        believed = _consumed(taken)
        buried = {place.session_id for place in facts.buried.get(handler, ())}
        for session_id, record in facts.run.records.items():
            is_settled = session_id not in buried | deleted
            is_known = session_id not in facts.excused or session_id in moved_on
            if not (record.sequence and is_settled and is_known):
                continue
            if believed.get(session_id) != record.status:
                yield f"{session_id} is {record.status}, {believed.get(session_id)} at {handler}"


def _consumed(taken: Sequence[Transition]) -> dict[str, str]:
    """Return each session's status by the rule: what is not above the last place is ignored."""
    last: dict[str, tuple[int, int]] = {}
    believed: dict[str, str] = {}
    for one in taken:
        place = (one.place.epoch, one.place.sequence)
        if place > last.get(one.place.session_id, (0, 0)):
            last[one.place.session_id] = place
            believed[one.place.session_id] = one.current
    return believed


def buried_unasked(facts: Facts) -> Iterator[str]:
    """A dead letter is what its sink refused, failed often enough at, or died of."""
    for handler, letters in facts.run.letters.items():
        marks = Counter(
            (call.mark, call.transition.place) for call in facts.run.journals.get(handler, ())
        )
        for letter in letters:
            place = letter.transition.place
            enough = {
                "exhausted": marks[Mark.FAILED, place] >= facts.run.attempts,
                "killed_worker": marks[Mark.EXITED, place] >= FEWEST_EXITS,
            }
            asked = enough.get(letter.reason, marks[Mark.REFUSED, place] > 0)
            if handler in facts.run.steadfast or not asked:
                yield f"{letter.transition.event_id} to {handler}, {letter.reason}"


def unsettled(facts: Facts) -> Iterator[str]:
    """In the end no handler has anything left to do."""
    yield from (f"{count} of {name}" for name, count in facts.run.unsettled.items() if count)


def canary(facts: Facts) -> Iterator[str]:
    """No secret is anywhere, and what may be published is only where it may be."""
    for word, places in facts.run.canaries.items():
        for where, text in facts.run.texts.items():
            if word in text and not where.startswith(places):
                yield f"{word.decode()} in {where}"


def memory(facts: Facts) -> Iterator[str]:
    """A process's memory comes back to about where it was."""
    for process, before in facts.run.before.items():
        grown = facts.run.after[process].memory_mib - before.memory_mib
        if grown > MEMORY_GROWTH_MIB:
            yield f"{process} by {grown:.0f} MiB"


def descriptors(facts: Facts) -> Iterator[str]:
    """So do its open files and sockets, but for what its pools keep open."""
    for process, before in facts.run.before.items():
        grown = facts.run.after[process].descriptors - before.descriptors
        if grown > DESCRIPTOR_GROWTH:
            yield f"{process} by {grown}"


def connections(facts: Facts) -> Iterator[str]:
    """So do Redis's connections."""
    before, after = facts.run.connections
    if after - before > CONNECTION_GROWTH:
        yield f"from {before} to {after}"


def unclean_end(facts: Facts) -> Iterator[str]:
    """A process told to end ends with 0."""
    yield from (f"{process} with {code}" for process, code in facts.run.exits.items() if code)
