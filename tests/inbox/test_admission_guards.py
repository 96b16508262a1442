"""What must hold before an event is admitted: our layout, and clocks that agree."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from service.config import DAY_S, MAX_CLOCK_DIFFERENCE_S
from service.storage import layout
from service.storage.connections import Connections
from service.storage.keys import Keys
from tests.support.admissions import (
    CREATED,
    NOW,
    PROCESSING,
    SESSION_ID,
    InboxAt,
    InspectedInbox,
    OpenInbox,
    make_event,
    outcomes,
)

EVENTS = [make_event(session=f"vs_{n}", id=f"evt_{n}") for n in range(40)]
Clock = Callable[[float], None]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return what sets this process's clock ahead by so many seconds."""
    right = time.time

    def ahead(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: right() + seconds)

    return ahead


class TestLayout:
    """All processes look for a session in the same partition, or none admits it."""

    async def test_the_first_event_claims_the_layout(
        self, redis_url: str, inbox_at: InboxAt
    ) -> None:
        """On an empty server a receiver claims its own layout before it admits an event."""
        async with inbox_at(redis_url) as inbox:
            assert outcomes(await inbox.admit(CREATED)) == ["admitted"]
            assert await inbox.client.hget(inbox.keys.layout, "partitions") == b"8"
            for partition in range(8):
                copy = await inbox.client.get(inbox.keys.layout_in(partition))
                assert copy == inbox.keys.layout_copy.encode()

    async def test_a_lost_layout_is_claimed_anew(self, inbox: InspectedInbox) -> None:
        """After Redis has lost everything, or one copy, the same request is admitted."""
        await inbox.client.flushall()
        assert outcomes(await inbox.together(*EVENTS)) == ["admitted"] * 40
        assert await inbox.client.hget(inbox.keys.layout, "partitions") == b"8"
        copy = inbox.keys.layout_in(inbox.keys.partition(SESSION_ID))
        await inbox.client.delete(copy)
        assert outcomes(await inbox.admit(PROCESSING)) == ["admitted"]
        assert await inbox.client.exists(copy)

    async def test_a_claim_that_fails_is_made_again(
        self, inbox: InspectedInbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where Redis fails while the layout is claimed, the event waits for the next attempt."""
        claim, failures = layout.claim, [RedisConnectionError(), OSError()]

        async def failing(connections: Connections, keys: Keys) -> None:
            if failures:
                raise failures.pop()
            await claim(connections, keys)

        await inbox.client.flushall()
        monkeypatch.setattr(layout, "claim", failing)
        assert outcomes(await inbox.admit(CREATED)) == ["admitted"]
        assert not failures

    async def test_nothing_is_admitted_under_another_layout(self, open_inbox: OpenInbox) -> None:
        """With another number of partitions than the layout in Redis has, no event is admitted."""
        first, second = open_inbox(), open_inbox(partitions=16)
        await first.admit(CREATED)
        assert outcomes(await second.together(*EVENTS)) == ["layout_differs"] * 40
        assert len(await first.entries()) == 1
        assert len(await second.entries()) == 1
        assert outcomes(await first.together(*EVENTS)) == ["admitted"] * 40

    async def test_an_event_is_admitted_once_whatever_is_claimed_after_a_loss(
        self, open_inbox: OpenInbox
    ) -> None:
        """Of processes with two layouts on an emptied server, those of one layout go on."""
        old, new = open_inbox(), open_inbox(partitions=16)
        for _ in range(5):
            await old.client.flushall()
            answers = await asyncio.gather(
                *(each.together(event) for event in EVENTS for each in (old, new))
            )
            words = [outcomes(pair) for pair in answers]
            assert words.count(["admitted"]) == 40
            assert words.count(["layout_differs"]) == 40
            # Partitions 0 to 15 are those of either layout.
            assert len(await new.entries()) == 40


class TestClocks:
    """The receiver's clock decides on age, as long as Redis's agrees with it."""

    @pytest.mark.parametrize("side", [1, -1], ids=["ahead", "behind"])
    async def test_clocks_that_differ_admit_nothing(
        self, inbox: InspectedInbox, clock: Clock, side: int
    ) -> None:
        """Beyond the tolerance no event is decided; within it every event is."""
        await inbox.admit(CREATED)
        clock(side * (MAX_CLOCK_DIFFERENCE_S + 5))
        events = [CREATED, PROCESSING, make_event(id="evt_old", at=-36 * DAY_S)]
        assert outcomes(await inbox.together(*events)) == ["clocks_differ"] * 3
        assert "duplicates" not in await inbox.record()
        assert len(await inbox.entries()) == 1
        clock(side * (MAX_CLOCK_DIFFERENCE_S - 60))
        assert outcomes(await inbox.together(*events)) == ["duplicate", "admitted", "expired"]

    async def test_the_receivers_clock_decides_on_age(
        self, inbox: InspectedInbox, clock: Clock
    ) -> None:
        """An event is expired or admitted by the receiver's clock, whatever Redis's clock says."""
        at_limit = int(time.time()) - NOW - 35 * DAY_S
        young = make_event(id="evt_young", at=at_limit - 100)
        old = make_event("processing", "processing", id="evt_old", at=at_limit + 100)
        clock(-200)
        assert outcomes(await inbox.admit(young)) == ["admitted"]
        clock(200)
        assert outcomes(await inbox.admit(old)) == ["expired"]
