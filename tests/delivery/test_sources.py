"""The reserved handler `fetch` consumes notifications as every other handler does transitions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from service.delivery import maintenance
from service.errors import Unreachable
from service.parsers import FETCH
from service.secret import Secret
from service.telemetry import metrics
from service.transitions.thin_notification import Notification
from tests.support.transitions import stored_notification
from tests.support.waiting import until
from tests.support.workers import CallLog, Deployment


@pytest.fixture
def deployment(deployment: Deployment) -> Deployment:
    """Return the deployment with a key of Stripe's API, so that `fetch` is one of its handlers."""
    deployment.settings = replace(deployment.settings, stripe_api_key=(Secret("rk_live_1"),))
    return deployment


class Fetching:
    """A handler for `fetch` that records what it takes.

    Attributes:
        taken: Every notification whose call has returned, in order.
        running: How many calls are running.
    """

    def __init__(self, act: Callable[[Notification], Awaitable[object]] | None = None) -> None:
        self.taken: list[Notification] = []
        self.running = 0
        self._act = act

    async def __call__(self, notification: Notification, /) -> None:
        """Take a notification."""
        self.running += 1
        try:
            if self._act is not None:
                await self._act(notification)
            self.taken.append(notification)
        finally:
            self.running -= 1

    def destination(self, notification: Notification) -> str:
        """Return whose data it is about."""
        return f"{notification.livemode} {notification.context}"


def note(deployment: Deployment, session: str, *numbers: int, **changes: Any) -> None:
    """Append notifications about a session."""
    stream = deployment.keys.notifications(deployment.keys.partition(session))
    for n in numbers:
        deployment.client.xadd(stream, stored_notification(session, n, **changes))


def noted(deployment: Deployment) -> int:
    """Return how many notifications there are."""
    keys = deployment.keys
    return sum(deployment.client.xlen(keys.notifications(p)) for p in range(keys.partitions))


async def test_notifications_go_to_fetch_and_transitions_to_the_others(
    deployment: Deployment,
) -> None:
    """Each in its session's order; what was fetched is deleted, what was delivered is kept."""
    log, fetching = CallLog(), Fetching()
    deployment.admit(10, 3)
    for n in range(10):
        note(deployment, f"vs_s{n}", 1, 2)
    deployment.start({"log": log.handler(), FETCH: fetching})
    await until(lambda: len(fetching.taken) == 20)
    for n in range(10):
        note(deployment, f"vs_s{n}", 3)
    await deployment.deliver_all(lambda: log.returns)
    await until(lambda: noted(deployment) == 0)

    for n in range(10):
        of_session = [one.created for one in fetching.taken if one.session_id == f"vs_s{n}"]
        assert of_session == [1_790_000_001, 1_790_000_002, 1_790_000_003]
    assert len(log.calls) == 30
    keys, client = deployment.keys, deployment.client
    for p in range(keys.partitions):
        assert [one["name"] for one in client.xinfo_groups(keys.notifications(p))] == [b"fetch"]
        assert [one["name"] for one in client.xinfo_groups(keys.transitions(p))] == [b"log"]
    assert sum(client.xlen(keys.transitions(p)) for p in range(keys.partitions)) == 30


async def test_fetch_has_limits_of_its_own(deployment: Deployment) -> None:
    """Enough calls wait together to fill a page, and longer than another handler's may."""
    go = asyncio.Event()
    fetching = Fetching(lambda _: go.wait())
    sessions = [f"vs_s{n}" for n in range(1000)]
    same = [one for one in sessions if deployment.keys.partition(one) == 0][:70]
    for session in same:
        note(deployment, session, 1)
    small = {"handler_concurrency": 1, "handler_timeout_s": 0.1}
    deployment.start({FETCH: fetching}, **small)

    await until(lambda: fetching.running == 64)
    await asyncio.sleep(0.3)
    assert fetching.running == 64
    go.set()
    await until(lambda: noted(deployment) == 0)
    assert sorted(one.session_id for one in fetching.taken) == sorted(same)


async def test_a_refused_account_stops_only_its_own(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is about another account is fetched; when the account is back, so is the rest."""
    monkeypatch.setattr(maintenance, "MEASURE_EVERY_S", 0.0)
    is_refused = True

    async def act(notification: Notification) -> None:
        if is_refused and notification.context == "acct_gone":
            raise Unreachable("api_forbidden")

    fetching = Fetching(act)
    for n in range(20):
        note(deployment, f"vs_a{n}", 1, 2, context="acct_gone")
        note(deployment, f"vs_b{n}", 1, 2)
    deployment.start({FETCH: fetching}, retry_max_attempts=1)
    await until(lambda: len(fetching.taken) == 40)
    assert {one.context for one in fetching.taken} == {None}
    await until(lambda: bool(deployment.client.exists(deployment.keys.circuit(FETCH))))
    lag = metrics.LAG_ENTRIES.labels(FETCH)._value
    oldest_s = metrics.OLDEST_SECONDS.labels(FETCH)._value
    await until(lambda: lag.get() == 40)
    assert 0 < oldest_s.get() < 60

    is_refused = False
    await until(lambda: noted(deployment) == 0)
    await until(lambda: (lag.get(), oldest_s.get()) == (0, 0))
    assert len(fetching.taken) == 80
    assert not deployment.dead_letters(FETCH)
