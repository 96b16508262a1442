"""Faults of a Redis with replicas: another server becomes the primary.

Each function injects its fault and returns when it is over.
"""

from __future__ import annotations

import asyncio
import time
from random import Random

from tests.system.chaos.deployment import STEADY, Deployment
from tests.system.chaos.evidence import Bound, Window
from tests.system.chaos.hosts import RedisHost
from tests.system.chaos.stripe_client import Stripe

STALL_S, LESS_CURRENT_S, STALLED_DELAY_S = 1.5, 4.0, 60.0
WATCHED_S, RECOVERY_S = 6.0, 15.0


async def failed_over(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """The link to the replica stalls, the primary dies, and the replica is made primary."""
    [replica] = deployment.replicas
    stalled_at = time.time()
    assert replica.link
    replica.link.delay_s = STALLED_DELAY_S
    await asyncio.sleep(STALL_S)
    await _primary_lost(deployment, replica, stalled_at)


async def less_current_promoted(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """Of two replicas the one that was behind is promoted, as Sentinel does by its priority."""
    behind, current = deployment.replicas
    stalled_at = time.time()
    assert behind.link
    behind.link.delay_s = STALLED_DELAY_S
    await asyncio.sleep(LESS_CURRENT_S)
    await _primary_lost(deployment, behind, stalled_at)
    await current.follow(deployment.primary)


async def _primary_lost(deployment: Deployment, promoted: RedisHost, stalled_at: float) -> None:
    """The primary dies with its disk, *promoted* replaces it, and it returns as a replica."""
    old = deployment.primary
    assert promoted.link
    assert deployment.proxy
    died_at = time.time()
    old.kill()
    promoted.link.cut()
    promoted.promote()
    promoted.link.delay_s = 0.0
    _swap_roles(deployment, promoted)
    deployment.proxy.aim(promoted.url)
    deployment.proxy.cut()
    if deployment.durability != "replica":
        cause = "a fail-over without waiting for the replica"
        deployment.rollbacks.append(Window(stalled_at, died_at, cause))
    await deployment.redis_died(died_at)
    old.forget()
    await old.follow(promoted)


async def demoted(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """Behind the one address the replica is made primary; old connections stay with the old one.

    So do managed endpoints, Kubernetes Services and TCP balancers. The old primary is a replica
    from then on: it answers, and refuses every write.
    """
    [promoted] = deployment.replicas
    old = deployment.primary
    assert deployment.proxy
    at = time.time()
    promoted.promote()
    _swap_roles(deployment, promoted)
    deployment.proxy.aim(promoted.url)
    await deployment.redis_died(at)
    await old.follow(promoted)
    await asyncio.sleep(WATCHED_S)
    for handlers in ((), tuple(STEADY)):
        deployment.bounds.append(Bound(at, time.time(), RECOVERY_S, "a demoted primary", handlers))


def _swap_roles(deployment: Deployment, promoted: RedisHost) -> None:
    """Make *promoted* the primary; the old primary takes its place and its link."""
    old = deployment.primary
    old.link, promoted.link = promoted.link, None
    deployment.replicas[deployment.replicas.index(promoted)] = old
    deployment.primary = promoted
