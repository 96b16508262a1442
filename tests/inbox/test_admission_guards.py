"""Laws of what must hold before anything is admitted: our layout, and clocks that agree."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from service.config import DAY_S, MAX_CLOCK_DIFFERENCE_S, Settings
from service.storage.layout import Keys
from tests.inbox.test_admission import (
    CREATED,
    NOW,
    PROCESSING,
    SESSION_ID,
    Ledger,
    ledger_at,
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
    """A session is looked for in one partition by all, or nothing is admitted."""

    async def test_the_first_event_claims_the_layout(
        self, redis_url: str, make_settings: Callable[..., Settings]
    ) -> None:
        """A receiver that was not told of any layout claims its own before it admits."""
        async with ledger_at(redis_url, make_settings) as ledger:
            assert outcomes(await ledger.admit(CREATED)) == ["admitted"]
            assert await ledger.client.hget(ledger.keys.layout, "partitions") == b"8"
            for partition in range(8):
                copy = await ledger.client.get(ledger.keys.layout_in(partition))
                assert copy == ledger.keys.layout_copy.encode()

    async def test_a_lost_layout_is_claimed_anew(
        self, redis_url: str, make_settings: Callable[..., Settings]
    ) -> None:
        """After Redis has lost everything, or one copy, the same request is admitted."""
        async with ledger_at(redis_url, make_settings) as ledger:
            await ledger.admit(CREATED)
            await ledger.client.flushall()
            assert outcomes(await ledger.together(*EVENTS)) == ["admitted"] * 40
            assert await ledger.client.hget(ledger.keys.layout, "partitions") == b"8"
            partition = ledger.keys.partition(SESSION_ID)
            await ledger.client.delete(ledger.keys.layout_in(partition))
            assert outcomes(await ledger.admit(PROCESSING)) == ["admitted"]
            assert await ledger.client.exists(ledger.keys.layout_in(partition))

    async def test_nothing_is_admitted_under_another_layout(
        self, redis_url: str, make_settings: Callable[..., Settings]
    ) -> None:
        """With another number of partitions than Redis was made for no event gets in."""
        async with (
            ledger_at(redis_url, make_settings) as first,
            ledger_at(redis_url, make_settings, partitions=16) as second,
        ):
            await first.admit(CREATED)
            assert outcomes(await second.together(*EVENTS)) == ["layout_differs"] * 40
            assert len(await first.entries()) == 1
            assert len(await second.entries()) == 1
            assert outcomes(await first.together(*EVENTS)) == ["admitted"] * 40

    async def test_an_event_is_admitted_once_whatever_is_claimed_after_a_loss(
        self, redis_url: str, make_settings: Callable[..., Settings]
    ) -> None:
        """Processes of two layouts beside each other, Redis emptied: one of them goes on."""
        async with (
            ledger_at(redis_url, make_settings) as old,
            ledger_at(redis_url, make_settings, partitions=16) as new,
        ):
            await old.admit(CREATED)
            for _ in range(5):
                await old.client.flushall()
                answers = await asyncio.gather(
                    *(each.together(event) for event in EVENTS for each in (old, new))
                )
                words = [outcomes(pair) for pair in answers]
                assert words.count(["admitted"]) == 40
                assert words.count(["layout_differs"]) == 40
                wide: Keys = new.keys
                assert len(await Ledger(new.inbox, new.client, wide).entries()) == 40

    async def test_running_processes_do_not_work_on_what_another_has_claimed(
        self, redis_url: str, make_settings: Callable[..., Settings]
    ) -> None:
        """A receiver that was at work before the loss takes nothing for the layout of after it."""
        async with (
            ledger_at(redis_url, make_settings) as old,
            ledger_at(redis_url, make_settings, partitions=16) as new,
        ):
            await old.admit(CREATED)
            await old.client.flushall()
            assert outcomes(await new.together(*EVENTS)) == ["admitted"] * 40
            assert outcomes(await old.together(*EVENTS)) == ["layout_differs"] * 40
            assert outcomes(await old.together(*EVENTS)) == ["layout_differs"] * 40
            assert len(await new.entries()) == 40


class TestClocks:
    """Age is judged by the clock that has verified the signature, while Redis's agrees with it."""

    @pytest.mark.parametrize("side", [1, -1], ids=["ahead", "behind"])
    async def test_clocks_that_differ_admit_nothing(
        self, side: int, redis_url: str, make_settings: Callable[..., Settings], clock: Clock
    ) -> None:
        """Beyond the tolerance every event is refused as a whole; within it, none is."""
        async with ledger_at(redis_url, make_settings) as ledger:
            await ledger.admit(CREATED)
            clock(side * (MAX_CLOCK_DIFFERENCE_S + 5))
            events = [CREATED, PROCESSING, make_event(id="evt_old", at=-36 * DAY_S)]
            assert outcomes(await ledger.together(*events)) == ["clocks_differ"] * 3
            assert "duplicates" not in await ledger.record()
            assert len(await ledger.entries()) == 1
            clock(side * (MAX_CLOCK_DIFFERENCE_S - 60))
            assert outcomes(await ledger.together(*events)) == ["duplicate", "admitted", "expired"]

    async def test_age_is_judged_by_our_own_clock(
        self, redis_url: str, make_settings: Callable[..., Settings], clock: Clock
    ) -> None:
        """What is too old here is expired, what is not is admitted, whatever Redis's clock says."""
        at_limit = int(time.time()) - NOW - 35 * DAY_S
        young = make_event(id="evt_young", at=at_limit - 100)
        old = make_event("processing", "processing", id="evt_old", at=at_limit + 100)
        async with ledger_at(redis_url, make_settings) as ledger:
            clock(-200)
            assert outcomes(await ledger.admit(young)) == ["admitted"]
            clock(200)
            assert outcomes(await ledger.admit(old)) == ["expired"]
