"""What is known here of listed events: asked without a write, and right in every partition."""

from __future__ import annotations

import pytest

from service.config import Settings
from service.inbox.admission import Inbox
from service.storage.connections import Connections
from service.storage.keys import Keys
from service.stripe_api import unknown_events
from service.stripe_api.unknown_events import find_noted, find_unknown
from service.transitions import thin_notification
from service.transitions.transition import make_change
from tests.support.listing import listed
from tests.support.notifications import notification_of, pushed
from tests.support.stripe_api import Event, StripeStandIn


@pytest.fixture
def made(stand_in: StripeStandIn) -> list[Event]:
    """Return the events of forty sessions, three each."""
    for _ in range(40):
        stand_in.sessions.create_verified()
    return stand_in.events.all


async def _contents(connections: Connections) -> dict[bytes, bytes]:
    client = connections.client
    return {key: await client.dump(key) for key in await client.keys("*")}


async def test_the_unknown_ones_are_found_in_their_order(
    made: list[Event],
    connections: Connections,
    keys: Keys,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In however many calls, exactly the events without an entry are unknown; nothing changes."""
    monkeypatch.setattr(unknown_events, "MAX_EVENTS_PER_CALL", 2)
    inbox = Inbox(connections, keys, settings)
    for event in map(pushed, made[::2]):
        await inbox.admit(event, make_change(event))
    before = await _contents(connections)

    assert await find_unknown(connections, keys, listed(made)) == listed(made[1::2])
    assert await find_unknown(connections, keys, listed(made[::2])) == []
    assert await find_unknown(connections, keys, []) == []
    assert await _contents(connections) == before


async def _note(connections: Connections, keys: Keys, event: Event) -> None:
    stream = keys.notifications(keys.partition(event.session_id))
    packed = thin_notification.pack(notification_of(event))
    await connections.client.xadd(stream, {"notification": packed})
    await connections.client.xadd(stream, {"notification": "broken"})


async def test_events_that_wait_as_notifications(
    made: list[Event], connections: Connections, keys: Keys
) -> None:
    """A notification is that of the event with its session, type and second."""
    for event in made[:6]:
        await _note(connections, keys, event)
    events = listed(made)
    later = events[0]._replace(created=events[0].created + 1)

    found = await find_noted(connections, keys, [*events[3:9], later])

    assert found == {event.event_id for event in events[3:6]}


async def test_too_many_notifications_to_look_at(
    made: list[Event], connections: Connections, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where more notifications wait than are looked at, no event counts as missing."""
    monkeypatch.setattr(unknown_events, "MAX_NOTIFICATIONS", 1)
    first, *others = listed(made)
    await _note(connections, keys, made[1])
    full = keys.partition(first.session_id)
    other = next(event for event in others if keys.partition(event.session_id) != full)

    assert await find_noted(connections, keys, [first, other]) == {first.event_id}
