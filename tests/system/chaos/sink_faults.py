"""Faults of the wayward sink: what it stands for is down, slow, wrong or deadly.

Each function makes its fault so and ends when it is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import redis

from tests.support.waiting import until
from tests.system.chaos.evidence import Bound
from tests.system.chaos.scene import HANDLERS, LEASE_TTL_S, Scene
from tests.system.chaos.sinks import Mood
from tests.system.chaos.stripe_client import Stripe

POISON_DEADLINE_S = 60.0
# More sessions of one partition than a window of entries ever held, most of them failing.
CROWD_EVENTS, CROWD_RATE, CROWD_DEADLINE_S = 2000, 250.0, 60.0
CROWDED_S, PROMPT_S = 12.0, 8.0

Act = Callable[[Scene, Stripe, Random], Awaitable[None]]


def in_mood(mood: Mood, seconds: float) -> Act:
    """Return a fault: for so long the sink behaves so."""

    async def act(scene: Scene, stripe: Stripe, random: Random) -> None:
        scene.mood(mood)
        await asyncio.sleep(seconds)
        scene.mood(Mood.FINE)

    return act


async def sink_exits(scene: Scene, stripe: Stripe, random: Random) -> None:
    """The first two calls of the sink end its worker, and with it everything it had in hand."""
    await in_mood(Mood.EXITING, 4 * LEASE_TTL_S)(scene, stripe, random)


async def sink_poisoned(scene: Scene, stripe: Stripe, random: Random) -> None:
    """Every call for one transition ends the worker, until the transition is buried."""
    scene.mood(Mood.POISONED)
    with contextlib.suppress(TimeoutError):
        await until(lambda: asyncio.to_thread(_is_buried, scene), POISON_DEADLINE_S)
    scene.mood(Mood.FINE)


def _is_buried(scene: Scene) -> bool:
    streams = [
        scene.keys.dead_letters(partition, HANDLERS[1])
        for partition in range(scene.keys.partitions)
    ]
    with contextlib.suppress(redis.RedisError), scene.client() as client:
        read: Any = client.xrange
        letters = [fields for stream in streams for _, fields in read(stream)]
        return any(fields[b"reason"] == b"killed_worker" for fields in letters)
    return False


async def sessions_fail(scene: Scene, stripe: Stripe, random: Random) -> None:
    """Deliveries of hundreds of sessions fail for a while; those of the others go on."""
    scene.mood(Mood.FAILING_MOST)
    usual, began = stripe.rate, time.time()
    stripe.rate, before = CROWD_RATE, len(stripe.events)
    try:
        await until(lambda: len(stripe.events) - before > CROWD_EVENTS, CROWD_DEADLINE_S)
    finally:
        stripe.rate = usual
    await asyncio.sleep(CROWDED_S)
    ended = time.time() - PROMPT_S
    scene.bounds.append(Bound(began, ended, PROMPT_S, "others' failures", HANDLERS[1:]))
    scene.mood(Mood.FINE)
