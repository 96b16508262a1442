"""Events are pushed to those who subscribed: signed, again after failures, or as a test wants."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.stripe_api import (
    Destination,
    Receiver,
    StripeStandIn,
    client_of,
    divide,
    lose_share,
    running,
    served,
)
from tests.support.waiting import until


@pytest.fixture
async def receiver() -> Receiver:
    """Return a receiver."""
    return Receiver()


@pytest.fixture
async def url(receiver: Receiver) -> AsyncIterator[str]:
    """Serve the receiver."""
    async with running(receiver) as address:
        yield address


def is_signed(receiver: Receiver, destination: Destination) -> bool:
    """Return whether the latest push has the signature of a destination's secret."""
    push = receiver.received[-1]
    found = re.fullmatch(r"t=(\d+),v1=([0-9a-f]{64})", push.headers["stripe-signature"])
    assert found
    message = found[1].encode() + b"." + push.body
    expected = hmac.new(destination.secret.encode(), message, hashlib.sha256).hexdigest()
    return found[2] == expected


async def test_each_destination_gets_its_form(receiver: Receiver, url: str) -> None:
    """Signed with its own secret, in its own version."""
    stand_in = StripeStandIn()
    snapshot = stand_in.subscribe(f"{url}/a", api_version="2025-01-01.old")
    session_id = stand_in.sessions.create().id
    assert await stand_in.pushes.push_due() == 1
    assert is_signed(receiver, snapshot)
    event = receiver.received[-1].event
    assert (event["object"], event["api_version"]) == ("event", "2025-01-01.old")
    assert event["data"]["object"]["id"] == session_id

    thin = stand_in.subscribe(f"{url}/b", payload="thin")
    snapshot.is_enabled = False
    stand_in.sessions.submit(session_id)
    assert await stand_in.pushes.push_due() == 1
    assert is_signed(receiver, thin)
    notification = receiver.received[-1].event
    assert "snapshot_event" not in notification
    assert notification["related_object"]["id"] == session_id

    stand_in.pushes.names_twin = True
    stand_in.sessions.verify(session_id)
    stand_in.makes_twins = False
    stand_in.sessions.override(session_id, "requires_input")
    await stand_in.pushes.push_due()
    names = {one.event["type"].rpartition(".")[2]: one.event for one in receiver.received[-2:]}
    assert names["verified"]["snapshot_event"] == stand_in.events.all[-2].id
    assert "snapshot_event" not in names["requires_input"]


async def test_failures_are_tried_again(receiver: Receiver, url: str) -> None:
    """When the clock says so, until the last attempt; redirects are failures."""
    stand_in = StripeStandIn()
    stand_in.clock.stop()
    stand_in.subscribe(url)
    stand_in.pushes.retry_delays_s = (10, 20)
    receiver.statuses = [500, 302, 200, 503, 503, 503]
    for outcome in (True, False):
        stand_in.sessions.create()
        event = stand_in.events.all[-1]
        for wait, left in ((10, 1), (20, 1), (0, 0)):
            assert await stand_in.pushes.push_due() == 1
            assert event.pending_webhooks == left
            stand_in.clock.advance(wait - 1)
            assert await stand_in.pushes.push_due() == 0
            stand_in.clock.advance(1)
        assert event.is_delivered is outcome


async def test_a_disabled_endpoint_gets_no_retries(receiver: Receiver, url: str) -> None:
    """Nor new events."""
    stand_in = StripeStandIn()
    endpoint = stand_in.subscribe(url)
    receiver.statuses = [500]
    stand_in.sessions.create()
    await stand_in.pushes.push_due()
    endpoint.is_enabled = False
    stand_in.clock.advance(3600)
    stand_in.sessions.create()
    await stand_in.pushes.push_due()
    assert len(receiver.received) == 1
    assert [one.is_delivered for one in stand_in.events.all] == [False, True]


async def test_pushes_are_lost_doubled_and_late(receiver: Receiver, url: str) -> None:
    """To Stripe a lost push is a success."""
    stand_in = StripeStandIn()
    stand_in.subscribe(url)
    stand_in.pushes.loses = lose_share(0.3, seed=1)
    stand_in.pushes.duplicate_share = 0.5
    stand_in.pushes.max_delay_s = 60
    for _ in range(50):
        stand_in.sessions.create()
    stand_in.clock.advance(30)
    await stand_in.pushes.push_due()
    early = len(receiver.received)
    stand_in.clock.advance(30)
    await stand_in.pushes.push_due()
    got = [one.event["id"] for one in receiver.received]
    assert 0 < early < len(got)
    assert 25 < len(set(got)) < 45
    assert len(set(got)) < len(got)
    assert all(one.is_delivered for one in stand_in.events.all)


async def test_events_are_divided_among_forms(receiver: Receiver, url: str) -> None:
    """Each is pushed in one form or in none."""
    stand_in = StripeStandIn()
    stand_in.subscribe(url)
    stand_in.subscribe(url, payload="thin")
    stand_in.pushes.loses = divide(lost=0.2, thin=0.3)
    for _ in range(100):
        stand_in.sessions.create()
    await stand_in.pushes.push_due()
    got = [one.event for one in receiver.received]
    forms = [one["object"] for one in got]
    assert 70 < len(got) < 90
    assert 20 < forms.count("v2.core.event") < 40
    created = {one["related_object"]["id"] if "related_object" in one else one["id"] for one in got}
    assert len(created) == len(got)


@pytest.mark.parametrize(
    ("sources", "livemode", "heard"),
    [
        ({"own": True}, False, ["own"]),
        ({"own": False, "accounts": True}, False, ["connected"]),
        ({"own": True, "accounts": True}, False, ["own", "connected"]),
        ({"own": False, "accounts": True}, True, ["connected", "connected live"]),
    ],
)
async def test_endpoints_hear_of_the_accounts_that_they_ask_for(
    receiver: Receiver, url: str, sources: dict[str, Any], livemode: bool, heard: list[str]
) -> None:
    """A live endpoint for connected accounts gets their test events too."""
    stand_in = StripeStandIn()
    account = stand_in.directory.connect().id
    stand_in.subscribe(url, scope=stand_in.scope(livemode=livemode), **sources)
    scopes = {
        "own": stand_in.scope(),
        "connected": stand_in.scope(account),
        "connected live": stand_in.scope(account, livemode=True),
    }
    made = {stand_in.sessions.create(scope=scope).id: name for name, scope in scopes.items()}
    await stand_in.pushes.push_due()
    events = [one.event for one in receiver.received]
    got = {made[one["data"]["object"]["id"]]: one.get("account") for one in events}
    assert got == {name: None if name == "own" else account for name in heard}


async def test_a_ping_and_a_resend_are_pushed(receiver: Receiver, url: str) -> None:
    """While the stand-in is served, without waiting for a test."""
    stand_in = StripeStandIn()
    endpoint = stand_in.subscribe(url)
    thin = stand_in.subscribe(url, payload="thin")
    stand_in.sessions.create()
    event = stand_in.events.all[0]
    async with served(stand_in), client_of(stand_in, stand_in.directory.add_key().secret) as client:
        await until(lambda: len(receiver.received) == 2)
        answer = await client.post(f"/v2/core/event_destinations/{thin.id}/ping")
        await until(lambda: len(receiver.received) == 3)
        assert receiver.received[-1].event["id"] == answer.json()["id"]
        assert receiver.received[-1].event["type"] == "v2.core.event_destination.ping"
        resend = {"webhook_endpoint": endpoint.id}
        await client.post(f"/v1/events/{event.id}/retry", data=resend)
        await until(lambda: len(receiver.received) == 4)
        assert receiver.received[-1].event["id"] == event.id
