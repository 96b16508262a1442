"""A pass over one account: from where to where it reads, what counts as recovered, its cursor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import structlog.testing

from service.config import Settings
from service.delivery.leases import Lease, LeaseLostError, take_or_renew
from service.errors import Unavailable
from service.parsers import parse_time
from service.storage.connections import Connections
from service.storage.keys import Keys
from service.stripe_api import account_pass, event_pages
from service.stripe_api.account_pass import DELAY_S, LOOKBACKS, OVERLAP_S, AccountPasses, Lookback
from service.stripe_api.client import Caller, StripeApi
from service.stripe_api.cursors import Cursor, move_cursor, read_cursors
from service.stripe_api.destinations import ALL_TYPES
from service.stripe_api.window_admission import WindowAdmission
from service.telemetry import metrics
from service.transitions import thin_notification
from tests.support.listing import transitions
from tests.support.notifications import notification_of
from tests.support.stripe_api import StripeStandIn

# The present of the tests. The clock of the stand-in stands where a test puts it.
NOW = int(time.time())
TEST = Caller(is_live=False)
HOUR_S, DAY_S = 3600, 86_400


async def select_all(_: StripeApi, __: Caller) -> Sequence[str]:
    """Select all types."""
    return ALL_TYPES


class Rig:
    """One account at the stand-in, and passes over its events."""

    def __init__(
        self,
        stand_in: StripeStandIn,
        api: StripeApi,
        connections: Connections,
        keys: Keys,
        make_settings: Callable[..., Settings],
    ) -> None:
        self.stand_in = stand_in
        self.api = api
        self.connections = connections
        self.keys = keys
        self.make_settings = make_settings
        self.lease = Lease(connections, keys, handler="reconcile", partition=0, worker="w")

    def passes(
        self,
        caller: Caller = TEST,
        *,
        start: str = "3d",
        select_types: Any = select_all,
        **changes: Any,
    ) -> AccountPasses:
        """Return passes, as a worker that has just taken the lease has them."""
        return AccountPasses(
            caller,
            self.api,
            WindowAdmission(self.connections, self.keys, self.make_settings(**changes)),
            self.connections,
            self.keys,
            select_types=select_types,
            start_of=partial(parse_time, start),
        )

    async def run(self, passes: AccountPasses, now: float = NOW) -> None:
        """Run one pass at *now*, by the stand-in's clock as well."""
        self.stand_in.clock.stop(now)
        await passes.run(self.lease, now)

    def verify(self, *, at: float) -> str:
        """Take a session to `verified` within a second; return its id. No webhook is sent."""
        self.stand_in.clock.stop(at)
        return self.stand_in.sessions.create_verified().id

    async def admitted(self) -> list[str]:
        """Return the ids of the events that made transitions, sorted."""
        return sorted(one.event_id for one in await transitions(self.connections, self.keys))

    def made(self) -> list[str]:
        """Return the ids of all events at the stand-in, sorted."""
        return sorted(event.id or "" for event in self.stand_in.events.all)

    async def cursor(self) -> Cursor:
        """Return the cursor of our own account."""
        # Redis's clock has gone on since these tests were collected.
        return (await read_cursors(self.connections, self.keys, time.time()))["test"]


@pytest.fixture(autouse=True)
def _no_log() -> Iterator[None]:
    """Keep the lines of thousands of events off the terminal."""
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
async def rig(
    stand_in: StripeStandIn,
    api: StripeApi,
    connections: Connections,
    keys: Keys,
    make_settings: Callable[..., Settings],
) -> Rig:
    """Return passes that hold the lease, over an account in which everything selects `redacted`."""
    rig = Rig(stand_in, api, connections, keys, make_settings)
    assert await take_or_renew(connections, [rig.lease], 600) == [0]
    return rig


def recovered() -> float:
    """Return how many events have been counted as recovered."""
    return float(metrics.EVENTS_RECOVERED._value.get())


async def test_the_first_pass_reads_history(rig: Rig) -> None:
    """Without a cursor three days are read, loudly, and none of it counts as recovered."""
    rig.verify(at=NOW - 3 * DAY_S - 1)
    for hours in range(71):
        rig.verify(at=NOW - 3 * DAY_S + hours * HOUR_S)
    before = recovered()

    with structlog.testing.capture_logs() as logged:
        await rig.run(rig.passes())

    expected = sorted(e.id or "" for e in rig.stand_in.events.all if e.created >= NOW - 3 * DAY_S)
    assert await rig.admitted() == expected
    assert len(expected) == 3 * 71
    assert recovered() == before
    assert await rig.cursor() == Cursor(read_until=NOW - 60, began_at=NOW)
    assert [line for line in logged if line["log_level"] == "warning"] == [
        {
            "event": "reconcile.began",
            "log_level": "warning",
            "livemode": False,
            "account": None,
            "read_from": NOW - 3 * DAY_S,
        }
    ]
    assert {line["event"] for line in logged[1:]} == {"event.reconciled"}


async def test_what_no_webhook_brought_is_recovered(rig: Rig) -> None:
    """After the first pass, an event that only the list has is admitted, counted and logged."""
    passes = rig.passes()
    await rig.run(passes, NOW - 300)
    session = rig.verify(at=NOW - 100)
    before = recovered()

    with structlog.testing.capture_logs() as logged:
        await rig.run(passes)
        await rig.run(passes, NOW + 60)

    assert await rig.admitted() == rig.made()
    assert recovered() == before + 3
    assert {line["event"] for line in logged} == {"event.recovered"}
    assert [(line["log_level"], line["current"], line["outcome"]) for line in logged] == [
        ("warning", current, "admitted") for current in ("requires_input", "processing", "verified")
    ]
    assert {line["session_id"] for line in logged} == {session}


async def test_an_unusable_event_is_logged_and_passed_over(rig: Rig) -> None:
    """What cannot be parsed is named with the reason; the cursor moves on."""
    passes = rig.passes()
    await rig.run(passes, NOW - 300)
    broken, *others = rig.stand_in.events.about(rig.verify(at=NOW - 200))
    broken.session = {**broken.session, "status": 7}

    with structlog.testing.capture_logs() as logged:
        await rig.run(passes)

    [line] = [line for line in logged if line["log_level"] == "error"]
    assert line == {
        "event": "event.unusable",
        "log_level": "error",
        "event_id": broken.id,
        "event_type": broken.type,
        "reason": "field_mistyped",
        "field": "data.object.status",
    }
    assert await rig.admitted() == sorted(event.id or "" for event in others)
    assert (await rig.cursor()).read_until == NOW - 60


async def test_history_stays_history(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first pass that was interrupted goes on later; what it still finds is not recovered."""
    monkeypatch.setattr(event_pages, "MAX_PAGES", 1)
    for minute in range(100):
        rig.verify(at=NOW - HOUR_S - 60 * minute)
    before = recovered()
    moves = 0

    async def die_after_a_window(*arguments: Any) -> None:
        nonlocal moves
        await move_cursor(*arguments)
        moves += 1
        if moves == 2:
            raise asyncio.CancelledError

    with monkeypatch.context() as patch:
        patch.setattr(account_pass, "move_cursor", die_after_a_window)
        with pytest.raises(asyncio.CancelledError):
            await rig.run(rig.passes())
    read_until = (await rig.cursor()).read_until
    assert NOW - 3 * DAY_S < read_until < NOW - 60
    assert len(await rig.admitted()) < len(rig.made())

    with structlog.testing.capture_logs() as logged:
        await rig.run(rig.passes())

    assert await rig.admitted() == rig.made()
    assert recovered() == before
    assert {line["event"] for line in logged} == {"event.reconciled"}


async def test_late_entries_of_the_list(rig: Rig) -> None:
    """Events that are listed 45 s, five minutes and two hours late are found."""
    passes = rig.passes()
    await rig.run(passes, NOW - 4 * HOUR_S)
    for minute in range(4 * 60):
        at = NOW - 4 * HOUR_S + 60 * minute
        for lag_s, every in ((45, 1), (290, 3), (7100, 50)):
            if minute % every == 0:
                rig.stand_in.list_lag_s = lag_s
                rig.verify(at=at + 59)
        await rig.run(passes, at + 60)
        if minute == 3 * 60:
            early = [e for e in rig.stand_in.events.all if e.created < NOW - 3 * HOUR_S]
            assert {e.id for e in early} <= {*await rig.admitted()}
    for hours in (1, 2):
        await rig.run(passes, NOW + hours * HOUR_S)

    assert await rig.admitted() == rig.made()


async def test_a_thin_notification_that_waits(rig: Rig) -> None:
    """An event whose thin notification has come is not missing, although it is unknown."""
    passes = rig.passes()
    await rig.run(passes, NOW - 300)
    session = rig.verify(at=NOW - 100)
    for event in rig.stand_in.events.about(session):
        noted = thin_notification.pack(notification_of(event))
        stream = rig.keys.notifications(rig.keys.partition(session))
        await rig.connections.client.xadd(stream, {"notification": noted})
    before = recovered()

    await rig.run(passes)

    assert await rig.admitted() == rig.made()
    assert recovered() == before


async def test_types_that_no_endpoint_selects(rig: Rig) -> None:
    """Events that no webhook was to bring are neither read nor recovered."""

    async def select_two(_: StripeApi, caller: Caller) -> list[str]:
        assert caller == TEST
        return [f"identity.verification_session.{word}" for word in ("verified", "canceled")]

    passes = rig.passes(select_types=select_two)
    await rig.run(passes, NOW - 300)
    rig.verify(at=NOW - 100)
    before = recovered()

    await rig.run(passes)

    [transition] = await transitions(rig.connections, rig.keys)
    assert transition.current == "verified"
    assert recovered() == before + 1


@pytest.mark.parametrize(("start", "expected"), [("0h", 0), ("2h", 3)])
async def test_passes_look_back_no_further_than_the_first(
    start: str, expected: int, rig: Rig
) -> None:
    """An operator who wants no history gets none, nor by the passes that begin earlier."""
    rig.verify(at=NOW - HOUR_S)
    rig.verify(at=NOW - 2 * HOUR_S - 1)
    passes = rig.passes(start=start)
    for minutes in (0, 10, 60):
        await rig.run(passes, NOW + 60 * minutes)

    assert len(await transitions(rig.connections, rig.keys)) == expected


async def test_what_redis_does_not_decide_is_read_again(rig: Rig) -> None:
    """The cursor stays before a window of which one event was not decided."""
    passes = rig.passes()
    await rig.run(passes, NOW - 300)
    rig.verify(at=NOW - 200)
    stood = await rig.cursor()
    with pytest.raises(Unavailable):
        await rig.run(rig.passes(stream_max_entries=1))
    assert await rig.cursor() == stood

    await rig.run(passes)

    assert await rig.admitted() == rig.made()
    assert await rig.cursor() == stood._replace(read_until=NOW - 60)


async def test_the_cursor_moves_only_forward_and_under_the_lease(rig: Rig, keys: Keys) -> None:
    """Neither an older pass nor a worker that has lost the lease moves a cursor."""
    account = Caller(is_live=True, account="acct_1")
    await move_cursor(rig.lease, keys, account, Cursor(100, 50))
    await move_cursor(rig.lease, keys, account, Cursor(99, 60))
    assert await read_cursors(rig.connections, keys, NOW) == {"live acct_1": Cursor(100, 50)}
    await move_cursor(rig.lease, keys, account, Cursor(101, 60))
    other = Lease(rig.connections, keys, handler="reconcile", partition=0, worker="other")
    with pytest.raises(LeaseLostError):
        await move_cursor(other, keys, account, Cursor(200, 50))
    assert await read_cursors(rig.connections, keys, NOW) == {"live acct_1": Cursor(101, 50)}
    assert rig.lease.is_held()


async def test_a_cursor_that_cannot_be_read_begins_anew(rig: Rig, keys: Keys) -> None:
    """What an operator broke counts as no cursor."""
    await rig.connections.client.hset(keys.reconcile, mapping={"test": "broken", "live": "1 x"})
    assert await read_cursors(rig.connections, keys, NOW) == {}

    await rig.run(rig.passes())

    assert await rig.cursor() == Cursor(read_until=NOW - 60, began_at=NOW)


@pytest.mark.parametrize("ahead_s", [240, 2 * HOUR_S, 30 * HOUR_S])
async def test_a_clock_that_was_ahead(ahead_s: int, rig: Rig) -> None:
    """Events that were made while the worker's clock was ahead of all others are found."""
    passes = rig.passes()
    await rig.run(passes, NOW - 300)
    await passes.run(rig.lease, NOW + ahead_s)
    rig.verify(at=NOW - 70)
    await passes.run(rig.lease, NOW + ahead_s + 60)
    assert (await rig.cursor()).read_until <= time.time()

    rig.verify(at=NOW - 65)
    # One that was listed late.
    rig.verify(at=NOW - 600)
    await rig.run(passes)

    assert await rig.admitted() == rig.made()


@pytest.mark.parametrize("is_restarted", [False, True])
async def test_all_clocks_were_ahead(is_restarted: bool, rig: Rig) -> None:
    """A cursor that a wrong clock has moved into the future counts as none."""
    future = Cursor(NOW + DAY_S, NOW + DAY_S)
    passes = rig.passes()
    await passes.run(rig.lease, NOW + DAY_S)
    await rig.connections.client.hset(
        rig.keys.reconcile, "test", f"{future.read_until} {future.began_at}"
    )
    rig.verify(at=NOW - 2 * DAY_S)

    await rig.run(rig.passes() if is_restarted else passes)

    assert await rig.admitted() == rig.made()
    assert await rig.cursor() == Cursor(read_until=NOW - 60, began_at=NOW)


async def test_a_late_beginning_that_is_set_later(rig: Rig) -> None:
    """Where to begin without a cursor does not matter to an account that has one."""
    await rig.run(rig.passes(), NOW - DAY_S)
    rig.verify(at=NOW - DAY_S + 1)
    rig.stand_in.list_lag_s = 2 * HOUR_S
    rig.verify(at=NOW - DAY_S - HOUR_S)
    start = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(NOW - HOUR_S))

    await rig.run(rig.passes(start=start))

    assert await rig.admitted() == rig.made()


async def test_little_is_asked_when_nothing_is_missing(rig: Rig) -> None:
    """In an hour of passes over a quiet account each asks for one page."""
    passes = rig.passes()
    await rig.run(passes, NOW - HOUR_S)
    before = len(rig.stand_in.requests)
    for minute in range(60):
        await rig.run(passes, NOW - HOUR_S + 60 * (minute + 1))

    assert len(rig.stand_in.requests) - before == 60


def test_lookbacks() -> None:
    """Every ten minutes 15 minutes, every hour 3 hours; else 90 s before the cursor."""
    assert (DELAY_S, OVERLAP_S) == (60, 90)
    assert (Lookback(600, 900), Lookback(3600, 10_800)) == LOOKBACKS
