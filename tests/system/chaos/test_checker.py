"""The checker: it accepts a good run, and names the law that each kind of bad run breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.system.chaos.checker import LAWS, judge
from tests.system.chaos.evidence import (
    Answer,
    Bound,
    Call,
    Crash,
    DeadLetter,
    Decision,
    Event,
    HostileResponse,
    Mark,
    Place,
    Probe,
    Reading,
    Record,
    Remembered,
    Run,
    Transition,
    Window,
)
from tests.system.chaos.ordering import PREFIX

NOW = 1_790_000_000
EPOCH = NOW * 1000


def event(number: int, word: str, status: str, session: str = "vs_a", **more: Any) -> Event:
    """Return the event of a session that was created *number* seconds after the first."""
    return Event(f"evt_{session}_{number}", session, PREFIX + word, NOW + number, status, **more)


CREATED = event(0, "created", "requires_input")
PROCESSING = event(10, "processing", "processing")
VERIFIED = event(20, "verified", "verified", report="vr_1")
TWIN = VERIFIED._replace(id="evt_vs_a_20twin")
OTHER = event(5, "created", "requires_input", "vs_b")
EXPIRED = event(-40 * 86_400, "created", "requires_input", "vs_old")
UNSENT = event(6, "created", "requires_input", "vs_c")
THIN = event(16, "canceled", "canceled", "vs_c")
FOREIGN = Event("evt_foreign", "", "charge.succeeded", NOW, "")


def transition(source: Event, sequence: int, epoch: int = EPOCH) -> Transition:
    """Return the transition that *source* leads to."""
    return Transition(Place(source.session_id, epoch, sequence), source.id, source.status)


# The late `processing` of vs_a arrived after `verified` had.
FIRST, SECOND = transition(CREATED, 1), transition(VERIFIED, 2)
THIRD = transition(OTHER, 1)
FOURTH, FIFTH = transition(UNSENT, 1), transition(THIN, 2)


def answer(source: Event, word: str | None, status: int | None = 200, at: float = 30) -> Answer:
    """Return an answer to *source*, *at* seconds after the beginning."""
    return Answer(source.id, "r1", NOW + at, NOW + at + 0.1, status, word)


def calls(*transitions: Transition, at: float = 42) -> list[Call]:
    """Return the calls of a sink that accepts each, *at* seconds after the beginning."""
    marks = (Mark.BEGAN, Mark.TOOK)
    return [Call(mark, one, NOW + at) for one in transitions for mark in marks]


def good() -> Run:
    """Return a run in which much happened and nothing went wrong."""
    records = {
        "vs_a": Record(
            "verified",
            (NOW + 20) * 10 + 3,
            TWIN.id,
            2,
            EPOCH,
            {
                CREATED.id: Remembered("admitted", 1),
                VERIFIED.id: Remembered("admitted", 2),
                PROCESSING.id: Remembered("late", 2),
                TWIN.id: Remembered("unchanged", 2),
            },
        ),
        "vs_b": Record(
            "requires_input",
            (NOW + 5) * 10,
            OTHER.id,
            1,
            EPOCH,
            {OTHER.id: Remembered("admitted", 1)},
        ),
    }
    return Run(
        events={
            one.id: one for one in (CREATED, PROCESSING, VERIFIED, TWIN, OTHER, EXPIRED, FOREIGN)
        },
        answers=[
            answer(CREATED, None, None),
            answer(CREATED, "unavailable", 503, 31),
            answer(CREATED, "admitted", at=32),
            answer(CREATED, "duplicate", at=33),
            answer(VERIFIED, "admitted", at=34),
            answer(PROCESSING, "late", at=35),
            answer(TWIN, "unchanged", at=36),
            answer(OTHER, "admitted", at=37),
            answer(EXPIRED, "expired", at=38),
            answer(EXPIRED, "expired", at=39),
            answer(FOREIGN, "ignored", at=40),
            answer(OTHER, "timestamp_too_old", 400, 41)._replace(receiver="late"),
        ],
        calls={
            "steady": calls(FIRST, THIRD, FIRST, SECOND, SECOND),
            "faulty": [
                *calls(FIRST),
                Call(Mark.BEGAN, SECOND),
                Call(Mark.FAILED, SECOND),
                *calls(SECOND),
                Call(Mark.BEGAN, THIRD),
                Call(Mark.REFUSED, THIRD),
            ],
        },
        dead_letters={"steady": [], "faulty": [DeadLetter(THIRD, "refused", 1)]},
        transitions=[FIRST, SECOND, THIRD],
        records=records,
        unsettled={"steady": 0, "faulty": 0},
        crashes=[Crash(NOW + 34.5, frozenset({CREATED.id, VERIFIED.id}))],
        bounds=[
            Bound(NOW + 30, NOW + 41, 5, "a fault"),
            Bound(NOW + 30, NOW + 41, 12, "a fault", ("steady",)),
        ],
        probes=[Probe("work", NOW + 35, 0.1, 200)],
        hostile_responses=[HostileResponse("forged", 400), HostileResponse("slow body", 503)],
        skewed=frozenset({"late"}),
        steady=frozenset({"steady"}),
        before={"work": Reading(50, 40)},
        after={"work": Reading(55, 45)},
        connections=(20, 25),
        exits={"work": 0},
        texts={"log work": b"{...}", "redis": b"published0"},
        canaries={b"canary0": (), b"published0": ("redis",)},
    )


def asked(**changes: Any) -> Callable[[], Run]:
    """Return what makes a good run with a session for which Stripe's API was asked."""

    def make() -> Run:
        run = good()
        record = Record(
            "canceled",
            (NOW + 16) * 10 + 3,
            THIN.id,
            2,
            EPOCH,
            {UNSENT.id: Remembered("admitted", 1), THIN.id: Remembered("admitted", 2)},
        )
        records = {**run.records, "vs_c": record}
        asked = replace(
            run,
            events={**run.events, UNSENT.id: UNSENT, THIN.id: THIN},
            answers=[*run.answers, answer(THIN, "queued"), answer(THIN, "duplicate", at=31)],
            transitions=[*run.transitions, FOURTH, FIFTH],
            calls={
                name: [*before, *calls(FOURTH, FIFTH, at=60)] for name, before in run.calls.items()
            },
            records=records,
            crashes=[Crash(NOW + 34.5, frozenset({CREATED.id, VERIFIED.id, "evt_thin"}))],
            unsent=frozenset({UNSENT.id}),
            thin={THIN.id: "evt_thin"},
            states={session_id: one.status for session_id, one in records.items()},
            decisions=[
                Decision(UNSENT.id, NOW + 59, is_recovered=True),
                Decision(THIN.id, NOW + 59.5),
            ],
            faults_ended=NOW + 35,
        )
        return replace(asked, **changes)

    return make


def changed(**changes: Any) -> Callable[[], Run]:
    """Return what makes a good run with something changed."""
    return lambda: replace(good(), **changes)


def answered(*more: Answer) -> Callable[[], Run]:
    """Return what makes a good run with more answers in it."""
    return lambda: replace(good(), answers=[*good().answers, *more])


def remembered(session: str = "vs_a", **changes: Any) -> Callable[[], Run]:
    """Return what makes a good run with something else in the record of a session."""

    def make() -> Run:
        run = good()
        record = run.records[session]._replace(**changes)
        return replace(run, records={**run.records, session: record})

    return make


def judged(**outcomes: Remembered) -> Callable[[], Run]:
    """Return what makes a good run with other outcomes for vs_a, answered and recorded alike."""

    def make() -> Run:
        kept = {CREATED.id: Remembered("admitted", 1), VERIFIED.id: Remembered("admitted", 2)}
        names = {"late": PROCESSING, "twin": TWIN}
        kept |= {names[name].id: said for name, said in outcomes.items()}
        run = remembered(events=kept)()
        said = {one.id: kept[one.id].outcome for one in names.values() if one.id in kept}
        answers = [
            one._replace(word=said[one.event_id]) if one.event_id in said else one
            for one in run.answers
        ]
        return replace(run, answers=answers)

    return make


def early_processing(*answers: Answer, **changes: Any) -> Callable[[], Run]:
    """Return what makes a good run in which PROCESSING is known at another time."""

    def make() -> Run:
        others = [one for one in good().answers if one.event_id != PROCESSING.id]
        unsent = frozenset() if answers else frozenset({PROCESSING.id})
        return replace(good(), answers=[*others, *answers], unsent=unsent, **changes)

    return make


def with_calls(*calls: Call) -> Callable[[], Run]:
    """Return what makes a good run whose steady sink logged *calls*."""
    return lambda: replace(good(), calls={**good().calls, "steady": list(calls)})


def dead(*dead_letters: DeadLetter, handler: str = "faulty") -> Callable[[], Run]:
    """Return what makes a good run with more dead letters."""

    def make() -> Run:
        run = good()
        return replace(
            run,
            dead_letters={**run.dead_letters, handler: [*run.dead_letters[handler], *dead_letters]},
        )

    return make


def in_two_epochs(*, ended_at: float) -> Callable[[], Run]:
    """Return what makes a good run whose Redis ended, and whose vs_a began an epoch at 40 s."""

    def make() -> Run:
        epoch = EPOCH + 40_000
        run = remembered(
            sequence=1,
            epoch=epoch,
            events={**good().records["vs_a"].events, VERIFIED.id: Remembered("admitted", 1)},
        )()
        later = transition(VERIFIED, 1, epoch)
        return replace(
            run,
            transitions=[FIRST, later, THIRD],
            calls={"steady": calls(FIRST, THIRD, later)},
            dead_letters={"steady": []},
            crashes=[Crash(NOW + ended_at, frozenset({CREATED.id}))],
        )

    return make


UNKNOWN = transition(OTHER, 2)

BAD: list[tuple[str, str, Callable[[], Run]]] = [
    ("unacknowledged", "no answer at all", changed(answers=good().answers[:-4])),
    ("refused", "400 by a healthy receiver", answered(answer(OTHER, "signature_mismatch", 400))),
    ("refused", "404", answered(answer(OTHER, None, 404))),
    ("broke_down", "500", answered(answer(OTHER, None, 500))),
    ("broke_down", "a traceback", changed(texts={"log serve": b"Traceback (most recent"})),
    ("slow_acknowledgement", "after too long",
     changed(bounds=[Bound(NOW + 30, NOW + 41, 1, "a fault")])),
    ("slow_acknowledgement", "never",
     lambda: replace(good(), answers=[answer(CREATED, "unavailable", 503)])),
    ("wrongly_expired", "by a clock that is ahead", answered(answer(PROCESSING, "expired"))),
    ("hostile_mishandled", "admitted", changed(hostile_responses=[HostileResponse("forged", 200)])),
    ("hostile_mishandled", "a 500", changed(hostile_responses=[HostileResponse("malformed", 500)])),
    ("not_live", "no answer", changed(probes=[Probe("work", NOW, 4, None)])),
    ("not_live", "a late answer", changed(probes=[Probe("work", NOW, 4, 200)])),
    ("lost", "not in its record", remembered("vs_b", events={})),
    ("lost", "no record", lambda: replace(good(), records={"vs_a": good().records["vs_a"]})),
    ("lost", "only ever called a duplicate",
     lambda: replace(good(), events={**good().events, "evt_x": OTHER._replace(id="evt_x")},
                     answers=[*good().answers, answer(OTHER._replace(id="evt_x"), "duplicate")])),
    ("not_durable", "gone after a crash",
     changed(crashes=[Crash(NOW + 34.5, frozenset({CREATED.id}))])),
    ("admitted_twice", "admitted by both", answered(answer(OTHER, "admitted"))),
    ("wrong_outcome", "late, said unchanged", answered(answer(PROCESSING, "unchanged"))),
    ("wrong_outcome", "expired, said admitted", answered(answer(EXPIRED, "admitted"))),
    ("wrong_outcome", "ours, said ignored", answered(answer(OTHER, "ignored"))),
    ("wrong_outcome", "not older, but late", judged(late=Remembered("late", 1))),
    ("wrong_outcome", "late before anything was", judged(late=Remembered("late", 0))),
    ("wrong_outcome", "news, but unchanged", judged(late=Remembered("unchanged", 2))),
    ("wrong_outcome", "older, but admitted", judged(late=Remembered("admitted", 3))),
    ("wrong_outcome", "no news, but admitted", judged(twin=Remembered("admitted", 3))),
    ("wrong_outcome", "late, but came before", early_processing(answer(PROCESSING, "late", at=33))),
    ("wrong_outcome", "late, but was fetched before",
     early_processing(decisions=[Decision(PROCESSING.id, NOW + 33)])),
    ("wrong_outcome", "of an event that was not sent",
     remembered("vs_b", events={"evt_x": Remembered("admitted", 1)})),
    ("gap", "a number left out", remembered(sequence=3)),
    ("gap", "not on the stream", changed(transitions=[FIRST, THIRD])),
    ("gap", "twice on the stream",
     changed(transitions=[*good().transitions, SECOND._replace(event_id=TWIN.id)])),
    ("gap", "an epoch that no record has",
     changed(transitions=[*good().transitions, transition(CREATED, 1, EPOCH + 1)])),
    ("needless_epoch", "while nothing ended", in_two_epochs(ended_at=100)),
    ("shared_sequence", "two events at one place",
     with_calls(*calls(FIRST, SECOND, THIRD, SECOND._replace(event_id=TWIN.id)))),
    ("shared_sequence", "one event at two places",
     dead(DeadLetter(transition(OTHER, 2), "refused", 1))),
    ("not_newest", "set back in its record", remembered(status="processing")),
    ("not_newest", "another latest event", remembered(order_key=7)),
    ("not_newest", "another event of that second", remembered(latest_id="evt_x")),
    ("not_newest", "set back on the stream",
     changed(transitions=[FIRST, SECOND._replace(current="processing"), THIRD])),
    ("not_durable", "a notification gone after a crash",
     asked(crashes=[Crash(NOW + 34.5, frozenset({CREATED.id, VERIFIED.id}))])),
    ("missed", "neither sent nor found", asked(records=good().records)),
    ("not_as_at_stripe", "not yet known", asked(states={"vs_c": "verified"})),
    ("not_as_at_stripe", "not known at all", asked(states={"vs_d": "verified"})),
    ("stale", "too late for a handler",
     asked(calls={"steady": [*calls(FIRST, SECOND, THIRD), *calls(FOURTH, FIFTH, at=160)]})),
    ("false_alarm", "of what had come",
     asked(decisions=[Decision(THIN.id, NOW + 59, is_recovered=True)])),
    ("undelivered", "never handed over", with_calls(*calls(FIRST, SECOND))),
    ("undelivered", "begun only", with_calls(*calls(FIRST, SECOND), Call(Mark.BEGAN, THIRD))),
    ("unknown_delivery", "made up", with_calls(*calls(FIRST, SECOND, THIRD, UNKNOWN))),
    ("out_of_order", "the second first", with_calls(*calls(SECOND, FIRST, THIRD))),
    ("out_of_order", "begun too soon",
     with_calls(Call(Mark.BEGAN, FIRST), *calls(SECOND), *calls(FIRST, THIRD))),
    ("repeat_ahead", "again as something newer",
     with_calls(*calls(FIRST, transition(CREATED, 2), THIRD))),
    ("slow_delivery", "after too long",
     with_calls(*calls(FIRST, SECOND), *calls(THIRD, at=60))),
    ("slow_delivery", "never", with_calls(*calls(FIRST, SECOND))),
    ("consumer_behind", "passes over the last",
     with_calls(*calls(transition(CREATED, 2), SECOND, THIRD))),
    ("consumer_behind", "is given the last in an epoch that is over",
     with_calls(*calls(transition(CREATED, 1, EPOCH + 1), SECOND, THIRD))),
    ("wrong_dead_letter", "of a sink that refuses nothing",
     dead(DeadLetter(THIRD, "exhausted", 10), handler="steady")),
    ("wrong_dead_letter", "not refused by its sink", dead(DeadLetter(FIRST, "refused", 1))),
    ("wrong_dead_letter", "given up too soon", dead(DeadLetter(SECOND, "exhausted", 10))),
    ("wrong_dead_letter", "an innocent", dead(DeadLetter(FIRST, "killed_worker", 0))),
    ("unsettled", "left over", changed(unsettled={"steady": 1})),
    ("canary", "a secret in a log", changed(texts={"log serve": b"a canary0"})),
    ("canary", "published in a log", changed(texts={"log serve": b"published0"})),
    ("memory", "a leak", changed(after={"work": Reading(110, 45)})),
    ("descriptors", "open files", changed(after={"work": Reading(50, 90)})),
    ("connections", "connections", changed(connections=(20, 120))),
    ("unclean_end", "an exit code", changed(exits={"work": 1})),
]  # fmt: skip


def test_a_good_run_is_accepted() -> None:
    """A run that lost, repeated and mixed up nothing has no violations, whatever happened in it."""
    judgement = judge(good())

    assert judgement.violations == judge(asked()()).violations == []
    assert judgement.counts["repeats steady"] == 2
    assert judgement.counts["forgotten"] == 0


@pytest.mark.parametrize(
    ("law", "make"),
    [(law, make) for law, _, make in BAD],
    ids=[f"{law}: {why}" for law, why, _ in BAD],
)
def test_a_bad_run_breaks_its_law(law: str, make: Callable[[], Run]) -> None:
    """Each violation is found, under its name."""
    assert law in {violation.law for violation in judge(make()).violations}


def test_every_law_can_be_broken() -> None:
    """Each law is broken by one of these runs."""
    assert {law for law, _, _ in BAD} == {law.__name__ for law in LAWS}


def test_a_server_that_ended_explains_an_epoch() -> None:
    """After Redis has ended, a session may count from 1 again, in a later epoch."""
    run = in_two_epochs(ended_at=33)()
    kept = {one: said for one, said in run.records["vs_a"].events.items() if said.sequence < 2}
    record = run.records["vs_a"]._replace(events=kept, latest_id=VERIFIED.id)
    answers = [one for one in run.answers if one.event_id not in {PROCESSING.id, TWIN.id}]
    events = {
        one: event for one, event in run.events.items() if one not in {TWIN.id, PROCESSING.id}
    }
    judgement = judge(
        replace(run, records={**run.records, "vs_a": record}, answers=answers, events=events)
    )

    assert judgement.violations == []


def test_deleted_transitions_explain_missing_deliveries() -> None:
    """A handler may miss what an operator deleted, and receive a later transition without it."""
    gone = replace(
        good(),
        transitions=[SECOND, THIRD],
        deleted=[FIRST],
        bounds=[],
        calls={"steady": calls(SECOND, THIRD)},
    )
    judgement = judge(replace(gone, dead_letters={"steady": []}))

    assert judgement.violations == []
    assert judgement.counts["deleted before delivery"] == 1


def test_only_what_redis_may_have_forgotten_is_excused() -> None:
    """A fail-over without waiting for the replica excuses what was answered meanwhile, no more."""
    run = good()
    forgetful = {
        **run.records,
        "vs_b": run.records["vs_b"]._replace(events={}, status="", sequence=0, order_key=0),
    }
    window = Window(NOW + 36.5, NOW + 37.5, "a fail-over")
    lost = replace(run, records=forgetful, transitions=[FIRST, SECOND], rollbacks=[window])
    older = replace(lost, rollbacks=[window._replace(since=NOW + 37.2)])

    assert judge(lost).violations == []
    assert judge(lost).counts["forgotten"] == 1
    assert "lost" in {violation.law for violation in judge(older).violations}


def restored(epoch: int) -> Run:
    """Return a run in which Redis forgot that vs_a was verified, which a sink had seen.

    Then the session was canceled, in the place of *epoch*.
    """
    run = good()
    canceled = event(30, "canceled", "canceled")
    news = transition(canceled, 1 if epoch > EPOCH else 2, epoch)
    return replace(
        run,
        events={**run.events, canceled.id: canceled},
        answers=[*run.answers, answer(canceled, "admitted", at=45)],
        transitions=[FIRST, THIRD, news],
        calls={"steady": calls(FIRST, SECOND, THIRD, news)},
        dead_letters={"steady": []},
        records={
            **run.records,
            "vs_a": Record(
                "canceled",
                (NOW + 30) * 10 + 3,
                canceled.id,
                news.place.sequence,
                epoch,
                {CREATED.id: Remembered("admitted", 1), canceled.id: Remembered("admitted", 1)},
            ),
        },
        crashes=[],
        rollbacks=[Window(NOW + 33.5, NOW + 44, "an older copy of the data")],
    )


def test_a_consumer_follows_a_session_past_what_redis_forgot() -> None:
    """After an older copy of the data a new epoch is followed; a place used twice is not."""
    assert judge(restored(EPOCH + 45_000)).violations == []
    assert {violation.law for violation in judge(restored(EPOCH)).violations} == {"consumer_behind"}


def test_what_a_handler_held_up_itself_may_wait() -> None:
    """The deliveries of a session whose handler fails may be late."""
    failed = [Call(Mark.BEGAN, THIRD), Call(Mark.FAILED, THIRD)]
    waited = [*failed, *calls(FIRST, SECOND), *calls(THIRD, at=60)]

    assert judge(with_calls(*waited)()).violations == []
