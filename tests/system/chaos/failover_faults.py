"""Faults of a Redis with replicas: another server becomes the primary.

Each function makes its fault so and ends when it is over.
"""

from __future__ import annotations

import asyncio
import time
from random import Random

from tests.system.chaos.evidence import Bound, Window
from tests.system.chaos.hosts import RedisHost
from tests.system.chaos.scene import STEADFAST, Scene
from tests.system.chaos.stripe_client import Stripe

STALL_S, LESS_CURRENT_S, STALLED_DELAY_S = 1.5, 4.0, 60.0
WATCHED_S, RECOVERY_S = 6.0, 15.0


async def failed_over(scene: Scene, stripe: Stripe, random: Random) -> None:
    """The link to the replica stalls, the primary dies, and the replica is made primary."""
    [replica] = scene.replicas
    stalled_at = time.time()
    assert replica.link
    replica.link.delay_s = STALLED_DELAY_S
    await asyncio.sleep(STALL_S)
    await _primary_lost(scene, replica, stalled_at)


async def less_current_promoted(scene: Scene, stripe: Stripe, random: Random) -> None:
    """Of two replicas the one that was behind is promoted, as Sentinel does by its priority."""
    behind, current = scene.replicas
    stalled_at = time.time()
    assert behind.link
    behind.link.delay_s = STALLED_DELAY_S
    await asyncio.sleep(LESS_CURRENT_S)
    await _primary_lost(scene, behind, stalled_at)
    await current.follow(scene.primary)


async def _primary_lost(scene: Scene, heir: RedisHost, stalled_at: float) -> None:
    """The primary dies with its disk, *heir* takes its place, and it comes back as a replica."""
    old = scene.primary
    assert heir.link
    assert scene.wire
    died_at = time.time()
    old.kill()
    heir.link.cut()
    heir.promote()
    heir.link.delay_s = 0.0
    _exchange(scene, heir)
    scene.wire.aim(heir.url)
    scene.wire.cut()
    if scene.durability != "replica":
        cause = "a fail-over nobody waited for"
        scene.rollbacks.append(Window(stalled_at, died_at, cause))
    await scene.redis_died(died_at)
    old.forget()
    await old.follow(heir)


async def demoted(scene: Scene, stripe: Stripe, random: Random) -> None:
    """Behind the one address the replica is made primary; old connections stay with the old one.

    So do managed endpoints, Kubernetes Services and TCP balancers. The old primary is a replica
    from then on: it answers, and refuses every write.
    """
    [heir] = scene.replicas
    old = scene.primary
    assert scene.wire
    at = time.time()
    heir.promote()
    _exchange(scene, heir)
    scene.wire.aim(heir.url)
    await scene.redis_died(at)
    await old.follow(heir)
    await asyncio.sleep(WATCHED_S)
    for handlers in ((), tuple(STEADFAST)):
        scene.bounds.append(Bound(at, time.time(), RECOVERY_S, "a demoted primary", handlers))


def _exchange(scene: Scene, heir: RedisHost) -> None:
    """Let *heir* count from now on; the old primary takes its place and its link."""
    old = scene.primary
    old.link, heir.link = heir.link, None
    scene.replicas[scene.replicas.index(heir)] = old
    scene.primary = heir
