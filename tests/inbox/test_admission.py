"""Admission: what one event makes of the session's record and of the stream, and in which order."""

from __future__ import annotations

import itertools
import time

import pytest

from service.config import DAY_S
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


class TestOrder:
    """Which of a session's events counts as the later one."""

    async def test_equal_order_keys_are_ordered_by_event_id(self, inbox: InspectedInbox) -> None:
        """Two changes of one second and one type end in the same state, whichever arrives first."""
        ids = ["evt_9", "evt_9a", "evt_B", "evt_a", "evt_aB", "evt_ab"]
        for first, second in itertools.combinations(ids, 2):
            one = make_event("requires_input", id=first, at=5, error="document_expired")
            other = make_event("requires_input", id=second, at=5, error="abandoned")

            await inbox.client.flushall()
            assert outcomes(await inbox.admit(one, other)) == ["admitted", "admitted"]
            await inbox.client.flushall()
            assert outcomes(await inbox.admit(other, one)) == ["admitted", "late"]

    @pytest.mark.parametrize(
        ("first", "second", "outcome"),
        [
            (("processing", 100), ("verified", 94), "late"),
            (("processing", 100), ("verified", 95), "admitted"),
            (("requires_input", 100), ("processing", 105), "late"),
            (("requires_input", 100), ("processing", 106), "admitted"),
        ],
    )
    async def test_a_step_and_a_result_of_about_one_time(
        self, inbox: InspectedInbox, first: tuple[str, int], second: tuple[str, int], outcome: str
    ) -> None:
        """The result counts as the later one, unless they are further apart than the skew."""
        events = [make_event(word, word, at=at) for word, at in (first, second)]
        assert outcomes(await inbox.admit(*events)) == ["admitted", outcome]
