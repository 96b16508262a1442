"""The one judge of a finished run: which of the promises it broke, by one word each. Pure.

Each law is a function from the facts of a run to what breaks it: `ledger_laws`, `answer_laws`,
`delivery_laws`.
What Redis was allowed to forget (in a fail-over that nobody waited for a replica before) is
excused from the laws of loss, its session from those of order, and both are counted: what is lost
must be explained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import NamedTuple

from tests.system.chaos import answer_laws, delivery_laws, ledger_laws
from tests.system.chaos.evidence import Run
from tests.system.chaos.facts import PASSED_BY, Facts


class Law(StrEnum):
    """The laws, each by the word for its breaking."""

    UNACKNOWLEDGED = "unacknowledged"
    REFUSED = "genuine_refused"
    BROKE_DOWN = "broke_down"
    SLOW_ACKNOWLEDGEMENT = "slow_acknowledgement"
    WRONGLY_EXPIRED = "wrongly_expired"
    STRANGER_MISHANDLED = "stranger_mishandled"
    NOT_LIVE = "not_live"
    LOST = "lost"
    NOT_DURABLE = "not_durable"
    ADMITTED_TWICE = "admitted_twice"
    WRONG_VERDICT = "wrong_verdict"
    GAP = "gap"
    NEEDLESS_EPOCH = "needless_epoch"
    SHARED_SEQUENCE = "shared_sequence"
    NOT_NEWEST = "not_newest"
    UNDELIVERED = "undelivered"
    UNKNOWN_DELIVERY = "unknown_delivery"
    OUT_OF_ORDER = "out_of_order"
    REPEAT_AHEAD = "repeat_ahead"
    SLOW_DELIVERY = "slow_delivery"
    CONSUMER_BEHIND = "consumer_behind"
    BURIED_UNASKED = "buried_unasked"
    UNSETTLED = "unsettled"
    CANARY = "canary"
    MEMORY = "memory_grew"
    DESCRIPTORS = "descriptors_grew"
    CONNECTIONS = "connections_grew"
    UNCLEAN_END = "unclean_end"


class Violation(NamedTuple):
    """One broken promise: of which law, and where."""

    law: Law
    what: str


class Judgement(NamedTuple):
    """What came of a run.

    Attributes:
        violations: Every breach found; none when all promises were kept.
        counts: What was counted on the way, repeats and explained losses included.
    """

    violations: list[Violation]
    counts: Mapping[str, int]


def judge(run: Run) -> Judgement:
    """Judge a finished run by every law."""
    facts = Facts(run)
    found = [Violation(law, what) for law, breaches in _LAWS.items() for what in breaches(facts)]
    return Judgement(found, _counts(facts))


_LAWS: dict[Law, Callable[[Facts], Iterator[str]]] = {
    Law.UNACKNOWLEDGED: ledger_laws.unacknowledged,
    Law.REFUSED: ledger_laws.refused,
    Law.BROKE_DOWN: ledger_laws.broke_down,
    Law.SLOW_ACKNOWLEDGEMENT: answer_laws.slow_acknowledgement,
    Law.WRONGLY_EXPIRED: answer_laws.wrongly_expired,
    Law.STRANGER_MISHANDLED: answer_laws.stranger_mishandled,
    Law.NOT_LIVE: answer_laws.not_live,
    Law.LOST: ledger_laws.lost,
    Law.NOT_DURABLE: ledger_laws.not_durable,
    Law.ADMITTED_TWICE: ledger_laws.admitted_twice,
    Law.WRONG_VERDICT: ledger_laws.wrong_verdict,
    Law.GAP: ledger_laws.gap,
    Law.NEEDLESS_EPOCH: ledger_laws.needless_epoch,
    Law.SHARED_SEQUENCE: ledger_laws.shared_sequence,
    Law.NOT_NEWEST: ledger_laws.not_newest,
    Law.UNDELIVERED: delivery_laws.undelivered,
    Law.UNKNOWN_DELIVERY: delivery_laws.unknown_delivery,
    Law.OUT_OF_ORDER: delivery_laws.out_of_order,
    Law.REPEAT_AHEAD: delivery_laws.repeat_ahead,
    Law.SLOW_DELIVERY: delivery_laws.slow_delivery,
    Law.CONSUMER_BEHIND: delivery_laws.consumer_behind,
    Law.BURIED_UNASKED: delivery_laws.buried_unasked,
    Law.UNSETTLED: delivery_laws.unsettled,
    Law.CANARY: delivery_laws.canary,
    Law.MEMORY: delivery_laws.memory,
    Law.DESCRIPTORS: delivery_laws.descriptors,
    Law.CONNECTIONS: delivery_laws.connections,
    Law.UNCLEAN_END: delivery_laws.unclean_end,
}


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
        "requests": len(run.answers),
        "sessions": len(run.records),
        "transitions": len(facts.transitions),
        **{f"answered {word}": count for word, count in sorted(words.items())},
        **{f"delivered {handler}": len(taken) for handler, taken in facts.taken.items()},
        **repeats,
        **{f"dead letters {handler}": len(each) for handler, each in run.letters.items()},
        "most MiB grown": max(_grown(run), default=0),
        "deleted before delivery": len(missed),
        "excused sessions": len(facts.excused),
        "excused sessions changed again": len(facts.excused & facts.moved_on()),
        "strangers answered": len(run.strangers),
        "probes": len(run.probes),
        "forgotten": sum(
            event.id in facts.forgettable and not facts.is_known(event)
            for event in acknowledged
            if not PASSED_BY & {*facts.words(event)}
        ),
    }
