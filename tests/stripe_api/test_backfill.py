"""What is unknown of a stretch of time is admitted: once, beside webhooks, from anywhere on."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

import pytest

from service.config import Livemode, Settings
from service.errors import ApiErrorReason
from service.inbox.admission import Inbox
from service.secret import Secret
from service.storage.connections import Connections
from service.storage.keys import Keys
from service.stripe_api import event_pages
from service.stripe_api.backfill import Backfill, find_callers, select_types
from service.stripe_api.client import Caller, StripeApi
from service.stripe_api.destinations import ALL_TYPES
from service.stripe_api.keys import ApiKeys
from service.stripe_api.window_admission import WindowAdmission
from service.transitions.transition import make_change
from tests.support.listing import transitions
from tests.support.notifications import pushed
from tests.support.stripe_api import Fault, StripeStandIn
from tests.support.waiting import PATIENCE_S

NOW = int(time.time())
FIRST = NOW - 30 * 86_400
OWN = Caller(is_live=False)


class Run:
    """Backfills over the test mode of the stand-in."""

    def __init__(
        self, api: StripeApi, connections: Connections, keys: Keys, settings: Settings
    ) -> None:
        self._api = api
        self._connections = connections
        self._keys = keys
        self._admission = WindowAdmission(connections, keys, settings)
        self.read_s = 0

    def new(self, *callers: Caller, first: int = FIRST, is_dry_run: bool = False) -> Backfill:
        """Return a backfill up to now; by default of our own account."""
        types = dict.fromkeys(callers or (OWN,), ALL_TYPES)
        return Backfill(
            self._api, self._admission, types, first=first, last=NOW, is_dry_run=is_dry_run
        )

    async def to_end(self, backfill: Backfill) -> Counter[str]:
        """Run to the end, and return the counts."""
        await backfill.run(asyncio.Event(), self._count)
        return backfill.counts

    async def one_window(self, first: int) -> Backfill:
        """Run a backfill that is interrupted after its first window."""
        backfill, stopping = self.new(first=first), asyncio.Event()
        await backfill.run(stopping, lambda _: stopping.set())
        return backfill

    def _count(self, seconds: int) -> None:
        self.read_s += seconds

    async def admitted(self) -> list[str]:
        """Return the ids of the events that made transitions."""
        return [one.event_id for one in await transitions(self._connections, self._keys)]


@pytest.fixture
def run(api: StripeApi, connections: Connections, keys: Keys, settings: Settings) -> Run:
    """Return what runs backfills."""
    return Run(api, connections, keys, settings)


def verify(stand_in: StripeStandIn, sessions: int, *, account: str | None = None) -> list[str]:
    """Take sessions to `verified`, over some weeks; return the ids of their events."""
    before = len(stand_in.events.all)
    for number in range(sessions):
        stand_in.clock.stop(NOW - 29 * 86_400 + number * 1000)
        stand_in.sessions.create_verified(stand_in.scope(account))
    stand_in.clock.stop(NOW)
    return [event.id or "" for event in stand_in.events.all[before:]]


async def test_all_that_is_unknown_is_admitted(stand_in: StripeStandIn, run: Run) -> None:
    """Of all accounts everything is read; a dry run counts without a write."""
    account = stand_in.directory.connect().id
    made = verify(stand_in, 20) + verify(stand_in, 10, account=account)
    both = (OWN, Caller(is_live=False, account=account))

    assert await run.to_end(run.new(*both, is_dry_run=True)) == {"unknown": 90}
    assert await run.admitted() == []
    assert run.read_s == 2 * (NOW - FIRST + 1)

    assert await run.to_end(run.new(*both)) == {"admitted": 90}
    assert sorted(await run.admitted()) == sorted(made)
    assert await run.to_end(run.new(*both)) == {"known": 90}
    assert await run.to_end(run.new(*both, is_dry_run=True)) == {"known": 90}
    assert len(await run.admitted()) == 90


async def test_webhooks_come_meanwhile(
    stand_in: StripeStandIn, run: Run, connections: Connections, keys: Keys, settings: Settings
) -> None:
    """Beside live webhooks each event is admitted once, or is late."""
    made = verify(stand_in, 100)
    events = [pushed(event) for event in stand_in.events.all]
    inbox = Inbox(connections, keys, settings)

    async def receive() -> Counter[str]:
        answers = Counter[str]()
        for event in reversed(events):
            answers[(await inbox.admit(event, make_change(event))).outcome.value] += 1
        return answers

    received, filled = await asyncio.gather(receive(), run.to_end(run.new()))

    decided = ("admitted", "late", "unchanged")
    assert sum(received[word] + filled[word] for word in decided) == len(made)
    assert received.total() == filled.total() == len(made)
    admitted = await run.admitted()
    assert len(admitted) == len({*admitted}) == received["admitted"] + filled["admitted"]


async def test_it_goes_on_where_it_stopped(
    stand_in: StripeStandIn, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after any window, the next run needs to read the rest only."""
    monkeypatch.setattr(event_pages, "MAX_PAGES", 1)
    made = verify(stand_in, 100)
    first, counts, runs = FIRST, Counter[str](), 0
    while True:
        backfill = await run.one_window(first)
        counts += backfill.counts
        runs += 1
        assert backfill.next_second > first
        first = backfill.next_second
        if backfill.is_complete:
            break
    assert runs > 3
    assert counts == {"admitted": len(made)}
    assert sorted(await run.admitted()) == sorted(made)


async def test_interrupted_while_stripe_does_not_answer(stand_in: StripeStandIn, run: Run) -> None:
    """Even while a page is awaited it stops at once."""
    verify(stand_in, 1)
    backfill, stopping = run.new(), asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, stopping.set)
    stand_in.faults.add(Fault(kind="hang"))
    await asyncio.wait_for(backfill.run(stopping, lambda _: None), PATIENCE_S)
    assert (backfill.next_second, backfill.is_complete, backfill.counts) == (FIRST, False, {})


async def test_an_account_that_refuses(stand_in: StripeStandIn, run: Run) -> None:
    """The others are read to their end; where to go on is where the failed one stopped."""
    account = stand_in.directory.connect().id
    made = verify(stand_in, 3)
    stand_in.directory.deauthorize(account)
    refused = Caller(is_live=False, account=account)
    backfill = run.new(refused, OWN)

    assert await run.to_end(backfill) == {"admitted": len(made)}
    assert backfill.failures == {refused: ApiErrorReason.FORBIDDEN}
    assert not backfill.is_complete
    assert backfill.next_second == FIRST


def test_whose_events_are_read(make_settings: Callable[..., Settings]) -> None:
    """Accounts are read in the modes of the keys and of LIVEMODE."""
    settings = make_settings(stripe_accounts=("acct_1",))
    live, both = (ApiKeys([Secret("rk_live_1"), Secret("rk_test_1")][:count]) for count in (1, 2))
    assert find_callers(settings, both, None) == [
        Caller(is_live, account) for is_live in (True, False) for account in (None, "acct_1")
    ]
    assert find_callers(settings, live, "acct_2") == [Caller(is_live=True, account="acct_2")]
    assert find_callers(make_settings(livemode=Livemode.TEST), live, None) == []


async def test_types_are_those_that_are_selected(stand_in: StripeStandIn, api: StripeApi) -> None:
    """Of the own account and of connected ones, as Stripe is set up; else all."""
    url = "https://shop.test/webhooks/stripe"
    stand_in.subscribe(url, events=[ALL_TYPES[3]])
    connected = Caller(is_live=False, account="acct_1")

    types = await select_types(api, [OWN, connected])

    assert {caller: [*found] for caller, found in types.items()} == {
        OWN: [ALL_TYPES[3]],
        connected: [*ALL_TYPES],
    }
