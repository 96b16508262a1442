"""Sessions of a stand-in for Stripe, which also answers requests about them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from random import Random

import orjson

from tests.support.stripe_api import LIVES, MAX_LIFE_S, Event, StripeStandIn, live, max_duration_s
from tests.system.chaos.workload import PUBLISHED, Payload, event_of


def api_sessions(stand_in: StripeStandIn, random: Random) -> Iterator[list[Payload]]:
    """Yield the events of one session after the other, without end, each in order.

    The life of a session is over when its events are sent. It began no longer ago than lists lag
    behind, so they show its events when they would have if it had been lived in that time.
    """
    assert stand_in.list_lag_s >= MAX_LIFE_S
    while True:
        before, life = len(stand_in.events.all), random.choice(LIVES)
        stand_in.clock.advance(-max_duration_s(life))
        live(stand_in, life, random, metadata={"user": PUBLISHED})
        stand_in.clock.advance(time.time() - stand_in.clock.time())
        yield [_payload(event) for event in stand_in.events.all[before:]]


def _payload(event: Event) -> Payload:
    snapshot = event.as_snapshot()
    return Payload(
        event_of(snapshot),
        orjson.dumps(snapshot),
        thin_id=event.thin_id,
        thin_body=orjson.dumps(event.as_notification()),
    )
