"""A session's timeline: what arrived, and what became of each transition at each handler."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest

from service.config import Settings
from service.delivery import dead_letters
from service.delivery.consumer import Attempts, Consumer, Delivery
from service.delivery.consumer_groups import create_groups
from service.delivery.dead_letters import EntryFilter
from service.delivery.leases import Lease, take_or_renew
from service.delivery.stream_watcher import StreamWatcher
from service.inbox import session_record
from service.inbox.admission import Inbox
from service.monitoring import session_timeline, unfetched
from service.monitoring.session_timeline import (
    HandlerOutcome,
    State,
    Timeline,
    read_timeline,
)
from service.monitoring.unfetched import find_unfetched
from service.parsers import FETCH
from service.storage.connections import Connections
from service.storage.keys import Keys
from service.stripe.events import Event
from service.transitions.transition import make_change
from tests.support.admissions import (
    CREATED,
    FAILED,
    PROCESSING,
    SESSION_ID,
    VERIFIED,
    make_event,
    make_notification,
)

HANDLER = "log"


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """An inbox, and a worker of the partition of one session."""

    connections: Connections
    keys: Keys
    inbox: Inbox
    consumer: Consumer
    handler: str = HANDLER

    @property
    def partition(self) -> int:
        """The session's partition."""
        return self.keys.partition(SESSION_ID)

    @property
    def neighbor(self) -> str:
        """Another session of the same partition."""
        names = (f"vs_{n}" for n in range(99))
        return next(name for name in names if self.keys.partition(name) == self.partition)

    @property
    def attempts_key(self) -> str:
        """The key of the handler's finished attempts."""
        return self.keys.finished_attempts(self.partition, HANDLER)

    async def admit(self, *events: Event, **changes: Any) -> None:
        """Admit events, the changes of which may differ from what they say."""
        for event in events:
            change = msgspec.structs.replace(make_change(event), **changes)
            await self.inbox.admit(event, change)

    async def read(self, *events: Event) -> list[Delivery]:
        """Admit events, and let the worker read them."""
        await self.admit(*events)
        return await self.consumer.read(10)

    async def fail(self, delivery: Delivery) -> None:
        """Let an attempt fail."""
        delivery.attempts = Attempts(delivery.attempts.failed + 1, 1)
        await self.consumer.record_attempts(
            delivery, delivery.attempts, error="ValueError", place="own.py:1 handle"
        )

    async def give_up(self, delivery: Delivery) -> None:
        """Let the last attempt fail."""
        attempts = delivery.attempts.failed + 1
        why = {"reason": "exhausted", "error": "ValueError", "place": "own.py:1 handle"}
        assert await self.consumer.dead_letter(delivery, attempts=attempts, **why)

    async def timeline(self, *handlers: str) -> Timeline:
        """Return the session's timeline."""
        found = await read_timeline(self.connections, self.keys, SESSION_ID, handlers)
        assert found
        return found

    async def outcomes(self) -> dict[str, HandlerOutcome]:
        """Return what became of each transition, by event id."""
        steps = (await self.timeline()).steps
        return {step.arrival.event_id: one for step in steps for one in step.outcomes}

    async def states(self) -> list[State]:
        """Return the states of the transitions, in their order."""
        return [outcome.state for outcome in (await self.outcomes()).values()]

    async def replay(self) -> None:
        """Replay all dead letters."""
        place = (self.connections, self.keys, self.handler)
        letters = dead_letters.read_dead_letters(*place, EntryFilter())
        await dead_letters.replay(*place, [letter async for letter in letters], name="r")

    async def unfetched(self) -> list[tuple[str, State, int]]:
        """Return the event id and state of what is not fetched, and how often that failed."""
        found = await find_unfetched(self.connections, self.keys, SESSION_ID)
        return [(one.notification.event_id, one.outcome.state, one.outcome.failed) for one in found]


@pytest.fixture
async def deployment(
    connections: Connections, keys: Keys, settings: Settings
) -> AsyncIterator[Deployment]:
    """Yield a deployment with one handler, and `fetch`."""
    await create_groups(connections, keys, [HANDLER, FETCH])
    async with consuming(connections, keys, HANDLER) as consumer:
        yield Deployment(
            connections=connections,
            keys=keys,
            inbox=Inbox(connections, keys, settings),
            consumer=consumer,
        )


@pytest.fixture
async def fetching(deployment: Deployment) -> AsyncIterator[Deployment]:
    """Yield the deployment with the worker of `fetch`."""
    async with consuming(deployment.connections, deployment.keys, FETCH) as consumer:
        yield replace(deployment, consumer=consumer, handler=FETCH)


@asynccontextmanager
async def consuming(connections: Connections, keys: Keys, handler: str) -> AsyncIterator[Consumer]:
    """Yield a handler's consumer of the session's partition."""
    watcher = StreamWatcher(connections)
    partition = keys.partition(SESSION_ID)
    lease = Lease(connections, keys, handler=handler, partition=partition, worker="w1")
    assert await take_or_renew(connections, [lease], 300) == [0]
    yield Consumer(lease, keys, watcher)
    await watcher.close()


async def test_an_unknown_session_has_no_timeline(deployment: Deployment) -> None:
    """It is None; a record that cannot be read is an error."""
    connections, keys = deployment.connections, deployment.keys
    assert await read_timeline(connections, keys, SESSION_ID) is None
    await connections.client.hset(keys.session(SESSION_ID), "state", "was better")
    with pytest.raises(ValueError, match="unreadable"):
        await read_timeline(connections, keys, SESSION_ID)


async def test_arrivals_are_in_their_order(deployment: Deployment) -> None:
    """Late and unchanged events stand where they arrived; only transitions have outcomes."""
    unchanged = make_event("verified", "verified", id="evt_again", at=41, report="vr_1")
    await deployment.admit(PROCESSING, CREATED, VERIFIED, unchanged)
    timeline = await deployment.timeline()

    assert timeline.record.status == "verified"
    arrivals = [step.arrival for step in timeline.steps]
    assert [(one.event_id, one.outcome, one.sequence) for one in arrivals] == [
        (PROCESSING.id, "admitted", 1),
        (CREATED.id, "late", 1),
        (VERIFIED.id, "admitted", 2),
        (unchanged.id, "unchanged", 2),
    ]
    assert [one.transition and one.transition.current for one in arrivals] == [
        *("processing", None, "verified", None),
    ]
    assert [one.created_at.timestamp() for one in arrivals] == [
        event.created for event in (PROCESSING, CREATED, VERIFIED, unchanged)
    ]
    for one in arrivals:
        assert one.arrived_at.timestamp() == pytest.approx(time.time(), abs=60)
    assert [[each.handler for each in step.outcomes] for step in timeline.steps] == [
        *([HANDLER], [], [HANDLER], []),
    ]


async def test_each_state_is_told_apart(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From waiting to delivered, with the attempts in between, read in several calls."""
    monkeypatch.setattr(session_timeline, "MAX_ATTEMPTS_PER_CALL", 2)
    await deployment.admit(PROCESSING)
    assert await deployment.states() == [State.WAITING]
    [delivery] = await deployment.consumer.read(1)
    assert await deployment.states() == [State.IN_PROGRESS]
    for failed in (1, 2):
        await deployment.fail(delivery)
        [outcome] = (await deployment.outcomes()).values()
        assert (outcome.state, outcome.failed) == (State.RETRYING, failed)
    await deployment.consumer.ack(delivery)

    [outcome] = (await deployment.outcomes()).values()
    assert (outcome.state, outcome.failed) == (State.DELIVERED, 2)
    assert [(one.outcome, one.attempt, one.error, one.place) for one in outcome.attempts] == [
        ("failed", 1, "ValueError", "own.py:1 handle"),
        ("failed", 2, "ValueError", "own.py:1 handle"),
        ("delivered", 3, "", ""),
    ]
    assert outcome.attempts[0].at.timestamp() == pytest.approx(time.time(), abs=60)
    await deployment.connections.client.delete(deployment.attempts_key)
    assert await deployment.states() == [State.SETTLED]


async def test_an_open_circuit_is_named(deployment: Deployment) -> None:
    """While a handler's destination is unreachable, what was not tried waits for it."""
    first, second = await deployment.read(PROCESSING, FAILED)
    await deployment.consumer.ack(first)
    await deployment.admit(VERIFIED)
    await deployment.connections.client.set(deployment.keys.circuit(HANDLER), 1)
    assert await deployment.states() == [State.DELIVERED, *[State.CIRCUIT_OPEN] * 2]
    await deployment.fail(second)
    assert (await deployment.states())[1] is State.RETRYING


async def test_a_handler_without_a_group_is_unknown(deployment: Deployment) -> None:
    """A configured handler is listed first; `fetch` has no transitions."""
    await deployment.admit(PROCESSING)
    [step] = (await deployment.timeline("new", FETCH)).steps

    assert [(one.handler, one.state) for one in step.outcomes] == [
        ("new", State.UNKNOWN),
        (HANDLER, State.WAITING),
    ]


@pytest.mark.parametrize("are_kept", [True, False], ids=["attempts kept", "attempts gone"])
async def test_a_dead_letter_is_found(deployment: Deployment, *, are_kept: bool) -> None:
    """It has the id that `dead show` takes, and is gone when it was dropped."""
    first, second = await deployment.read(PROCESSING, VERIFIED)
    # The metadata of another session may look like anything.
    await deployment.admit(
        make_event(session=deployment.neighbor, id="evt_other"),
        metadata={"session_id": SESSION_ID},
    )
    for delivery in (*await deployment.consumer.read(9), second):
        await deployment.give_up(delivery)
    await deployment.consumer.ack(first)
    if not are_kept:
        await deployment.connections.client.delete(deployment.attempts_key)

    outcome = (await deployment.outcomes())[VERIFIED.id]
    assert outcome.state is State.DEAD_LETTER
    assert outcome.dead_letter_id is not None
    connections, keys = deployment.connections, deployment.keys
    letter = await dead_letters.find_one(connections, keys, HANDLER, outcome.dead_letter_id)
    assert letter
    assert letter.item
    assert letter.item.event_id == VERIFIED.id
    assert (await deployment.outcomes())[PROCESSING.id].dead_letter_id is None
    await dead_letters.drop(connections, keys, HANDLER, [letter])
    dropped = (await deployment.outcomes())[VERIFIED.id]
    assert (dropped.state, dropped.dead_letter_id) == (State.SETTLED, None)


async def test_a_replay_is_followed(deployment: Deployment) -> None:
    """A replayed transition is as far as its replay, whose attempts say so."""
    [delivery] = await deployment.read(PROCESSING)
    await deployment.give_up(delivery)
    await deployment.replay()
    assert await deployment.states() == [State.WAITING]
    [delivery] = await deployment.consumer.read(1)
    assert await deployment.states() == [State.IN_PROGRESS]
    await deployment.fail(delivery)
    assert await deployment.states() == [State.RETRYING]
    await deployment.consumer.ack(delivery)

    [outcome] = (await deployment.outcomes()).values()
    assert (outcome.state, outcome.failed) == (State.DELIVERED, 1)
    assert [(one.outcome, one.is_replay) for one in outcome.attempts] == [
        ("dead_lettered", False),
        ("failed", True),
        ("delivered", True),
    ]


async def test_few_transitions_are_looked_up(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of older transitions only the arrival is shown, also where no transition is kept."""
    await deployment.admit(PROCESSING, FAILED, VERIFIED)
    monkeypatch.setattr(session_record, "MAX_LOOKUPS", 2)
    steps = (await deployment.timeline()).steps
    assert [len(step.outcomes) for step in steps] == [0, 1, 1]
    assert [step.arrival.transition is None for step in steps] == [True, False, False]
    # The stream may still hold it, so nothing may say that it does not.
    assert [step.arrival.is_looked_up for step in steps] == [False, True, True]
    client, key = deployment.connections.client, deployment.keys.session(SESSION_ID)
    await client.hdel(key, PROCESSING.id, FAILED.id, VERIFIED.id)
    assert (await deployment.timeline()).steps == ()


async def test_few_attempts_are_kept_of_many(deployment: Deployment) -> None:
    """What fails for days is one line with the latest attempts: a page must stay small."""
    [delivery] = await deployment.read(PROCESSING)
    for _ in range(session_timeline.MAX_ATTEMPTS + 3):
        await deployment.fail(delivery)

    [outcome] = (await deployment.outcomes()).values()
    assert (outcome.state, outcome.failed) == (State.RETRYING, 53)
    assert [one.attempt for one in outcome.attempts] == [*range(4, 54)]


async def test_a_transition_that_was_trimmed_keeps_its_outcome(deployment: Deployment) -> None:
    """Its event still has an arrival, and its attempts."""
    [delivery] = await deployment.read(PROCESSING)
    await deployment.consumer.ack(delivery)
    client = deployment.connections.client
    await client.xtrim(deployment.keys.transitions(deployment.partition), maxlen=0)

    [step] = (await deployment.timeline()).steps
    assert step.arrival.transition is None
    assert [one.state for one in step.outcomes] == [State.DELIVERED]


async def test_a_thin_event_that_is_not_fetched(
    fetching: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it waits, among those of other sessions, it is found until it is fetched."""
    monkeypatch.setattr(unfetched, "MAX_SEARCHED", 1)
    connections, keys = fetching.connections, fetching.keys
    others = [make_notification(id=f"evt_{n}", session=fetching.neighbor) for n in range(2)]
    for one in (others[0], make_notification(), others[1]):
        await fetching.inbox.note(one)
    assert await fetching.unfetched() == [("evt_thin", State.WAITING, 0)]
    await connections.client.set(keys.circuit(FETCH), 1)
    assert await fetching.unfetched() == [("evt_thin", State.CIRCUIT_OPEN, 0)]
    _, delivery, _ = await fetching.consumer.read(9)
    await fetching.fail(delivery)
    assert await fetching.unfetched() == [("evt_thin", State.RETRYING, 1)]

    await fetching.give_up(delivery)
    assert await fetching.unfetched() == [("evt_thin", State.DEAD_LETTER, 2)]
    [dead] = await find_unfetched(connections, keys, SESSION_ID)
    [attempt] = dead.outcome.attempts
    assert (attempt.outcome, attempt.error) == ("dead_lettered", "ValueError")
    assert dead.outcome.dead_letter_id
    letter = await dead_letters.find_one(connections, keys, FETCH, dead.outcome.dead_letter_id)
    assert letter
    assert letter.item == dead.notification

    await connections.client.delete(keys.circuit(FETCH))
    await fetching.replay()
    assert await fetching.unfetched() == [("evt_thin", State.WAITING, 0)]
    [replayed] = await fetching.consumer.read(9)
    await fetching.consumer.ack(replayed)
    assert await fetching.unfetched() == []


async def test_thin_events_are_in_the_order_of_their_creation(deployment: Deployment) -> None:
    """Those of one second are in the order of their arrival; without a worker none is fetched."""
    for partition in range(deployment.keys.partitions):
        stream = deployment.keys.notifications(partition)
        await deployment.connections.client.xgroup_destroy(stream, FETCH)
    for name, at in (("evt_b", 5), ("evt_a", 5), ("evt_first", 0)):
        await deployment.inbox.note(make_notification(id=name, at=at))

    assert await deployment.unfetched() == [
        (name, State.UNKNOWN, 0) for name in ("evt_first", "evt_b", "evt_a")
    ]
