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
    NOW,
    PROCESSING,
    SESSION_ID,
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
