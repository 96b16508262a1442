"""Faults of the faulty sink: down, slow, failing, or ending its worker.

Each function injects its fault and returns when it is over.
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
from tests.system.chaos.deployment import HANDLERS, LEASE_TTL_S, Deployment
from tests.system.chaos.evidence import Bound
from tests.system.chaos.sinks import Behavior
from tests.system.chaos.stripe_client import Stripe

POISON_DEADLINE_S = 60.0
# More failing sessions in one partition than a consumer keeps entries of in memory.
CROWD_EVENTS, CROWD_RATE, CROWD_DEADLINE_S = 2000, 250.0, 60.0
CROWDED_S, PROMPT_S = 12.0, 8.0

Act = Callable[[Deployment, Stripe, Random], Awaitable[None]]


def behaving(behavior: Behavior, seconds: float) -> Act:
    """Return a fault: the sink behaves so for *seconds*."""

    async def act(deployment: Deployment, stripe: Stripe, random: Random) -> None:
        deployment.behavior(behavior)
        await asyncio.sleep(seconds)
        deployment.behavior(Behavior.FINE)

    return act


async def sink_exits(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """The first two calls of the sink end their worker."""
    await behaving(Behavior.EXITING, 4 * LEASE_TTL_S)(deployment, stripe, random)


async def sink_poisoned(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """Every call with one transition ends the worker, until it is a dead letter."""
    deployment.behavior(Behavior.POISONED)
    with contextlib.suppress(TimeoutError):
        await until(lambda: asyncio.to_thread(_is_dead_lettered, deployment), POISON_DEADLINE_S)
    deployment.behavior(Behavior.FINE)


def _is_dead_lettered(deployment: Deployment) -> bool:
    streams = [
        deployment.keys.dead_letters(partition, HANDLERS[1])
        for partition in range(deployment.keys.partitions)
    ]
    with contextlib.suppress(redis.RedisError), deployment.client() as client:
        read: Any = client.xrange
        dead_letters = [fields for stream in streams for _, fields in read(stream)]
        return any(fields[b"reason"] == b"killed_worker" for fields in dead_letters)
    return False


async def sessions_fail(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """Deliveries of hundreds of sessions fail for a while; those of the others succeed."""
    deployment.behavior(Behavior.FAILING_MOST)
    usual, began = stripe.rate, time.time()
    stripe.rate, before = CROWD_RATE, len(stripe.events)
    try:
        await until(lambda: len(stripe.events) - before > CROWD_EVENTS, CROWD_DEADLINE_S)
    finally:
        stripe.rate = usual
    await asyncio.sleep(CROWDED_S)
    ended = time.time() - PROMPT_S
    deployment.bounds.append(Bound(began, ended, PROMPT_S, "others' failures", HANDLERS[1:]))
    deployment.behavior(Behavior.FINE)
