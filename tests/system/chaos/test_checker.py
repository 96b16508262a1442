"""Laws of the checker: a good run is accepted, and each kind of bad run refused by its word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.system.chaos.checker import Law, judge
from tests.system.chaos.evidence import (
    Answer,
    Bound,
    Call,
    Crash,
    DeadLetter,
    Event,
    Mark,
    Place,
    Probe,
    Reading,
    Record,
    Remembered,
    Run,
    StrangerAnswer,
    Transition,
    Window,
)
from tests.system.chaos.ordering import PREFIX, Position, after, position, verdict

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
FOREIGN = Event("evt_foreign", "", "charge.succeeded", NOW, "")


def transition(source: Event, sequence: int, epoch: int = EPOCH) -> Transition:
    """Return the transition that *source* leads to."""
    return Transition(Place(source.session_id, epoch, sequence), source.id, source.status)


# The late `processing` of vs_a arrived after `verified` had.
FIRST, SECOND = transition(CREATED, 1), transition(VERIFIED, 2)
THIRD = transition(OTHER, 1)


def told(source: Event, word: str | None, status: int | None = 200, at: float = 30) -> Answer:
    """Return an answer to *source*, *at* seconds after the beginning."""
    return Answer(source.id, "r1", NOW + at, NOW + at + 0.1, status, word)


def calls(*transitions: Transition, at: float = 42) -> list[Call]:
    """Return the journal of a sink that takes each, *at* seconds after the beginning."""
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
            told(CREATED, None, None),
            told(CREATED, "unavailable", 503, 31),
            told(CREATED, "admitted", at=32),
            told(CREATED, "duplicate", at=33),
            told(VERIFIED, "admitted", at=34),
            told(PROCESSING, "late", at=35),
            told(TWIN, "unchanged", at=36),
            told(OTHER, "admitted", at=37),
            told(EXPIRED, "expired", at=38),
            told(EXPIRED, "expired", at=39),
            told(FOREIGN, "ignored", at=40),
            told(OTHER, "timestamp_too_old", 400, 41)._replace(receiver="late"),
        ],
        journals={
            "honest": calls(FIRST, THIRD, FIRST, SECOND, SECOND),
            "wayward": [
                *calls(FIRST),
                Call(Mark.BEGAN, SECOND),
                Call(Mark.FAILED, SECOND),
                *calls(SECOND),
                Call(Mark.BEGAN, THIRD),
                Call(Mark.REFUSED, THIRD),
            ],
        },
        letters={"honest": [], "wayward": [DeadLetter(THIRD, "refused", 1)]},
        transitions=[FIRST, SECOND, THIRD],
        records=records,
        unsettled={"honest": 0, "wayward": 0},
        crashes=[Crash(NOW + 34.5, frozenset({CREATED.id, VERIFIED.id}))],
        bounds=[
            Bound(NOW + 30, NOW + 41, 5, "a fault"),
            Bound(NOW + 30, NOW + 41, 12, "a fault", ("honest",)),
        ],
        probes=[Probe("work", NOW + 35, 0.1, 200)],
        strangers=[StrangerAnswer("forged", 400), StrangerAnswer("slow body", 503)],
        skewed=frozenset({"late"}),
        steadfast=frozenset({"honest"}),
        before={"work": Reading(50, 40)},
        after={"work": Reading(55, 45)},
        connections=(20, 25),
        exits={"work": 0},
        texts={"log work": b"{...}", "redis": b"published0"},
        canaries={b"canary0": (), b"published0": ("redis",)},
    )


def changed(**changes: Any) -> Callable[[], Run]:
    """Return what makes a good run with something changed."""
    return lambda: replace(good(), **changes)


def answered(*more: Answer) -> Callable[[], Run]:
    """Return what makes a good run with more answers in it."""
    return lambda: replace(good(), answers=[*good().answers, *more])


def remembered(session: str = "vs_a", **changes: Any) -> Callable[[], Run]:
    """Return what makes a good run with something else in the ledger's record of a session."""

    def make() -> Run:
        run = good()
        record = run.records[session]._replace(**changes)
        return replace(run, records={**run.records, session: record})

    return make


def judged(**outcomes: Remembered) -> Callable[[], Run]:
    """Return what makes a good run with other verdicts about vs_a, told and kept alike."""

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


def journaled(*journal: Call) -> Callable[[], Run]:
    """Return what makes a good run whose honest sink wrote *journal*."""
    return lambda: replace(good(), journals={**good().journals, "honest": list(journal)})


def lettered(*letters: DeadLetter, handler: str = "wayward") -> Callable[[], Run]:
    """Return what makes a good run with more dead letters."""

    def make() -> Run:
        run = good()
        return replace(run, letters={**run.letters, handler: [*run.letters[handler], *letters]})

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
            journals={"honest": calls(FIRST, THIRD, later)},
            letters={"honest": []},
            crashes=[Crash(NOW + ended_at, frozenset({CREATED.id}))],
        )

    return make


UNKNOWN = transition(OTHER, 2)

BAD: list[tuple[Law, str, Callable[[], Run]]] = [
    (Law.UNACKNOWLEDGED, "no answer at all", changed(answers=good().answers[:-4])),
    (Law.REFUSED, "400 by a healthy receiver", answered(told(OTHER, "signature_mismatch", 400))),
    (Law.REFUSED, "404", answered(told(OTHER, None, 404))),
    (Law.BROKE_DOWN, "500", answered(told(OTHER, None, 500))),
    (Law.BROKE_DOWN, "a traceback", changed(texts={"log serve": b"Traceback (most recent"})),
    (Law.SLOW_ACKNOWLEDGEMENT, "after too long",
     changed(bounds=[Bound(NOW + 30, NOW + 41, 1, "a fault")])),
    (Law.SLOW_ACKNOWLEDGEMENT, "never",
     lambda: replace(good(), answers=[told(CREATED, "unavailable", 503)])),
    (Law.WRONGLY_EXPIRED, "by a clock that is ahead", answered(told(PROCESSING, "expired"))),
    (Law.STRANGER_MISHANDLED, "admitted", changed(strangers=[StrangerAnswer("forged", 200)])),
    (Law.STRANGER_MISHANDLED, "a 500", changed(strangers=[StrangerAnswer("malformed", 500)])),
    (Law.NOT_LIVE, "no answer", changed(probes=[Probe("work", NOW, 4, None)])),
    (Law.NOT_LIVE, "a late answer", changed(probes=[Probe("work", NOW, 4, 200)])),
    (Law.LOST, "not in the record", remembered("vs_b", events={})),
    (Law.LOST, "no record", lambda: replace(good(), records={"vs_a": good().records["vs_a"]})),
    (Law.LOST, "only ever called a duplicate",
     lambda: replace(good(), events={**good().events, "evt_x": OTHER._replace(id="evt_x")},
                     answers=[*good().answers, told(OTHER._replace(id="evt_x"), "duplicate")])),
    (Law.NOT_DURABLE, "gone after a crash",
     changed(crashes=[Crash(NOW + 34.5, frozenset({CREATED.id}))])),
    (Law.ADMITTED_TWICE, "admitted by both", answered(told(OTHER, "admitted"))),
    (Law.WRONG_VERDICT, "late, said unchanged", answered(told(PROCESSING, "unchanged"))),
    (Law.WRONG_VERDICT, "expired, said admitted", answered(told(EXPIRED, "admitted"))),
    (Law.WRONG_VERDICT, "ours, said ignored", answered(told(OTHER, "ignored"))),
    (Law.WRONG_VERDICT, "not older, but late", judged(late=Remembered("late", 1))),
    (Law.WRONG_VERDICT, "late before anything was", judged(late=Remembered("late", 0))),
    (Law.WRONG_VERDICT, "news, but unchanged", judged(late=Remembered("unchanged", 2))),
    (Law.WRONG_VERDICT, "older, but admitted", judged(late=Remembered("admitted", 3))),
    (Law.WRONG_VERDICT, "no news, but admitted", judged(twin=Remembered("admitted", 3))),
    (Law.WRONG_VERDICT, "about an event nobody sent",
     remembered("vs_b", events={"evt_x": Remembered("admitted", 1)})),
    (Law.GAP, "a number left out", remembered(sequence=3)),
    (Law.GAP, "not on the stream", changed(transitions=[FIRST, THIRD])),
    (Law.GAP, "twice on the stream",
     changed(transitions=[*good().transitions, SECOND._replace(event_id=TWIN.id)])),
    (Law.GAP, "an epoch nobody knows",
     changed(transitions=[*good().transitions, transition(CREATED, 1, EPOCH + 1)])),
    (Law.NEEDLESS_EPOCH, "while nothing ended", in_two_epochs(ended_at=100)),
    (Law.SHARED_SEQUENCE, "two events at one place",
     journaled(*calls(FIRST, SECOND, THIRD, SECOND._replace(event_id=TWIN.id)))),
    (Law.SHARED_SEQUENCE, "one event at two places",
     lettered(DeadLetter(transition(OTHER, 2), "refused", 1))),
    (Law.NOT_NEWEST, "set back in the ledger", remembered(status="processing")),
    (Law.NOT_NEWEST, "another latest event", remembered(order_key=7)),
    (Law.NOT_NEWEST, "another event of that second", remembered(latest_id="evt_x")),
    (Law.NOT_NEWEST, "set back on the stream",
     changed(transitions=[FIRST, SECOND._replace(current="processing"), THIRD])),
    (Law.UNDELIVERED, "never handed over", journaled(*calls(FIRST, SECOND))),
    (Law.UNDELIVERED, "begun only", journaled(*calls(FIRST, SECOND), Call(Mark.BEGAN, THIRD))),
    (Law.UNKNOWN_DELIVERY, "made up", journaled(*calls(FIRST, SECOND, THIRD, UNKNOWN))),
    (Law.OUT_OF_ORDER, "the second first", journaled(*calls(SECOND, FIRST, THIRD))),
    (Law.OUT_OF_ORDER, "begun too soon",
     journaled(Call(Mark.BEGAN, FIRST), *calls(SECOND), *calls(FIRST, THIRD))),
    (Law.REPEAT_AHEAD, "again as something newer",
     journaled(*calls(FIRST, transition(CREATED, 2), THIRD))),
    (Law.SLOW_DELIVERY, "after too long",
     journaled(*calls(FIRST, SECOND), *calls(THIRD, at=60))),
    (Law.SLOW_DELIVERY, "never", journaled(*calls(FIRST, SECOND))),
    (Law.CONSUMER_BEHIND, "passes over the last",
     journaled(*calls(transition(CREATED, 2), SECOND, THIRD))),
    (Law.CONSUMER_BEHIND, "is given the last in an epoch that is over",
     journaled(*calls(transition(CREATED, 1, EPOCH + 1), SECOND, THIRD))),
    (Law.BURIED_UNASKED, "of a sink that refuses nothing",
     lettered(DeadLetter(THIRD, "exhausted", 10), handler="honest")),
    (Law.BURIED_UNASKED, "refused by nobody", lettered(DeadLetter(FIRST, "refused", 1))),
    (Law.BURIED_UNASKED, "given up too soon", lettered(DeadLetter(SECOND, "exhausted", 10))),
    (Law.BURIED_UNASKED, "an innocent", lettered(DeadLetter(FIRST, "killed_worker", 0))),
    (Law.UNSETTLED, "left over", changed(unsettled={"honest": 1})),
    (Law.CANARY, "a secret in a log", changed(texts={"log serve": b"a canary0 sings"})),
    (Law.CANARY, "published in a log", changed(texts={"log serve": b"published0"})),
    (Law.MEMORY, "a leak", changed(after={"work": Reading(110, 45)})),
    (Law.DESCRIPTORS, "open files", changed(after={"work": Reading(50, 90)})),
    (Law.CONNECTIONS, "connections", changed(connections=(20, 120))),
    (Law.UNCLEAN_END, "an exit code", changed(exits={"work": 1})),
]  # fmt: skip


def test_a_good_run_is_accepted() -> None:
    """A run that lost, repeated and mixed up nothing has no violations, whatever happened in it."""
    judgement = judge(good())

    assert judgement.violations == []
    assert judgement.counts["repeats honest"] == 2
    assert judgement.counts["forgotten"] == 0


@pytest.mark.parametrize(
    ("law", "make"),
    [(law, make) for law, _, make in BAD],
    ids=[f"{law}: {why}" for law, why, _ in BAD],
)
def test_a_bad_run_is_refused_by_its_word(law: Law, make: Callable[[], Run]) -> None:
    """Each way to break a promise is found, and called what it is."""
    assert law in {violation.law for violation in judge(make()).violations}


def test_every_law_can_be_broken() -> None:
    """There is no law that no run of these breaks."""
    assert {law for law, _, _ in BAD} == set(Law)


def test_a_server_that_ended_explains_an_epoch() -> None:
    """After Redis has ended a session may count from 1 again, in a greater epoch."""
    run = in_two_epochs(ended_at=33)()
    verdicts = {one: said for one, said in run.records["vs_a"].events.items() if said.sequence < 2}
    record = run.records["vs_a"]._replace(events=verdicts, latest_id=VERIFIED.id)
    told = [one for one in run.answers if one.event_id not in {PROCESSING.id, TWIN.id}]
    events = {
        one: event for one, event in run.events.items() if one not in {TWIN.id, PROCESSING.id}
    }
    judgement = judge(
        replace(run, records={**run.records, "vs_a": record}, answers=told, events=events)
    )

    assert judgement.violations == []


def test_deleted_transitions_explain_what_nobody_got() -> None:
    """What an operator deleted may be missing at a handler, and a later one come without it."""
    gone = replace(
        good(),
        transitions=[SECOND, THIRD],
        deleted=[FIRST],
        bounds=[],
        journals={"honest": calls(SECOND, THIRD)},
    )
    judgement = judge(replace(gone, letters={"honest": []}))

    assert judgement.violations == []
    assert judgement.counts["deleted before delivery"] == 1


def test_only_what_redis_may_have_forgotten_is_excused() -> None:
    """A fail-over nobody waited for explains what was answered meanwhile, and nothing older."""
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
    assert Law.LOST in {violation.law for violation in judge(older).violations}


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
        answers=[*run.answers, told(canceled, "admitted", at=45)],
        transitions=[FIRST, THIRD, news],
        journals={"honest": calls(FIRST, SECOND, THIRD, news)},
        letters={"honest": []},
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
    assert {violation.law for violation in judge(restored(EPOCH)).violations} == {
        Law.CONSUMER_BEHIND
    }


def test_what_a_handler_held_up_itself_may_wait() -> None:
    """A failing session's deliveries are late, and nobody else's."""
    failed = [Call(Mark.BEGAN, THIRD), Call(Mark.FAILED, THIRD)]
    waited = [*failed, *calls(FIRST, SECOND), *calls(THIRD, at=60)]

    assert judge(journaled(*waited)()).violations == []


def test_positions_are_read_as_the_design_writes_them() -> None:
    """Redaction, then time, then the step, then the id: as a tuple and as the stored number."""
    redacted = event(3, "redacted", "verified", redaction="redacted")
    wiped = event(2, "canceled", "canceled", redaction="processing")

    assert position(redacted) > position(wiped) > position(VERIFIED) > position(PROCESSING)
    assert position(CREATED) < position(event(0, "processing", "processing"))
    assert position(VERIFIED) < position(TWIN) == Position(0, NOW + 20, 3, TWIN.id)
    assert position(redacted).order_key == 2 * 10**12 + (NOW + 3) * 10 + 4


@pytest.mark.parametrize(
    ("known", "later", "expected"),
    [
        ([VERIFIED], event(30, "requires_input", "requires_input"), "admitted"),
        ([VERIFIED], event(30, "processing", "processing"), "late"),
        ([event(20, "requires_input", "requires_input")], PROCESSING, "late"),
        ([event(20, "requires_input", "requires_input")],
         event(25, "processing", "processing"), "late"),
        ([event(20, "requires_input", "requires_input")],
         event(26, "processing", "processing"), "admitted"),
        ([PROCESSING], event(5, "verified", "verified"), "admitted"),
        ([PROCESSING], event(4, "verified", "verified"), "late"),
        ([PROCESSING], event(4, "canceled", "canceled", redaction="processing"), "admitted"),
        ([VERIFIED], TWIN, "unchanged"),
        ([TWIN], VERIFIED, "late"),
    ],
)  # fmt: skip
def test_verdicts_are_those_of_the_rules(known: list[Event], later: Event, expected: str) -> None:
    """Each rule decides where it should, and some seconds do not matter where they should not."""
    state = None
    for one in known:
        state = after(state, one)

    assert verdict(state, later) == expected
