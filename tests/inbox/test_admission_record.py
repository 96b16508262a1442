"""The session's record in Redis: small, pruned, without secrets, and readable or refused."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from service.config import DAY_S
from service.errors import Unavailable
from tests.support.admissions import (
    CREATED,
    DEADLINE_S,
    EVENT_ID,
    NOW,
    SESSION_ID,
    InspectedInbox,
    OpenInbox,
    make_event,
    outcomes,
)
from tests.support.virtual_time import push


class TestRecord:
    """The hash of a session."""

    async def test_it_stays_small(self, inbox: InspectedInbox) -> None:
        """With realistic ids a session of up to 8 events is one listpack, of 550 bytes with 4."""
        key = inbox.keys.session(SESSION_ID)
        for n in range(8):
            step = "processing" if n % 2 else "requires_input"
            await inbox.admit(make_event(step, step, id=f"{EVENT_ID[:-1]}{n}", at=n))
            assert await inbox.client.object("ENCODING", key) == b"listpack"
            if n == 3:
                assert await inbox.client.memory_usage(key) <= 550

    async def test_ids_that_cannot_come_again_are_pruned(self, open_inbox: OpenInbox) -> None:
        """At times ids are forgotten whose events are expired to every receiver."""
        days = [6] * 20 + [2] * 20 + [0] * 21
        story = [
            make_event(
                "processing" if n % 2 else "requires_input",
                str(n),
                id=f"evt_{n:02}",
                at=n - each * DAY_S,
            )
            for n, each in enumerate(days)
        ]
        await open_inbox().admit(*story[:-1])
        narrow = open_inbox(max_event_age_days=3)
        await narrow.admit(story[-1])

        kept = [name for name in await narrow.record() if name.startswith("evt_")]
        assert sorted(kept) == [event.id for event in story[20:]]
        assert outcomes(await narrow.admit(story[0], story[39])) == ["expired", "duplicate"]
        assert (await narrow.record())["sequence"] == "61"

    @pytest.mark.parametrize("prefix", ["evt_", "read:evt_"])
    async def test_ids_are_pruned_where_age_is_not_judged(
        self, open_inbox: OpenInbox, prefix: str
    ) -> None:
        """Where events of any age are admitted ids are forgotten all the same, of either form."""
        unjudged = open_inbox(judges_age=False)
        old = make_event("processing", "processing", id="evt_old", at=-90 * DAY_S)
        old = msgspec.structs.replace(old, id=f"{prefix}old")
        story = [make_event("processing", str(n), id=f"evt_{n}", at=n) for n in range(60)]

        assert outcomes(await unjudged.admit(old, old, *story)) == [
            *("admitted", "duplicate"),
            *["admitted"] * 60,
        ]
        assert old.id not in await unjudged.record()

    async def test_ids_that_a_slow_clock_still_admits_are_kept(self, inbox: InspectedInbox) -> None:
        """An event that is expired here may not be to a receiver whose clock is behind."""
        oldest = int(time.time()) - 35 * DAY_S - NOW
        spared = make_event("created", id="evt_spared", at=oldest - 500)
        story = [make_event("processing", str(n), id=f"evt_{n}", at=n) for n in range(61)]
        await inbox.admit(story[0])
        await inbox.client.hset(
            inbox.keys.session(SESSION_ID), spared.id, f"l 1 {spared.created} nonce678 1"
        )
        await inbox.admit(*story[1:])
        assert outcomes(await inbox.admit(spared)) == ["duplicate"]

    async def test_a_session_of_many_events_stays_bounded(self, open_inbox: OpenInbox) -> None:
        """Of any number of ids, hardly more than twice those that may come again are kept."""
        narrow = open_inbox(max_event_age_days=3)
        key = narrow.keys.session(SESSION_ID)
        await narrow.admit(CREATED)
        expired = {f"evt_old{n}": f"l 1 {NOW - 9 * DAY_S} nonce678 1" for n in range(2_000)}
        await narrow.client.hset(key, mapping=expired)
        for n in range(40):
            await narrow.together(
                *(make_event("created", id=f"evt_{n}_{i}", at=-9) for i in range(100))
            )
        assert await narrow.client.hlen(key) < 4_000 + 700

    async def test_ids_of_every_form_stay_ids(self, inbox: InspectedInbox) -> None:
        """The longest and oddest ids make no other fields and keys than their own."""
        odd = ["evt_position", "evt_" + "_" * 250, "evt_0", "evt_status_sequence"]
        sessions = ["vs_" + "x" * 250, "vs_idv_layout", "vs_0", "vs__transitions"]
        for session in sessions:
            for at, name in enumerate(odd):
                step = ("requires_input", "processing")[at % 2]
                event = make_event(step, step, id=name, session=session, at=10 * at)
                assert outcomes(await inbox.admit(event, event)) == ["admitted", "duplicate"]
            assert (await inbox.record(session))["sequence"] == "4"
        keys = {key.decode() for key in await inbox.client.keys("*")}
        others = {inbox.keys.layout, *map(inbox.keys.layout_in, range(8))}
        others |= {inbox.keys.transitions(partition) for partition in range(8)}
        assert keys - others == {inbox.keys.session(session) for session in sessions}

    @pytest.mark.parametrize(
        "fields",
        [
            None,
            {"state": "was better"},
            {"state": "1 1 01234567 0123456789abcdef s", "latest": "s 1 evt_1"},
            {"state": "1 ? 01234567 0123456789abcdef s", "status": "8 verified", "latest": "s 1 x"},
            {"state": "1 1 01234567 0123456789abcdef s", "status": "verified", "latest": "s 1 x"},
            {"state": "1 1 01234567 0123456789abcdef s", "status": "8 verified"},
        ],
        ids=["no hash", "no numbers", "no status", "no epoch", "no length", "no latest event"],
    )
    async def test_a_broken_record_fails_its_own_events_only(
        self, fields: dict[str, str] | None, open_inbox: OpenInbox
    ) -> None:
        """Events of a record that an operator broke fail; others of the same batch are admitted."""
        inbox = open_inbox(admit_deadline_s=DEADLINE_S)
        same_partition = next(
            f"vs_{n}"
            for n in range(999)
            if inbox.keys.partition(f"vs_{n}") == inbox.keys.partition(SESSION_ID)
        )
        key = inbox.keys.session(SESSION_ID)
        if fields is None:
            await inbox.client.set(key, "broken")
        else:
            await inbox.client.hset(key, mapping=fields)
        other = [make_event(session=same_partition, id=f"evt_{n}", status=str(n)) for n in "ab"]

        first, broken, second = (
            asyncio.create_task(inbox.admit(one)) for one in (other[0], CREATED, other[1])
        )
        # All three share a batch, so by now the broken one has failed once, and is retried.
        assert outcomes([*await first, *await second]) == ["admitted"] * 2
        push(DEADLINE_S)
        with pytest.raises(Unavailable, match="redis_refused"):
            await broken
        assert len(await inbox.entries()) == 2

    @pytest.mark.parametrize("kind", ["event", "notification"])
    async def test_every_answer_to_a_known_id_is_a_write(
        self, inbox: InspectedInbox, kind: str
    ) -> None:
        """A duplicate and a repeated answer write, so that WAIT covers the first write too."""
        partition = inbox.keys.partition(SESSION_ID)
        if kind == "event":
            keys = [inbox.keys.transitions(partition), inbox.keys.session(SESSION_ID)]
            judged: tuple[str | int, ...] = (NOW * 10, "s", "hash", "processing", "{}")
        else:
            keys = [inbox.keys.notifications(partition), inbox.keys.noted(partition, "evt_1")]
            judged = ("", "n", "", "", "{}")
        answers = []
        for nonce in ("mine", "mine", "another", "mine"):
            answer, written = await inbox.ask(keys, "evt_1", nonce, NOW, *judged)
            outcome, sequence, _, previous = answer.split(" ", 3)
            answers.append((outcome, sequence, previous))
            assert written > 0

        first = ("admitted", "1", "") if kind == "event" else ("queued", "0", "")
        assert answers == [first, first, ("duplicate", *first[1:]), first]
