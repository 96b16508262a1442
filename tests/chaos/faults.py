"""What can go wrong, each as a function that makes it so and ends when it is over.

Faults of one lane come one after the other, lanes run side by side. Every choice is the seed's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, NamedTuple

import httpx2
import redis
import servers
from collecting import transition_of
from evidence import Window
from proxy import Fault as WireFault
from scene import HANDLERS, KEYS, LEASE_TTL_S, SKEWED, Place, Scene, follow
from sinks import Mood
from stripe_client import Stripe

from service.connections import Script

PAST_THE_LEASE_S = 2.5 * LEASE_TTL_S
FULL_S, STOPPED_S, SLOW_S, SKEW_S, STALL_S = 3.0, 3.0, 3.0, 5.0, 1.5
POISON_DEADLINE_S = 60.0
LOST_REPLIES = 6

Act = Callable[[Scene, Stripe, Random], Awaitable[None]]


class Needs(NamedTuple):
    """What a deployment must have: a wire to Redis that can break, a replica, a DURABILITY."""

    wire: bool = False
    replica: bool = False
    durability: str = ""


WIRED = Needs(wire=True)
WAITED = Needs(wire=True, replica=True, durability="replica")
UNWAITED = Needs(wire=True, replica=True, durability="none")


class Fault(NamedTuple):
    """One kind of fault.

    Attributes:
        act: Makes it so.
        lane: What it happens to.
        needs: What the deployment must be for it.
    """

    act: Act
    lane: str
    needs: Needs = Needs()


async def worker_killed(scene: Scene, stripe: Stripe, random: Random) -> None:
    """A worker dies at once."""
    random.choice(scene.of("work")).kill()


async def worker_stopped(scene: Scene, stripe: Stripe, random: Random) -> None:
    """A worker stands still for longer than its leases, and goes on as if nothing had been."""
    await _frozen(random.choice(scene.of("work")), PAST_THE_LEASE_S)


async def worker_rolled(scene: Scene, stripe: Stripe, random: Random) -> None:
    """A worker is told to end and started anew."""
    await _rolled(scene, random.choice(scene.of("work")))


async def receiver_killed(scene: Scene, stripe: Stripe, random: Random) -> None:
    """A receiver dies at once."""
    random.choice(scene.of("serve")).kill()


async def receiver_stopped(scene: Scene, stripe: Stripe, random: Random) -> None:
    """A receiver stands still."""
    await _frozen(random.choice(scene.of("serve")), STOPPED_S)


async def receivers_rolled(scene: Scene, stripe: Stripe, random: Random) -> None:
    """Every receiver is told to end and started anew, one after the other."""
    for place in scene.of("serve"):
        await _rolled(scene, place)


async def clock_skewed(scene: Scene, stripe: Stripe, random: Random) -> None:
    """A third receiver joins whose clock is far ahead: it refuses, and is not ready."""
    place = Place(f"skewed{len(scene.skewed)}", "serve", port=servers.free_port(), program=SKEWED)
    await scene.start(place)
    stripe.receivers[place.name] = place.port
    await asyncio.sleep(SKEW_S)
    async with httpx2.AsyncClient() as client:
        ready = await client.get(f"http://127.0.0.1:{place.port}/readyz")
    if ready.status_code == 503:
        scene.skewed.add(place.name)
    del stripe.receivers[place.name]
    await scene.end(place)


async def redis_killed(scene: Scene, stripe: Stripe, random: Random) -> None:
    """Redis dies at once and is started again on its append-only file."""
    at = time.time()
    scene.primary.kill()
    await asyncio.sleep(random.uniform(0.2, 1.5))
    await asyncio.to_thread(scene.primary.start)
    await scene.redis_died(at)


async def redis_stopped(scene: Scene, stripe: Stripe, random: Random) -> None:
    """Redis stands still."""
    os.kill(scene.primary.server.process.pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(random.uniform(1, STOPPED_S))
    finally:
        os.kill(scene.primary.server.process.pid, signal.SIGCONT)


async def redis_filled(scene: Scene, stripe: Stripe, random: Random) -> None:
    """Redis is full: nothing more is admitted, and what is there is worked off."""
    with scene.client() as client:
        client.config_set("maxmemory", "1mb")
        await asyncio.sleep(FULL_S)
        client.config_set("maxmemory", "0")


async def scripts_flushed(scene: Scene, stripe: Stripe, random: Random) -> None:
    """Redis forgets every script."""
    with scene.client() as client:
        client.script_flush()


async def leases_deleted(scene: Scene, stripe: Stripe, random: Random) -> None:
    """An operator deletes the leases of half the partitions."""
    with scene.client() as client:
        for partition in random.sample(range(KEYS.partitions), KEYS.partitions // 2):
            client.delete(*(KEYS.lease(partition, name) for name in HANDLERS))


async def stream_deleted(scene: Scene, stripe: Stripe, random: Random) -> None:
    """An operator deletes a partition's stream, with all that nobody has read."""
    stream = KEYS.transitions(random.randrange(KEYS.partitions))
    with scene.client() as client:
        pipeline = client.pipeline(transaction=True)
        pipeline.xrange(stream)
        pipeline.delete(stream)
        entries, _ = pipeline.execute()
    scene.deleted += [transition_of(entry) for _, entry in entries]


async def failed_over(scene: Scene, stripe: Stripe, random: Random) -> None:
    """The link to the replica stalls, the primary dies, and the replica is made primary."""
    old, new = scene.primary, scene.replica
    assert new
    assert scene.link
    assert scene.wire
    stalled_at = time.time()
    scene.link.delay_s = 60.0
    await asyncio.sleep(STALL_S)
    died_at = time.time()
    old.kill()
    scene.link.cut()
    with new.server.client() as client:
        client.replicaof("NO", "ONE")
    scene.primary, scene.replica = new, old
    scene.wire.aim(new.server.url)
    scene.wire.cut()
    if scene.durability != "replica":
        scene.rollbacks.append(Window(stalled_at, died_at, "a fail-over nobody waited for"))
    await scene.redis_died(died_at)
    old.forget()
    scene.link.delay_s = 0.0
    scene.link.aim(new.server.url)
    await follow(scene, old)


async def replies_lost(scene: Scene, stripe: Stripe, random: Random) -> None:
    """Redis does what it is asked, and its reply is lost: for each script in turn."""
    assert scene.wire
    for name in ("admit", "read", "settle", "count", "take_over", "lease"):
        fault = random.choice([WireFault.LOSE_REPLY, WireFault.LOSE_REQUEST])
        at = Script(name).sha.encode()
        scene.wire.break_next(fault, at=at, times=LOST_REPLIES)
        await asyncio.sleep(0.5)
        scene.wire.mend()


async def connections_reset(scene: Scene, stripe: Stripe, random: Random) -> None:
    """Every connection to Redis is reset, some times."""
    assert scene.wire
    for _ in range(4):
        scene.wire.cut()
        await asyncio.sleep(random.uniform(0.1, 0.6))


async def redis_far_away(scene: Scene, stripe: Stripe, random: Random) -> None:
    """Each of Redis's replies takes a while."""
    assert scene.wire
    scene.wire.delay_s = 0.05
    await asyncio.sleep(SLOW_S)
    scene.wire.delay_s = 0.0


def _sink(mood: Mood, seconds: float) -> Act:
    async def act(scene: Scene, stripe: Stripe, random: Random) -> None:
        scene.mood(mood)
        await asyncio.sleep(seconds)
        scene.mood(Mood.FINE)

    return act


async def sink_exits(scene: Scene, stripe: Stripe, random: Random) -> None:
    """The first two calls of the sink end its worker, and with it everything it had in hand."""
    await _sink(Mood.EXITING, 4 * LEASE_TTL_S)(scene, stripe, random)


async def sink_poisoned(scene: Scene, stripe: Stripe, random: Random) -> None:
    """Every call for one transition ends the worker, until the transition is buried."""
    scene.mood(Mood.POISONED)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(POISON_DEADLINE_S):
            while not await asyncio.to_thread(_is_buried, scene):  # noqa: ASYNC110 - Redis tells nobody
                await asyncio.sleep(0.3)
    scene.mood(Mood.FINE)


def _is_buried(scene: Scene) -> bool:
    streams = [KEYS.dead(partition, HANDLERS[1]) for partition in range(KEYS.partitions)]
    with contextlib.suppress(redis.RedisError), scene.client() as client:
        read: Any = client.xrange
        letters = [fields for stream in streams for _, fields in read(stream)]
        return any(fields[b"reason"] == b"killed_worker" for fields in letters)
    return False


async def _frozen(place: Place, seconds: float) -> None:
    process = place.process.popen
    process.send_signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        process.send_signal(signal.SIGCONT)


async def _rolled(scene: Scene, place: Place) -> None:
    await scene.end(place)
    await scene.start(place)


FAULTS = {
    "worker-killed": Fault(worker_killed, "workers"),
    "worker-stopped": Fault(worker_stopped, "workers"),
    "worker-rolled": Fault(worker_rolled, "workers"),
    "receiver-killed": Fault(receiver_killed, "receivers"),
    "receiver-stopped": Fault(receiver_stopped, "receivers"),
    "receivers-rolled": Fault(receivers_rolled, "receivers"),
    "clock-skewed": Fault(clock_skewed, "receivers"),
    "redis-killed": Fault(redis_killed, "redis"),
    "redis-stopped": Fault(redis_stopped, "redis"),
    "redis-filled": Fault(redis_filled, "redis"),
    "scripts-flushed": Fault(scripts_flushed, "redis"),
    "leases-deleted": Fault(leases_deleted, "redis"),
    "stream-deleted": Fault(stream_deleted, "redis"),
    "failed-over": Fault(failed_over, "redis", WAITED),
    "failed-over-unwaited": Fault(failed_over, "redis", UNWAITED),
    "replies-lost": Fault(replies_lost, "redis", WIRED),
    "connections-reset": Fault(connections_reset, "redis", WIRED),
    "redis-far-away": Fault(redis_far_away, "redis", WIRED),
    "sink-down": Fault(_sink(Mood.DOWN, 6), "sink"),
    "sink-raises": Fault(_sink(Mood.RAISING, 3), "sink"),
    "sink-refuses": Fault(_sink(Mood.REFUSING, 3), "sink"),
    "sink-hangs": Fault(_sink(Mood.HANGING, 3), "sink"),
    "sink-lags": Fault(_sink(Mood.LAGGING, 5), "sink"),
    "sink-exits": Fault(sink_exits, "sink"),
    "sink-poisoned": Fault(sink_poisoned, "sink"),
}
