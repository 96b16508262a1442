"""Notifications: each is queued in the same call as events, and never too early forgotten.

That each is queued once, unless it is too old, is held by the state machine of admission.
"""

from __future__ import annotations

import asyncio

import structlog.testing

from service.config import DAY_S, Settings
from service.storage.connections import Connections
from tests.support.admissions import (
    CREATED,
    DEADLINE_S,
    SESSION_ID,
    InspectedInbox,
    OpenInbox,
    inspected,
    make_event,
    make_notification,
    outcomes,
)
from tests.support.tapped import Tapped
from tests.support.virtual_time import push

THIN = make_notification()


async def test_a_notification_is_remembered_longer_than_stripe_retries(
    inbox: InspectedInbox,
) -> None:
    """It is known for four days from its last copy on: Stripe retries for three."""
    key = inbox.keys.noted(inbox.keys.partition(SESSION_ID), THIN.event_id)
    for _ in range(2):
        await inbox.note(THIN)
        assert 4 * DAY_S - 60 < await inbox.client.ttl(key) <= 4 * DAY_S
        await inbox.client.expire(key, 5)


async def test_nothing_of_a_session_is_touched(inbox: InspectedInbox) -> None:
    """A notification makes no transition and no record, and its id is no event's."""
    assert outcomes(await inbox.note(THIN)) == ["queued"]

    assert (await inbox.record(), await inbox.entries()) == ({}, [])
    event = make_event("verified", "verified", id=THIN.event_id)
    assert outcomes(await inbox.admit(event)) == ["admitted"]


async def test_events_and_notifications_share_a_batch(
    connections: Connections, settings: Settings
) -> None:
    """All that arrives in one loop turn is decided by one call."""
    tap = Tapped(connections)
    inbox = inspected(tap, settings)
    others = [make_notification(id=f"evt_{n}", session=f"vs_{n}") for n in range(100)]
    noted, admitted = await asyncio.gather(
        inbox.note(THIN, *others), inbox.together(CREATED, CREATED)
    )

    assert outcomes(noted) == ["queued"] * 101
    assert sorted(outcomes(admitted)) == ["admitted", "duplicate"]
    assert len(tap.calls) == 1


async def test_a_full_stream_refuses_new_notifications(open_inbox: OpenInbox) -> None:
    """At the cap new ones get the reason and are not remembered; copies and events are decided."""
    inbox = open_inbox(stream_max_entries=2)
    of_session = [make_notification(id=f"evt_{n}") for n in range(3)]
    stream = inbox.keys.notifications(inbox.keys.partition(SESSION_ID))
    await inbox.client.xgroup_create(stream, "fetch", "0", mkstream=True)
    with structlog.testing.capture_logs() as lines:
        first = [outcomes(await inbox.note(each)) for each in of_session]

    assert first == [["queued"], ["queued"], ["backlog_full"]]
    assert [(line["event"], line["handler"], line["entries"]) for line in lines] == [
        ("backlog.filled", "fetch", 2)
    ]
    assert outcomes(await inbox.note(of_session[0])) == ["duplicate"]
    assert outcomes(await inbox.admit(CREATED)) == ["admitted"]
    [[entry_id, _], _] = await inbox.client.xrange(stream)
    await inbox.client.xdel(stream, entry_id)
    assert outcomes(await inbox.note(of_session[2])) == ["queued"]


async def test_a_broken_key_fails_its_own_notification_only(open_inbox: OpenInbox) -> None:
    """What an operator broke does not hold up the others of a batch."""
    inbox = open_inbox(admit_deadline_s=DEADLINE_S)
    key = inbox.keys.noted(inbox.keys.partition(SESSION_ID), THIN.event_id)
    await inbox.client.hset(key, "no", "text")

    broken, other = (
        asyncio.create_task(inbox.note(one)) for one in (THIN, make_notification(id="evt_other"))
    )
    assert outcomes(await other) == ["queued"]
    push(DEADLINE_S)
    assert outcomes(await broken) == ["redis_refused"]
    assert [one.event_id for one in await inbox.notifications()] == ["evt_other"]
