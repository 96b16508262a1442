"""Judges a finished run: which laws it broke. Pure.

Each law is a function of `admission_laws`, `answer_laws`, `api_laws` or `delivery_laws` that yields
the violations in the facts of a run; its name is the word for them.

Events that Redis was allowed to forget (in a fail-over without waiting for a replica, for example)
are excused from the laws of loss, their sessions from those of order. Both are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from tests.system.chaos import admission_laws, answer_laws, api_laws, delivery_laws
from tests.system.chaos.evidence import Run
from tests.system.chaos.facts import NOT_RECORDED, Facts


class Violation(NamedTuple):
    """One violation: of which law, and where."""

    law: str
    what: str


class Judgement(NamedTuple):
    """The result of a run.

    Attributes:
        violations: Every violation; none if all promises were kept.
        counts: Numbers of events, answers, deliveries, repeats, excused losses and more.
    """

    violations: list[Violation]
    counts: Mapping[str, int]


LAWS: tuple[Callable[[Facts], Iterator[str]], ...] = (
    *(admission_laws.unacknowledged, admission_laws.refused, admission_laws.broke_down),
    *(answer_laws.slow_acknowledgement, answer_laws.wrongly_expired),
    *(answer_laws.hostile_mishandled, answer_laws.not_live, admission_laws.lost),
    *(admission_laws.not_durable, admission_laws.admitted_twice, admission_laws.wrong_outcome),
    *(admission_laws.gap, admission_laws.needless_epoch, admission_laws.shared_sequence),
    *(admission_laws.not_newest, api_laws.missed, api_laws.not_as_at_stripe, api_laws.stale),
    *(api_laws.false_alarm, delivery_laws.undelivered, delivery_laws.unknown_delivery),
    *(delivery_laws.out_of_order, delivery_laws.repeat_ahead, delivery_laws.slow_delivery),
    *(delivery_laws.consumer_behind, delivery_laws.wrong_dead_letter, delivery_laws.unsettled),
    *(delivery_laws.canary, delivery_laws.memory, delivery_laws.descriptors),
    *(delivery_laws.connections, delivery_laws.unclean_end),
)


def judge(run: Run) -> Judgement:
    """Judge a finished run by every law."""
    facts = Facts(run)
    found = [Violation(law.__name__, what) for law in LAWS for what in law(facts)]
    return Judgement(found, _counts(facts))


def _grown(run: Run) -> list[int]:
    return [
        round(run.after[process].memory_mib - before.memory_mib)
        for process, before in run.before.items()
    ]


def _counts(facts: Facts) -> dict[str, int]:
    run = facts.run
    words = Counter(
        answer.word or ("none" if answer.status is None else str(answer.status))
        for answer in run.answers
    )
    repeats = {
        f"repeats {handler}": len(taken) - len({one.place for one in taken})
        for handler, taken in facts.taken.items()
    }
    deleted = {one.place for one in run.deleted}
    missed = {
        (handler, place)
        for handler, taken in facts.taken.items()
        for place in deleted - {one.place for one in taken}
    }
    acknowledged = [run.events[event_id] for event_id in facts.acknowledged]
    return {
        "events": len(run.events),
        "never sent": len(run.unsent),
        "sent thin": len(run.thin),
        "recovered": sum(one.is_recovered for one in run.decisions),
        "most seconds stale": round(max((one[2] for one in api_laws.staleness(facts)), default=0)),
        "requests": len(run.answers),
        "sessions": len(run.records),
        "transitions": len(facts.transitions),
        **{f"answered {word}": count for word, count in sorted(words.items())},
        **{f"delivered {handler}": len(taken) for handler, taken in facts.taken.items()},
        **repeats,
        **{f"dead letters {handler}": len(each) for handler, each in run.dead_letters.items()},
        "most MiB grown": max(_grown(run), default=0),
        "deleted before delivery": len(missed),
        "excused sessions": len(facts.excused),
        "excused sessions changed again": len(facts.excused & facts.changed_again()),
        "hostile_clients answered": len(run.hostile_responses),
        "probes": len(run.probes),
        "forgotten": sum(
            event.id in facts.forgettable and not facts.is_known(event)
            for event in acknowledged
            if not NOT_RECORDED & {*facts.outcomes(event)}
        ),
    }
