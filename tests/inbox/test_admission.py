"""Admission: what one event makes of the session's record and of the stream, and in which order."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from service.config import DAY_S
from service.errors import Unavailable, UnavailableReason
from service.inbox import session_record
from service.inbox.admission import Admission, Outcome
from service.transitions import stream_entry
from service.transitions.transition import make_change
from tests.support.admissions import (
    CREATED,
    EVENT_ID,
    FAILED,
    NOW,
    PROCESSING,
    SESSION_ID,
    VERIFIED,
    InspectedInbox,
    OpenInbox,
    make_event,
    outcomes,
)


class TestVerdicts:
    """What one event is answered, and what is written."""

    async def test_a_first_event_is_admitted_and_recorded(self, inbox: InspectedInbox) -> None:
        """The first event of a session makes the record, one entry, and a time to live."""
        event = make_event(id=EVENT_ID)
        [answer] = await inbox.admit(event)

        assert answer == Admission(Outcome.ADMITTED, 1, None, after_final=False)
        record = await inbox.record()
        known = record.pop(EVENT_ID)
        words = known.split(" ")
        assert words[:3] == ["a", "1", str(NOW)]
        assert len(words[3]) == 8
        [(entry_id, _)] = await inbox.client.xrange(
            inbox.keys.transitions(inbox.keys.partition(SESSION_ID))
        )
        remembered = session_record.known_event(EVENT_ID.encode(), known.encode())
        assert remembered.entry_id == entry_id.decode()
        epoch = int(record.pop("epoch"))
        assert abs(epoch - time.time() * 1000) < 60_000
        assert len(record.pop("hash")) == 16
        replication = await inbox.client.info("replication")
        assert record.pop("server") == replication["master_replid"][:8]
        assert record == {
            "latest": f"s {NOW}0 {EVENT_ID}",
            "status": "requires_input",
            "previous": "",
            "sequence": "1",
            "kind": "s",
        }
        ttl = await inbox.client.ttl(inbox.keys.session(SESSION_ID))
        assert 400 * DAY_S - 60 < ttl <= 400 * DAY_S
        [entry] = await inbox.entries()
        assert entry == {
            b"change": stream_entry.pack(make_change(event)),
            b"previous": b"",
            b"sequence": b"1",
            b"epoch": str(epoch).encode(),
        }

    async def test_a_copy_is_a_duplicate_and_is_counted(self, inbox: InspectedInbox) -> None:
        """The same id again changes nothing but a counter, and has the sequence of the first."""
        await inbox.admit(CREATED, PROCESSING)
        before = await inbox.record()
        answers = await inbox.admit(CREATED, CREATED)

        assert answers == [Admission(Outcome.DUPLICATE, 1, None, after_final=False)] * 2
        assert await inbox.record() == before | {"duplicates": "2"}
        assert len(await inbox.entries()) == 2

    async def test_an_older_event_is_late(self, inbox: InspectedInbox) -> None:
        """An event that later ones have overtaken is remembered and not handed on."""
        await inbox.admit(PROCESSING)
        before = await inbox.record()
        [answer] = await inbox.admit(CREATED)

        assert answer == Admission(Outcome.LATE, 1, "processing", after_final=False)
        after = await inbox.record()
        assert after.pop(CREATED.id).startswith(f"l 1 {NOW} ")
        assert after == before
        assert outcomes(await inbox.admit(CREATED)) == ["duplicate"]
        assert len(await inbox.entries()) == 1

    async def test_a_late_event_may_be_after_the_final_status(self, inbox: InspectedInbox) -> None:
        """A late event that was created after a final status is marked as such."""
        after = make_event("processing", "processing", at=50)
        answers = await inbox.admit(VERIFIED, after)

        assert answers[1] == Admission(Outcome.LATE, 1, "verified", after_final=True)

    async def test_an_event_that_changes_nothing_is_unchanged(self, inbox: InspectedInbox) -> None:
        """A second Event object for one change is remembered, and moves only the order key up."""
        twin = make_event("created", "requires_input", id="evt_twin", at=7)
        await inbox.admit(CREATED)
        before = await inbox.record()
        [answer] = await inbox.admit(twin)

        assert answer == Admission(Outcome.UNCHANGED, 1, "requires_input", after_final=False)
        after = await inbox.record()
        assert after.pop("evt_twin").startswith(f"u 1 {NOW + 7} ")
        assert after == before | {"latest": f"s {NOW + 7}0 evt_twin"}
        between = make_event("processing", "processing", at=5)
        assert outcomes(await inbox.admit(between)) == ["late"]
        assert len(await inbox.entries()) == 1

    @pytest.mark.parametrize("event", ["late", "unchanged"])
    async def test_every_remembered_event_prolongs_the_record(
        self, inbox: InspectedInbox, event: str
    ) -> None:
        """A record outlives each event that it remembers by more than the age limit."""
        await inbox.admit(PROCESSING)
        key = inbox.keys.session(SESSION_ID)
        await inbox.client.expire(key, 1000)
        twin = make_event("processing", "processing", id="evt_twin", at=10)
        [answer] = await inbox.admit(CREATED if event == "late" else twin)

        assert answer.outcome == event
        assert await inbox.client.ttl(key) > 399 * DAY_S

    async def test_an_event_beyond_the_age_limit_is_expired(self, inbox: InspectedInbox) -> None:
        """An event above the age limit is answered and leaves no trace; one just below is taken."""
        limit = int(time.time()) - NOW - 35 * DAY_S
        [answer] = await inbox.admit(make_event(at=limit - DAY_S))

        assert answer == Admission(Outcome.EXPIRED, 0, None, after_final=False)
        assert await inbox.record() == {}
        assert await inbox.entries() == []
        assert outcomes(await inbox.admit(make_event(at=limit + 100))) == ["admitted"]

    async def test_the_first_rule_that_holds_decides(self, open_inbox: OpenInbox) -> None:
        """Of several rules that hold the first decides: known, expired, late, unchanged."""
        inbox, narrow = open_inbox(), open_inbox(max_event_age_days=1)
        old, unknown = (make_event(id=name, at=-2 * DAY_S) for name in ("evt_old", "evt_unknown"))
        await inbox.admit(old, make_event(id="evt_new", error="abandoned", at=9))
        same_but_earlier = make_event(id="evt_same", error="abandoned", at=5)

        assert outcomes(await narrow.admit(old)) == ["duplicate"]
        assert outcomes(await narrow.admit(unknown)) == ["expired"]
        assert outcomes(await inbox.admit(same_but_earlier)) == ["late"]

    async def test_a_full_backlog_is_not_remembered(self, open_inbox: OpenInbox) -> None:
        """An event that a full stream has no room for is not remembered; its copy is admitted."""
        capped = open_inbox(stream_max_entries=1)
        await capped.admit(CREATED)
        before = await capped.record()
        with pytest.raises(Unavailable) as refused:
            await capped.admit(PROCESSING)

        assert refused.value.reason is UnavailableReason.BACKLOG_FULL
        assert await capped.record() == before
        stream = capped.keys.transitions(capped.keys.partition(SESSION_ID))
        await capped.client.xtrim(stream, maxlen=0)
        assert outcomes(await capped.admit(PROCESSING)) == ["admitted"]

    async def test_a_full_backlog_still_answers_what_adds_nothing(
        self, open_inbox: OpenInbox
    ) -> None:
        """Duplicates, late and unchanged events need no room in the stream."""
        capped = open_inbox(stream_max_entries=1)
        twin = make_event("processing", "processing", id="evt_twin", at=10)
        answers = await capped.admit(PROCESSING, PROCESSING, CREATED, twin)

        assert outcomes(answers) == ["admitted", "duplicate", "late", "unchanged"]


class TestOrder:
    """Which of a session's events counts as the later one."""

    async def test_equal_order_keys_are_ordered_by_event_id(self, open_inbox: OpenInbox) -> None:
        """Two changes of one second and one type end in the same state, whichever arrives first."""
        inbox = open_inbox()
        ids = ["evt_9", "evt_9a", "evt_B", "evt_a", "evt_aB", "evt_ab"]
        for first, second in itertools.combinations(ids, 2):
            one = make_event("requires_input", id=first, at=5, error="document_expired")
            other = make_event("requires_input", id=second, at=5, error="abandoned")

            await inbox.client.flushall()
            assert outcomes(await inbox.admit(one, other)) == ["admitted", "admitted"]
            await inbox.client.flushall()
            assert outcomes(await inbox.admit(other, one)) == ["admitted", "late"]

    @pytest.mark.parametrize("status", ["verified", "canceled"])
    async def test_no_step_undoes_a_final_status(self, inbox: InspectedInbox, status: str) -> None:
        """A step after a final status is late, whatever its timestamp."""
        final = make_event(status, status, at=10)
        steps = [
            make_event("processing", "processing", id=f"evt_{at}", at=at)
            for at in (1, 10, 11, 15, 16, 99, 9999)
        ]

        assert outcomes(await inbox.admit(final, *steps)) == ["admitted"] + ["late"] * 7
        assert (await inbox.record())["status"] == status

    @pytest.mark.parametrize("status", ["verified", "canceled"])
    async def test_a_final_status_is_reversed_by_a_later_result(
        self, inbox: InspectedInbox, status: str
    ) -> None:
        """A later result is admitted after a final status, and so is the result after that."""
        earlier = make_event("requires_input", at=9, error="abandoned")
        rejected = make_event("requires_input", id="evt_rejected", at=99)
        approved = make_event("verified", "verified", id="evt_approved", at=200)
        final = make_event(status, status, at=10)
        answers = await inbox.admit(final, earlier, rejected, approved)

        assert outcomes(answers) == ["admitted", "late", "admitted", "admitted"]
        transitions = await inbox.transitions()
        assert [one.current for one in transitions] == [status, "requires_input", "verified"]
        assert [one.reversal for one in transitions] == [False, True, False]

    async def test_a_result_just_before_a_step_is_admitted(self, inbox: InspectedInbox) -> None:
        """A result is late only where it is older than the known step by more than the skew."""
        start = make_event("processing", "processing", at=100)
        for at, outcome in ((94, "late"), (95, "admitted")):
            await inbox.client.flushall()
            result = make_event("verified", "verified", at=at)
            assert outcomes(await inbox.admit(start, result)) == ["admitted", outcome]

    async def test_a_step_just_after_a_result_is_late(self, inbox: InspectedInbox) -> None:
        """A step is admitted only where it is newer than the known result by more than the skew."""
        failure = make_event("requires_input", at=100, error="abandoned")
        for at, outcome in ((105, "late"), (106, "admitted")):
            await inbox.client.flushall()
            start = make_event("processing", "processing", at=at)
            assert outcomes(await inbox.admit(failure, start)) == ["admitted", outcome]

    async def test_redaction_is_compared_with_no_step(self, inbox: InspectedInbox) -> None:
        """The start of a redaction is admitted although it is much older than the known step."""
        start = make_event("processing", "processing", at=100)
        erasing = make_event("canceled", "canceled", at=1, redaction="processing")
        later = make_event("processing", "processing", id="evt_later", at=500)

        assert outcomes(await inbox.admit(start, erasing, later)) == [
            *("admitted", "admitted", "late"),
        ]

    async def test_an_unchanged_step_moves_the_record_up(self, inbox: InspectedInbox) -> None:
        """After a second event for one step, a result older than the second is late."""
        start = make_event("processing", "processing", at=100)
        twin = make_event("processing", "processing", id="evt_twin", at=110)
        failure = make_event("requires_input", at=103, error="abandoned")

        assert outcomes(await inbox.admit(start, twin, failure)) == [
            *("admitted", "unchanged", "late"),
        ]

    async def test_redacted_is_the_end(self, inbox: InspectedInbox) -> None:
        """After redaction every event is late, whatever its status and timestamp."""
        redacted = make_event("redacted", "verified", at=10, redaction="redacted")
        answers = await inbox.admit(
            redacted, make_event("verified", "verified", at=99), VERIFIED, CREATED
        )

        assert outcomes(answers) == ["admitted", "late", "late", "late"]
        assert (await inbox.record())["status"] == "redacted"

    async def test_a_retry_loop_is_followed(self, inbox: InspectedInbox) -> None:
        """Each change of a retry loop is handed on in order, gap-free and within one epoch."""
        again = make_event("processing", "processing", at=30, error=None)
        answers = await inbox.admit(CREATED, PROCESSING, FAILED, again, VERIFIED)

        assert [answer.sequence for answer in answers] == [1, 2, 3, 4, 5]
        transitions = await inbox.transitions()
        assert [(one.previous, one.current) for one in transitions] == [
            (None, "requires_input"),
            ("requires_input", "processing"),
            ("processing", "requires_input"),
            ("requires_input", "processing"),
            ("processing", "verified"),
        ]
        assert [one.sequence for one in transitions] == [1, 2, 3, 4, 5]
        assert len({one.epoch for one in transitions}) == 1
        assert all(one.expected for one in transitions)


class TestBatches:
    """Events that wait together share a call."""

    async def test_many_events_share_few_calls(self, inbox: InspectedInbox) -> None:
        """A hundred events of one loop turn take one call for each partition."""
        await inbox.admit(CREATED)
        await inbox.client.config_resetstat()
        events = [make_event(session=f"vs_{n}", id=f"evt_{n}") for n in range(100)]
        answers = await inbox.together(*events)

        assert outcomes(answers) == ["admitted"] * 100
        stats = await inbox.client.info("commandstats")
        assert stats["cmdstat_evalsha"]["calls"] <= inbox.keys.partitions

    async def test_many_copies_make_one_transition(self, open_inbox: OpenInbox) -> None:
        """Of fifty copies at three replicas at once exactly one is admitted."""
        replicas = [open_inbox() for _ in range(3)]
        for n in range(20):
            event = make_event(session=f"vs_{n}", id=f"evt_{n}")
            answers = await asyncio.gather(
                *(replicas[i % 3].inbox.admit(event, make_change(event)) for i in range(50))
            )
            assert sorted(outcomes(answers)) == ["admitted"] + ["duplicate"] * 49
        assert len(await replicas[0].entries()) == 20
