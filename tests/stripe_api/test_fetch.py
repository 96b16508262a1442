"""From notifications to transitions: with a worker, Redis and the stand-in for Stripe."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from random import Random
from typing import Any
from unittest import mock

import pytest
import redis
import structlog.testing

from service.config import DAY_S, Settings
from service.delivery import dead_letters, stream_watcher, worker
from service.delivery.consumer_groups import create_groups
from service.delivery.dead_letters import Entry, EntryFilter
from service.delivery.worker import Worker
from service.errors import ApiError, ApiErrorReason, Unavailable, UnavailableReason, Unreachable
from service.handlers import AnyHandler
from service.inbox import session_record
from service.inbox.admission import Inbox, Outcome
from service.parsers import FETCH
from service.secret import Secret
from service.storage.connections import Connections
from service.stripe_api import fetch, rounds
from service.stripe_api.client import StripeApi
from service.stripe_api.fetch import Fetcher, open_fetcher
from service.stripe_api.keys import ApiKeys
from service.telemetry import metrics
from service.transitions.transition import Origin, StatusTransition, make_change
from tests.support.notifications import notification_of, pushed
from tests.support.stripe_api import Event as StandInEvent
from tests.support.stripe_api import Fault, StripeStandIn, broken, fail, too_many_requests
from tests.support.stripe_api.errors import missing
from tests.support.stripe_api.lives import LIVES, final_states, live
from tests.support.waiting import PATIENCE_S, until
from tests.support.workers import INTERVAL_S, SETTINGS, Deployment


class Fetching:
    """A deployment whose worker fetches, and delivers transitions to a list.

    Attributes:
        transitions: What was delivered.
    """

    def __init__(self, deployment: Deployment, fetcher: Fetcher) -> None:
        self.deployment = deployment
        self.fetcher = fetcher
        self.transitions: list[StatusTransition] = []
        self._inbox = Inbox(deployment.connections, deployment.keys, deployment.settings)

    def start(self, **changes: Any) -> Worker:
        """Start a worker."""

        async def take(transition: StatusTransition) -> None:
            self.transitions.append(transition)

        handlers: dict[str, AnyHandler] = {FETCH: self.fetcher, "log": take}
        return self.deployment.start(handlers, **changes)

    async def note(self, *events: StandInEvent, **how: Any) -> None:
        """Receive thin events."""
        found = await asyncio.gather(
            *(self._inbox.note(notification_of(event, **how)) for event in events)
        )
        assert {one.outcome for one in found} <= {Outcome.QUEUED, Outcome.DUPLICATE}

    async def admit(self, event: StandInEvent) -> None:
        """Receive a snapshot event."""
        found = pushed(event)
        await self._inbox.admit(found, make_change(found))

    async def dead_letters(self) -> list[Entry]:
        """Return the dead letters of `fetch`."""
        found = dead_letters.read_dead_letters(
            self.deployment.connections, self.deployment.keys, FETCH, EntryFilter()
        )
        return [entry async for entry in found]

    async def replay(self) -> None:
        """Replay all dead letters of `fetch`."""
        await dead_letters.replay(
            self.deployment.connections,
            self.deployment.keys,
            FETCH,
            await self.dead_letters(),
            name="again",
        )

    def queued(self) -> int:
        """Return how many notifications wait."""
        keys = self.deployment.keys
        streams = [keys.notifications(partition) for partition in range(keys.partitions)]
        return sum(self.deployment.client.xlen(stream) for stream in streams)

    def states(self) -> dict[str, str]:
        """Return what the sessions are after the transitions, by the rule for consumers."""
        latest: dict[str, StatusTransition] = {}
        for one in self.transitions:
            before = latest.get(one.session_id)
            if before is None or (one.epoch, one.sequence) > (before.epoch, before.sequence):
                latest[one.session_id] = one
        return {session: one.current for session, one in latest.items()}


@pytest.fixture
def live_key(stand_in: StripeStandIn) -> str:
    """Return a key of live mode."""
    return stand_in.directory.add_key(livemode=True).secret


@pytest.fixture
def api_keys(stand_in: StripeStandIn, live_key: str) -> ApiKeys:
    """Return a key of each mode."""
    return ApiKeys([Secret(stand_in.directory.add_key().secret), Secret(live_key)])


@pytest.fixture
async def fetching(
    make_settings: Callable[..., Settings],
    connections: Connections,
    api: StripeApi,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Fetching]:
    """Yield a deployment without a worker."""
    monkeypatch.setattr(rounds, "GATHER_S", 0.01)
    monkeypatch.setattr(rounds, "ROUND_S", 0.05)
    monkeypatch.setattr(rounds, "PATIENCE_S", 0.1)
    monkeypatch.setattr(worker, "MAX_INTERVAL_S", INTERVAL_S)
    monkeypatch.setattr(stream_watcher, "BLOCK_S", 10 * PATIENCE_S)
    settings = make_settings(**{**SETTINGS, "retry_max_attempts": 3})
    client = redis.Redis.from_url(settings.redis_url.reveal())
    deployment = Deployment(settings, client, connections)
    inbox = Inbox(connections, deployment.keys, settings, judges_age=False)
    await create_groups(connections, deployment.keys, [FETCH, *settings.handlers])
    async with open_fetcher(api, inbox) as fetcher:
        yield Fetching(deployment, fetcher)
        await deployment.close()
    deployment.client.close()


def change(stand_in: StripeStandIn, name: str, *arguments: Any) -> StandInEvent:
    """Let something happen to a session; return its event."""
    getattr(stand_in.sessions, name)(*arguments)
    return stand_in.events.all[-1]


def create(stand_in: StripeStandIn, **given: Any) -> StandInEvent:
    """Create a session; return its event."""
    stand_in.sessions.create(**given)
    return stand_in.events.all[-1]


async def test_a_thin_event_becomes_a_transition(
    stand_in: StripeStandIn, fetching: Fetching
) -> None:
    """It is the snapshot's, and says how it came; log and metrics say what became of it."""
    fetched_s = metrics.FETCH_SECONDS.labels(Outcome.ADMITTED)._sum
    before_s = fetched_s.get()
    events = [create(stand_in, metadata={"order": "1"})]
    session_id = events[0].session_id
    events += [change(stand_in, step, session_id) for step in ("submit", "verify")]

    with structlog.testing.capture_logs() as logged:
        fetching.start()
        await fetching.note(*events, *events, endpoint="acme")
        await until(lambda: len(fetching.transitions) == 3)

    assert [one.event_id for one in fetching.transitions] == [event.id for event in events]
    last = fetching.transitions[-1]
    assert (last.origin, last.endpoint, last.account_name) == (Origin.THIN, "acme", "shop")
    assert (last.current, last.previous, last.metadata) == (
        "verified",
        "processing",
        {"order": "1"},
    )
    await until(lambda: fetching.queued() == 0)
    lines = [line for line in logged if line["event"] == "event.fetched"]
    assert [line["notification_id"] for line in lines] == [event.thin_id for event in events]
    assert [line["outcome"] for line in lines] == ["admitted"] * 3
    took_s = sum(line["duration_ms"] for line in lines) / 1000
    assert fetched_s.get() - before_s == pytest.approx(took_s, abs=0.01)
    assert 0 < took_s < 3 * PATIENCE_S


async def test_snapshot_and_thin_events_of_the_same_changes(
    stand_in: StripeStandIn, fetching: Fetching
) -> None:
    """Both forms, one of them, some twice, in any order: each change is one transition."""
    random = Random(14)
    stand_in.clock.advance(-3600)
    stand_in.subscribe(None)
    stand_in.list_lag_s = 1800
    for life in LIVES * 6:
        live(stand_in, life, random)
        stand_in.list_lag_s = random.choice([0, 5400])
    stand_in.clock.advance(3600 - 60)
    fetching.start()
    arrivals: list[tuple[Callable[[StandInEvent], Awaitable[None]], StandInEvent]] = []
    both = (fetching.note, fetching.admit)
    for event in stand_in.events.all:
        forms = random.choice([both[:1], both[1:], both])
        arrivals += [(form, event) for form in forms for _ in range(random.choice([1, 1, 2]))]
    random.shuffle(arrivals)
    for start in range(0, len(arrivals), 40):
        await asyncio.gather(*(form(event) for form, event in arrivals[start : start + 40]))

    await until(lambda: fetching.queued() == 0)
    await until(lambda: fetching.states() == final_states(stand_in))

    changes = defaultdict(list)
    for one in fetching.transitions:
        changes[one.session_id].append((one.sequence, one.event_id))
    for session_id, numbered in changes.items():
        assert [number for number, _ in numbered] == [*range(1, len(numbered) + 1)], session_id
        known = await session_record.read(
            fetching.deployment.connections, fetching.deployment.keys, session_id
        )
        assert known is not None
        happened = {event.id for event in stand_in.events.about(session_id)}
        assert {one.event_id for one in known.events} == happened
        assert len({event_id for _, event_id in numbered}) == len(numbered)
    assert {one.origin for one in fetching.transitions} == {Origin.THIN, Origin.WEBHOOK}
    assert await fetching.dead_letters() == []


async def test_a_session_that_is_gone(stand_in: StripeStandIn, fetching: Fetching) -> None:
    """It is retried, then a dead letter of `fetch`; others go on, and a replay fetches it."""
    gone, other = create(stand_in), create(stand_in)
    path = f".*/({gone.thin_id}|{gone.session_id})"
    stand_in.faults.add(fail(missing("event", "x"), path=path))

    fetching.start()
    await fetching.note(gone, other)
    await until(lambda: fetching.queued() == 0)

    [letter] = await fetching.dead_letters()
    assert (letter.reason, letter.error, letter.attempts) == ("exhausted", "api_not_found", 3)
    assert "single_events.py" in str(letter.place)
    assert [one.event_id for one in fetching.transitions] == [other.id]
    stand_in.faults.clear()
    await fetching.replay()
    await until(lambda: len(fetching.transitions) == 2)
    assert fetching.transitions[1].event_id == gone.id


@pytest.mark.parametrize("reason", [*ApiErrorReason, *UnavailableReason])
async def test_what_an_error_means(
    reason: ApiErrorReason | UnavailableReason, stand_in: StripeStandIn, fetching: Fetching
) -> None:
    """Two reasons concern one notification; all others its destination, which is waited for."""
    error = ApiError(reason) if isinstance(reason, ApiErrorReason) else Unavailable(reason)
    finding, concerns_one = mock.AsyncMock(side_effect=error), {"api_not_found", "api_unexpected"}

    with (
        mock.patch.object(fetching.fetcher._rounds, "find", finding),
        pytest.raises(ApiError if reason in concerns_one else Unreachable, match=reason) as caught,
    ):
        await fetching.fetcher(notification_of(create(stand_in)))

    assert str(caught.value) == reason


async def test_slow_answers_are_no_failed_attempts(
    stand_in: StripeStandIn, fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While more accounts than can be read at once hang, nothing counts against notifications."""
    admit_deadline_s = fetching.deployment.settings.admit_deadline_s
    assert fetch.DEADLINE_S + admit_deadline_s < worker.FETCH_TIMEOUT_S
    scopes = [stand_in.scope(stand_in.directory.connect().id) for _ in range(15)]
    events = [create(stand_in, scope=scope) for scope in scopes]
    stand_in.faults.add(Fault(kind="hang"))

    with structlog.testing.capture_logs() as logged:
        with monkeypatch.context() as patch:
            patch.setattr(fetch, "DEADLINE_S", 0.05)
            fetching.start()
            await fetching.note(*events)
            await until(lambda: metrics.CIRCUIT_OPEN.labels(FETCH)._value.get() == len(scopes))
        stand_in.faults.clear()
        await until(lambda: len(fetching.transitions) == len(events))
    assert not {"delivery.retried", "delivery.dead_lettered"} & {line["event"] for line in logged}


def refuse(stand_in: StripeStandIn, account: str, reason: str) -> Callable[[], None]:
    """Refuse what is asked for an account, for this reason; return what undoes it."""
    if reason == "api_unauthorized":
        [key] = [key for key in stand_in.directory._keys.values() if not key.livemode]
        key.is_revoked = True
        return lambda: setattr(key, "is_revoked", False)
    if reason == "api_forbidden":
        stand_in.directory.deauthorize(account)
        return lambda: setattr(stand_in.directory.accounts[account], "is_authorized", True)
    refusal = too_many_requests if reason == "api_rate_limited" else broken
    stand_in.faults.add(refusal(account=account))
    return stand_in.faults.clear


@pytest.mark.parametrize(
    "reason", ["api_unauthorized", "api_forbidden", "api_rate_limited", "api_unreachable"]
)
async def test_a_key_or_an_account_that_is_refused(
    reason: str, stand_in: StripeStandIn, fetching: Fetching
) -> None:
    """Its notifications wait and nothing is counted against them; all others are fetched."""
    account = stand_in.directory.connect().id
    refused = [create(stand_in, scope=stand_in.scope(account)) for _ in range(15)]
    others = [create(stand_in, scope=stand_in.scope(livemode=True)) for _ in range(15)]
    if reason != "api_unauthorized":
        others += [create(stand_in) for _ in range(15)]
    undo = refuse(stand_in, account, reason)

    with structlog.testing.capture_logs() as logged:
        fetching.start()
        await fetching.note(*refused, *others)
        await until(lambda: len(fetching.transitions) == len(others))
        await until(lambda: metrics.CIRCUIT_OPEN.labels(FETCH)._value.get() == 1)
    opened = [line for line in logged if line["event"] == "circuit.opened"]
    assert fetching.queued() == len(refused)
    assert [(line["destination"], line["reason"]) for line in opened] == [
        (f"test {account}", reason)
    ]
    undo()
    await until(lambda: len(fetching.transitions) == len(refused) + len(others))
    await until(lambda: fetching.queued() == 0)
    assert await fetching.dead_letters() == []
    assert metrics.CIRCUIT_OPEN.labels(FETCH)._value.get() == 0


async def test_stripe_keeps_events_for_30_days(stand_in: StripeStandIn, fetching: Fetching) -> None:
    """After that the session is read. Its age does not matter: it was judged on arrival."""
    stand_in.clock.advance(-36 * DAY_S)
    event = create(stand_in)
    stand_in.clock.advance(36 * DAY_S)
    fetching.start()

    await fetching.fetcher(notification_of(event))

    await until(lambda: len(fetching.transitions) == 1)
    [transition] = fetching.transitions
    assert transition.event_id == f"read:{event.thin_id}"
    assert int(transition.occurred_at.timestamp()) == int(event.created)
    known = await session_record.read(
        fetching.deployment.connections, fetching.deployment.keys, event.session_id
    )
    assert known is not None
    assert [one.event_id for one in known.events] == [transition.event_id]


async def test_an_account_that_is_gone_for_good(
    stand_in: StripeStandIn, fetching: Fetching
) -> None:
    """Its notifications wait for 31 days; a replay fetches them, if it comes back after all."""
    account = stand_in.directory.connect().id
    stand_in.clock.advance(-32 * DAY_S)
    old = create(stand_in, scope=stand_in.scope(account))
    stand_in.clock.advance(3 * DAY_S)
    waiting = create(stand_in, scope=stand_in.scope(account))
    stand_in.clock.advance(29 * DAY_S)
    stand_in.directory.deauthorize(account)

    fetching.start()
    await fetching.note(waiting, old)
    await until(lambda: fetching.queued() == 1)

    [letter] = await fetching.dead_letters()
    assert letter.item is not None
    assert (letter.item.event_id, letter.attempts) == (old.thin_id, 1)
    assert (letter.reason, letter.error) == ("deleted_by_stripe", "api_forbidden")
    stand_in.directory.accounts[account].is_authorized = True
    await fetching.replay()
    await until(lambda: len(fetching.transitions) == 2)


async def test_the_snapshot_event_comes_after_the_session_was_read(
    stand_in: StripeStandIn, fetching: Fetching
) -> None:
    """What was read stands for the change, and the session may have moved on since."""
    event = create(stand_in)
    stand_in.faults.add(fail(missing("event", "x"), path="/v2/core/events/.*"))
    await fetching.fetcher(notification_of(event))
    stand_in.faults.clear()
    await fetching.fetcher(notification_of(event))

    known = await session_record.read(
        fetching.deployment.connections, fetching.deployment.keys, event.session_id
    )
    assert known is not None
    assert sorted((one.event_id, one.outcome) for one in known.events) == [
        (event.id, "late"),
        (f"read:{event.thin_id}", "admitted"),
    ]
