"""Faults of one Redis, of its disk, its clock and the connections to it.

Each function injects its fault and returns when it is over.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from random import Random

from service.storage.scripts import Script
from tests.support.proxy import Fault as ProxyFault
from tests.support.waiting import until
from tests.system.chaos.collecting import transition_of
from tests.system.chaos.deployment import HANDLERS, STEADY, Deployment
from tests.system.chaos.evidence import Bound, Window
from tests.system.chaos.sinks import Behavior
from tests.system.chaos.stripe_client import Stripe

FULL_S, STOPPED_S, SLOW_S = 3.0, 3.0, 3.0
LOST_REPLIES = 6
# With `appendfsync always` each admission waits that long; with `everysec` Redis postpones its
# writes, for up to two seconds more, while the disk is busy.
SLOW_SYNC_S, BUSY_DISK_S = 0.25, 1.5
POSTPONED_S = 2.0 + 2 * BUSY_DISK_S
# Less than the receivers tolerate between their clock and Redis's, and many times a lease.
STEP_S = 240.0
DAYS_AHEAD_S = 40 * 86_400.0
AHEAD_S, RECOVERY_S, WATCHED_S = 4.0, 15.0, 6.0
# Short: of a session that began within it Redis forgets everything, and its next epoch is new.
COPY_AGE_S = 0.8
FILL_DEADLINE_S, SETTLED_AFTER_S, FULL_PROMPT_S = 60.0, 10.0, 8.0
STREAM_CAP = 40


async def redis_killed(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """Redis dies at once and is started again on its append-only file."""
    at = time.time()
    deployment.primary.kill()
    await asyncio.sleep(random.uniform(0.2, 1.5))
    await asyncio.to_thread(deployment.primary.start)
    await deployment.redis_died(at)


async def redis_stopped(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """Redis stops for a while."""
    os.kill(deployment.primary.server.process.pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(random.uniform(1, STOPPED_S))
    finally:
        os.kill(deployment.primary.server.process.pid, signal.SIGCONT)


async def redis_filled(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """Redis is full: it takes no events, and workers go on."""
    with deployment.client() as client:
        client.config_set("maxmemory", "1mb")
        await asyncio.sleep(FULL_S)
        client.config_set("maxmemory", "0")


async def scripts_flushed(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """Redis forgets every script."""
    with deployment.client() as client:
        client.script_flush()


async def leases_deleted(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """An operator deletes the leases of half the partitions."""
    with deployment.client() as client:
        for partition in random.sample(
            range(deployment.keys.partitions), deployment.keys.partitions // 2
        ):
            client.delete(*(deployment.keys.lease(partition, name) for name in HANDLERS))


async def stream_deleted(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """An operator deletes a partition's stream, unread transitions included."""
    stream = deployment.keys.transitions(random.randrange(deployment.keys.partitions))
    with deployment.client() as client:
        pipeline = client.pipeline(transaction=True)
        pipeline.xrange(stream)
        pipeline.delete(stream)
        entries, _ = pipeline.execute()
    deployment.deleted += [transition_of(entry) for _, entry in entries]


async def slow_disk(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """Redis dies three times while its disk is slow, and may lose nothing."""
    assert deployment.disk
    for _ in range(3):
        deployment.disk.delay(SLOW_SYNC_S)
        await asyncio.sleep(random.uniform(2.0, 3.0))
        await _killed(deployment)


async def busy_disk(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """Redis dies while a busy disk makes `everysec` postpone its writes."""
    assert deployment.disk
    deployment.disk.delay(BUSY_DISK_S)
    await asyncio.sleep(random.uniform(5.0, 7.0))
    died_at = await _killed(deployment)
    window = Window(died_at - POSTPONED_S, died_at, "a busy disk with `everysec`")
    deployment.rollbacks.append(window)


async def _killed(deployment: Deployment) -> float:
    """Kill Redis and start it on a disk that is fast again; return when it died."""
    died_at = time.time()
    deployment.primary.kill()
    if deployment.disk:
        deployment.disk.delay(0)
    await asyncio.to_thread(deployment.primary.start)
    await deployment.redis_died(died_at)
    return died_at


async def clock_stepped(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """Redis's clock steps back by minutes as a worker dies, and forward as another does."""
    assert deployment.clock
    for step_s in (-STEP_S, 0.0):
        deployment.clock.step(step_s)
        random.choice(deployment.of("work")).kill()
        await _watched(deployment, "Redis's clock stepped")


async def clock_days_ahead(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """Redis's clock is 40 days ahead for a while; as it steps back, a worker dies."""
    assert deployment.clock
    deployment.clock.step(DAYS_AHEAD_S)
    await asyncio.sleep(AHEAD_S)
    deployment.clock.step(0)
    random.choice(deployment.of("work")).kill()
    await _watched(deployment, "Redis's clock was days ahead")


async def _watched(deployment: Deployment, cause: str) -> None:
    """Ask for prompt acknowledgements and deliveries from now on for a while."""
    began = time.time()
    await asyncio.sleep(WATCHED_S)
    for handlers in ((), tuple(STEADY)):
        deployment.bounds.append(Bound(began, time.time(), RECOVERY_S, cause, handlers))


async def restored(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """Redis dies and returns with an older copy of its data, like a replica that was behind."""
    copied_at = time.time()
    copy = deployment.directory / f"copy-{copied_at}"
    await asyncio.to_thread(deployment.primary.copy, copy)
    await asyncio.sleep(COPY_AGE_S)
    died_at = time.time()
    deployment.primary.kill()
    deployment.primary.restore(copy)
    await asyncio.to_thread(deployment.primary.start)
    deployment.rollbacks.append(Window(copied_at, died_at, "an older copy of the data"))
    await deployment.redis_died(died_at)


async def streams_filled(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """A handler's queue is unreachable until all streams are full, and then reachable again.

    After that the streams are full of acknowledged entries, which must not prevent admission.
    """
    deployment.behavior(Behavior.DOWN)
    await until(lambda: _are_full(deployment), FILL_DEADLINE_S)
    await asyncio.sleep(FULL_S)
    deployment.behavior(Behavior.FINE)
    await asyncio.sleep(SETTLED_AFTER_S)
    began = time.time()
    await asyncio.sleep(WATCHED_S)
    cause = "streams full of settled history"
    deployment.bounds.append(Bound(began, time.time(), FULL_PROMPT_S, cause))


def _are_full(deployment: Deployment) -> bool:
    with deployment.client() as client:
        streams = map(deployment.keys.transitions, range(deployment.keys.partitions))
        return all(int(client.xlen(stream)) >= STREAM_CAP for stream in streams)


SCRIPTS = (
    ("service.inbox", "admit.lua"),
    *(
        ("service.delivery", f"lua/{name}.lua")
        for name in ("read", "ack", "record_attempts", "claim_pending", "lease")
    ),
)


async def replies_lost(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """Requests or replies are lost, for each script in turn."""
    assert deployment.proxy
    for package, name in SCRIPTS:
        fault = random.choice([ProxyFault.LOSE_REPLY, ProxyFault.LOSE_REQUEST])
        at = Script(package, name).sha.encode()
        deployment.proxy.break_next(fault, at=at, times=LOST_REPLIES)
        await asyncio.sleep(0.5)
        deployment.proxy.mend()


async def connections_reset(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """Every connection to Redis is reset, several times."""
    assert deployment.proxy
    for _ in range(4):
        deployment.proxy.cut()
        await asyncio.sleep(random.uniform(0.1, 0.6))


async def redis_far_away(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """Each reply of Redis is delayed."""
    assert deployment.proxy
    deployment.proxy.delay_s = 0.05
    await asyncio.sleep(SLOW_S)
    deployment.proxy.delay_s = 0.0
