"""What is unknown of a window is admitted in order; what is known costs nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from unittest import mock

import orjson
import pytest

from service.cancellation import cancel_and_wait
from service.config import Settings
from service.errors import (
    ApiError,
    ApiErrorReason,
    RejectionReason,
    Unavailable,
    UnavailableReason,
)
from service.inbox.admission import Outcome
from service.storage.connections import Connections
from service.storage.keys import Keys
from service.stripe.events import Event
from service.stripe_api import window_admission
from service.stripe_api.client import Caller
from service.stripe_api.event_pages import ListedEvent
from service.stripe_api.window_admission import Decided, Unusable, WindowAdmission
from tests.support.listing import listed, transitions
from tests.support.stripe_api import StripeStandIn

OWN = Caller(is_live=False)


@pytest.fixture
def admission(connections: Connections, keys: Keys, settings: Settings) -> WindowAdmission:
    """Return the admission of windows, with the name of our own account."""
    return WindowAdmission(connections, keys, replace(settings, account_name="ours"))


async def admit(
    admission: WindowAdmission, caller: Caller, events: Sequence[ListedEvent]
) -> list[Decided | Unusable]:
    """Admit the unknown events of a window; return what became of these."""
    found: list[Decided | Unusable] = []
    await admit_into(found, admission, caller, events)
    return found


async def admit_into(
    found: list[Decided | Unusable],
    admission: WindowAdmission,
    caller: Caller,
    events: Sequence[ListedEvent],
) -> None:
    """Add what became of the unknown events of a window, until one is not decided on."""
    async for one in admission.admit_unknown(caller, events):
        found.append(one)  # noqa: PERF401 - it is kept when the next one raises


def outcomes(found: Sequence[Decided | Unusable]) -> list[str]:
    """Return the words of what was found."""
    return [
        one.admission.outcome if isinstance(one, Decided) else one.rejected.reason for one in found
    ]


def verify(stand_in: StripeStandIn, sessions: int, account: str | None = None) -> list[ListedEvent]:
    """Take some sessions to `verified`, and return their events."""
    for _ in range(sessions):
        stand_in.sessions.create_verified(stand_in.scope(account))
    return listed(stand_in.events.all)


async def test_unknown_events_are_admitted_in_order(
    stand_in: StripeStandIn, admission: WindowAdmission, connections: Connections, keys: Keys
) -> None:
    """Each session's changes reach the handlers in their order, marked as read from the API."""
    events = verify(stand_in, 100)

    found = await admit(admission, OWN, events)

    assert outcomes(found) == [Outcome.ADMITTED] * 300
    appended = await transitions(connections, keys)
    assert len(appended) == 300
    for event in events:
        ours = [one for one in appended if one.session_id == event.session_id]
        assert [(one.sequence, one.current) for one in ours] == [
            (1, "requires_input"), (2, "processing"), (3, "verified"),
        ]  # fmt: skip
    assert {(one.origin, one.account, one.account_name) for one in appended} == {
        ("events_api", None, "ours")
    }
    assert await admit(admission, OWN, events) == []


async def test_the_account_is_that_of_the_caller(
    stand_in: StripeStandIn, admission: WindowAdmission, connections: Connections, keys: Keys
) -> None:
    """Events that do not name their connected account get it; those of another are refused."""
    account = stand_in.directory.connect().id
    named, *others = verify(stand_in, 1, account)
    unnamed = [
        event._replace(body=orjson.dumps({**orjson.loads(event.body), "account": None}))
        for event in others
    ]
    with pytest.raises(ApiError, match=ApiErrorReason.UNEXPECTED):
        await admit(admission, Caller(is_live=False, account="acct_x"), [*unnamed, named])
    assert await transitions(connections, keys) == []

    await admit(admission, Caller(is_live=False, account=account), [named, *unnamed])

    assert {one.account for one in await transitions(connections, keys)} == {account}


async def test_an_unusable_event_does_not_hold_up_the_others(
    stand_in: StripeStandIn, admission: WindowAdmission
) -> None:
    """An event that cannot be parsed is reported with the reason; the others are admitted."""
    events = verify(stand_in, 2)
    envelope = orjson.loads(events[0].body)
    del envelope["data"]["object"]["status"]
    broken = events[0]._replace(body=orjson.dumps(envelope))

    found = await admit(admission, OWN, [broken, *events[1:]])

    assert outcomes(found) == [RejectionReason.FIELD_MISSING, *[Outcome.ADMITTED] * 5]
    assert isinstance(found[0], Unusable)
    assert found[0].listed is broken


async def test_an_event_without_a_decision_holds_up_its_session(
    stand_in: StripeStandIn,
    admission: WindowAdmission,
    connections: Connections,
    keys: Keys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a session whose record is broken nothing is decided; all others are admitted."""
    monkeypatch.setattr(window_admission, "MAX_EVENTS_PER_BATCH", 4)
    events = verify(stand_in, 5)
    broken = events[0].session_id
    record = keys.session_in(keys.partition(broken), broken)
    await connections.client.hset(record, "state", "broken")
    found: list[Decided | Unusable] = []

    with pytest.raises(Unavailable):
        await admit_into(found, admission, OWN, events)

    assert outcomes(found) == [Outcome.ADMITTED] * 12
    await connections.client.delete(record)
    assert outcomes(await admit(admission, OWN, events)) == [Outcome.ADMITTED] * 3


async def test_nothing_is_asked_of_a_redis_that_decides_on_nothing(
    stand_in: StripeStandIn, admission: WindowAdmission, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a batch without any decision no other is tried."""
    monkeypatch.setattr(window_admission, "MAX_EVENTS_PER_BATCH", 4)
    admit_one = mock.AsyncMock(side_effect=Unavailable(UnavailableReason.REDIS_UNREACHABLE))
    monkeypatch.setattr(admission._inbox, "admit", admit_one)

    with pytest.raises(Unavailable, match=r"^redis_unreachable$"):
        await admit(admission, OWN, verify(stand_in, 5))

    assert admit_one.await_count == 4


async def test_other_tasks_run_meanwhile(
    stand_in: StripeStandIn, admission: WindowAdmission, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The events of a window are not parsed all in one turn of the event loop."""
    parse, turns = window_admission._parse, [0]

    def count(caller: Caller, listed: ListedEvent) -> Event | Unusable:
        turns[-1] += 1
        return parse(caller, listed)

    async def tick() -> None:
        while True:
            turns.append(0)
            await asyncio.sleep(0)

    monkeypatch.setattr(window_admission, "MAX_EVENTS_PER_BATCH", 4)
    monkeypatch.setattr(window_admission, "_parse", count)
    ticking = asyncio.create_task(tick())
    assert len(await admit(admission, OWN, verify(stand_in, 10))) == 30
    await cancel_and_wait(ticking)
    assert max(turns) == 4
    assert sum(turns) == 30
