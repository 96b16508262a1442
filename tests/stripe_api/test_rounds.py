"""Many notifications are answered with few requests, each with its own event and no other."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator, Sequence

import pytest

from service.errors import ApiError, ApiErrorReason
from service.stripe.events import Event
from service.stripe_api import client
from service.stripe_api import rounds as module
from service.stripe_api.client import StripeApi
from service.stripe_api.rounds import MAX_SINGLY, Rounds, open_rounds
from tests.support.notifications import notification_of
from tests.support.stripe_api import Event as StandInEvent
from tests.support.stripe_api import Fault, Scope, StripeStandIn, answer
from tests.support.waiting import PATIENCE_S, until

LIST = "/v1/events"
NOON = 1_795_953_600


@pytest.fixture
async def rounds(
    stand_in: StripeStandIn, api: StripeApi, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Rounds]:
    """Yield rounds that follow each other at once."""
    monkeypatch.setattr(module, "GATHER_S", 0.01)
    monkeypatch.setattr(module, "ROUND_S", 0.01)
    monkeypatch.setattr(module, "PATIENCE_S", 0.1)
    stand_in.clock.stop(NOON)
    async with open_rounds(api) as opened:
        yield opened


def make_events(
    stand_in: StripeStandIn, count: int, *, per_second: int = 254, scope: Scope | None = None
) -> list[StandInEvent]:
    """Create sessions, so many a second; return their events."""
    start = len(stand_in.events.all)
    for number in range(count):
        stand_in.sessions.create(scope=scope)
        if number % per_second == per_second - 1:
            stand_in.clock.advance(1)
    return stand_in.events.all[start:]


async def find_all(rounds: Rounds, events: Sequence[StandInEvent]) -> list[Event | BaseException]:
    """Return what is found for the notifications of *events*, all at once."""
    return await asyncio.gather(
        *(rounds.find(notification_of(event)) for event in events), return_exceptions=True
    )


def ids(found: Sequence[Event | BaseException]) -> list[str | None]:
    """Return the ids of events; no errors may be among them."""
    return [one.id if isinstance(one, Event) else repr(one) for one in found]


def requests(stand_in: StripeStandIn) -> Counter[str]:
    """Return how many requests were made for pages, and for single objects."""
    return Counter("pages" if one.path == LIST else "single" for one in stand_in.requests)


async def test_few_are_read_singly(stand_in: StripeStandIn, rounds: Rounds) -> None:
    """Two requests each, at once."""
    stand_in.list_lag_s = 60
    events = make_events(stand_in, MAX_SINGLY)

    assert ids(await find_all(rounds, events)) == [event.id for event in events]
    assert requests(stand_in) == {"single": 2 * MAX_SINGLY}


async def test_many_are_read_by_pages(stand_in: StripeStandIn, rounds: Rounds) -> None:
    """A hundred at a time, in bursts of one second across the borders of pages, in any order."""
    events = make_events(stand_in, 512)

    assert ids(await find_all(rounds, events[::-1])) == [event.id for event in events[::-1]]
    assert requests(stand_in) == {"pages": 6}


async def test_a_window_of_many_pages(
    stand_in: StripeStandIn, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list is read on towards the past, past what nothing waits for, until all have theirs."""
    monkeypatch.setattr(module, "MAX_PAGES_PER_WINDOW", 2)
    old = make_events(stand_in, 150, per_second=50)
    make_events(stand_in, 1000, per_second=50)
    new = make_events(stand_in, 350, per_second=50)

    found = await find_all(rounds, [*old, *new])

    assert ids(found) == [event.id for event in [*old, *new]]
    # Four windows of the new, two of the old; the seconds at their ends are read twice.
    assert requests(stand_in)["pages"] <= 12
    assert requests(stand_in)["single"] == 0


async def test_pages_that_bring_nothing_are_not_read_on(
    stand_in: StripeStandIn, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few notifications far apart are cheaper to read singly than all that lies between them."""
    monkeypatch.setattr(module, "MAX_PAGES_PER_WINDOW", 2)
    events = make_events(stand_in, 3000, per_second=100)
    few = events[::250]
    assert len(few) > MAX_SINGLY

    assert ids(await find_all(rounds, few)) == [event.id for event in few]
    assert requests(stand_in)["pages"] <= 4
    assert requests(stand_in)["single"] <= 2 * len(few)


async def test_what_comes_while_pages_are_read_waits_for_pages(
    stand_in: StripeStandIn, rounds: Rounds
) -> None:
    """It was not looked for yet."""
    slow = Fault(kind="slow", path=LIST, times=1, seconds=0.2)
    stand_in.faults.add(slow)
    events = make_events(stand_in, 100)

    early = asyncio.ensure_future(find_all(rounds, events[50:]))
    await until(lambda: slow.times == 0)
    late = await find_all(rounds, events[:50])

    assert ids([*late, *await early]) == [event.id for event in events]
    assert requests(stand_in) == {"pages": 2}


async def test_nothing_is_listed(stand_in: StripeStandIn, rounds: Rounds) -> None:
    """What the list lacks is read singly, if need be all."""
    stand_in.list_lag_s = 60
    events = make_events(stand_in, 40)

    assert ids(await find_all(rounds, events)) == [event.id for event in events]
    assert requests(stand_in)["single"] == 80


async def test_the_list_lags_a_little(
    stand_in: StripeStandIn, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the list lacks for a moment is not read singly."""
    monkeypatch.setattr(module, "PATIENCE_S", 60)
    stand_in.list_lag_s = 2
    events = make_events(stand_in, 40)

    finding = asyncio.ensure_future(find_all(rounds, events))
    await until(lambda: requests(stand_in)["pages"] >= 3)
    stand_in.clock.advance(2)

    assert ids(await finding) == [event.id for event in events]
    assert requests(stand_in)["single"] == 0


async def test_the_list_lags(
    stand_in: StripeStandIn, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest are read singly; the others wait for the list, whatever becomes of those."""
    stand_in.list_lag_s = 45
    monkeypatch.setattr(client, "DEADLINE_S", 1.0)
    stand_in.faults.add(Fault(kind="hang", path="/v2/.*"))
    events = make_events(stand_in, 300, per_second=100)

    finding = asyncio.ensure_future(find_all(rounds, events))
    await until(lambda: any(one._being_read for one in rounds._accounts.values()))
    await until(lambda: requests(stand_in)["pages"] >= 20)
    assert not finding.done()
    stand_in.clock.advance(45)
    found = await finding

    failed = [one for one in found if isinstance(one, ApiError)]
    assert {one.reason for one in failed} == {ApiErrorReason.UNREACHABLE}
    assert found[: len(failed)] == failed
    assert len(failed) == MAX_SINGLY
    assert ids(found[MAX_SINGLY:]) == [event.id for event in events[MAX_SINGLY:]]


async def test_events_that_look_alike(stand_in: StripeStandIn, rounds: Rounds) -> None:
    """Two events of one type and second of a session are read singly, for each its own."""
    session = stand_in.sessions.create()
    alike = [decline(stand_in, session.id) for _ in range(2)]
    others = make_events(stand_in, 20)

    found = await find_all(rounds, [alike[1], *others, alike[0]])

    assert ids(found) == [event.id for event in [alike[1], *others, alike[0]]]
    assert requests(stand_in) == {"pages": 1, "single": 4}


async def test_a_second_is_not_read_to_its_end(
    stand_in: StripeStandIn, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What looks alike may stand on the next page, which is not read any more."""
    monkeypatch.setattr(module, "MAX_PAGES_PER_WINDOW", 1)
    session = stand_in.sessions.create()
    first = decline(stand_in, session.id)
    others = make_events(stand_in, 99)
    decline(stand_in, session.id)

    found = await find_all(rounds, [first, *others[:20]])

    assert ids(found) == [event.id for event in [first, *others[:20]]]


@pytest.mark.parametrize("listed", [0, 1])
async def test_one_of_two_that_look_alike_is_listed(
    listed: int, stand_in: StripeStandIn, rounds: Rounds
) -> None:
    """Notifications of a session come one by one: in the end both events are found, each once."""
    session = stand_in.sessions.create()
    alike = [decline(stand_in, session.id) for _ in range(2)]
    alike[1 - listed].listed_at += 60
    others = make_events(stand_in, 40)

    first = await find_all(rounds, [alike[0], *others[:20]])
    second = await find_all(rounds, [alike[1], *others[20:]])

    assert {*ids([first[0], second[0]])} == {event.id for event in alike}
    assert ids([*first[1:], *second[1:]]) == [event.id for event in others]


async def test_a_refusal_concerns_one_account(stand_in: StripeStandIn, rounds: Rounds) -> None:
    """All that wait for that account fail; those of other accounts are answered."""
    account = stand_in.directory.connect()
    refused = make_events(stand_in, 30, scope=stand_in.scope(account.id))
    own = make_events(stand_in, 30)
    stand_in.directory.deauthorize(account.id)

    found = await find_all(rounds, [*refused, *own])

    assert [one.reason for one in found[:30] if isinstance(one, ApiError)] == [
        ApiErrorReason.FORBIDDEN
    ] * 30
    assert ids(found[30:]) == [event.id for event in own]


@pytest.mark.parametrize("body", [b"[]", b'{"object": "list", "has_more": true, "data": []}'])
async def test_pages_that_are_wrong(body: bytes, stand_in: StripeStandIn, rounds: Rounds) -> None:
    """They answer nothing; what waits is read singly, ten at a time."""
    stand_in.faults.add(answer(body, path=LIST))
    events = make_events(stand_in, 30)

    assert ids(await find_all(rounds, events)) == [event.id for event in events]
    assert requests(stand_in)["single"] == 60


async def test_an_event_on_a_page_is_judged_like_any_other(
    stand_in: StripeStandIn, rounds: Rounds
) -> None:
    """A listed event that cannot be parsed is read singly, and fails alone."""
    events = make_events(stand_in, 20)
    broken = events[7]
    broken.session = {**broken.session, "status": 7}

    found = await find_all(rounds, events)

    failure = found.pop(7)
    assert isinstance(failure, ApiError)
    assert failure.reason is ApiErrorReason.UNEXPECTED
    assert ids(found) == [event.id for event in events if event is not broken]


async def test_nothing_is_left_behind(
    stand_in: StripeStandIn, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of notifications that are given up, and of accounts that are done with, nothing is kept."""
    monkeypatch.setattr(client, "DEADLINE_S", 0.3)
    stand_in.faults.add(Fault(kind="hang"))
    events = make_events(stand_in, 20)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await find_all(rounds, events)
    assert len(rounds._accounts) == 1
    await until(lambda: not rounds._tasks)
    stand_in.faults.clear()
    monkeypatch.setattr(client, "DEADLINE_S", PATIENCE_S)
    assert ids(await find_all(rounds, events)) == [event.id for event in events]

    await until(lambda: not rounds._tasks)
    gc.collect()
    assert not rounds._accounts


async def test_closing_ends_rounds(stand_in: StripeStandIn, api: StripeApi) -> None:
    """A request that hangs does not delay the end."""
    stand_in.faults.add(Fault(kind="hang"))
    async with open_rounds(api) as rounds:
        finding = asyncio.ensure_future(find_all(rounds, make_events(stand_in, 20)))
        await until(lambda: bool(rounds._tasks))
    assert not rounds._tasks
    finding.cancel()


def decline(stand_in: StripeStandIn, session_id: str) -> StandInEvent:
    """Let a person decline, which may happen again in the same second; return its event."""
    stand_in.sessions.reject(session_id, "consent_declined")
    return stand_in.events.all[-1]
