"""Faults of the one Redis, of its disk and its clock, and of the wire to it.

Each function makes its fault so and ends when it is over.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from random import Random

from service.storage.scripts import Script
from tests.support.proxy import Fault as WireFault
from tests.support.waiting import until
from tests.system.chaos.collecting import transition_of
from tests.system.chaos.evidence import Bound, Window
from tests.system.chaos.scene import HANDLERS, STEADFAST, Scene
from tests.system.chaos.sinks import Mood
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
        for partition in random.sample(range(scene.keys.partitions), scene.keys.partitions // 2):
            client.delete(*(scene.keys.lease(partition, name) for name in HANDLERS))


async def stream_deleted(scene: Scene, stripe: Stripe, random: Random) -> None:
    """An operator deletes a partition's stream, with all that nobody has read."""
    stream = scene.keys.transitions(random.randrange(scene.keys.partitions))
    with scene.client() as client:
        pipeline = client.pipeline(transaction=True)
        pipeline.xrange(stream)
        pipeline.delete(stream)
        entries, _ = pipeline.execute()
    scene.deleted += [transition_of(entry) for _, entry in entries]


async def slow_disk(scene: Scene, stripe: Stripe, random: Random) -> None:
    """Redis dies three times while its disk is slow, and may lose nothing."""
    assert scene.disk
    for _ in range(3):
        scene.disk.delay(SLOW_SYNC_S)
        await asyncio.sleep(random.uniform(2.0, 3.0))
        await _killed(scene)


async def busy_disk(scene: Scene, stripe: Stripe, random: Random) -> None:
    """Redis dies while a busy disk makes `everysec` postpone its writes."""
    assert scene.disk
    scene.disk.delay(BUSY_DISK_S)
    await asyncio.sleep(random.uniform(5.0, 7.0))
    died_at = await _killed(scene)
    window = Window(died_at - POSTPONED_S, died_at, "a busy disk with `everysec`")
    scene.rollbacks.append(window)


async def _killed(scene: Scene) -> float:
    """Kill Redis and start it on a disk that is fast again; return when it died."""
    died_at = time.time()
    scene.primary.kill()
    if scene.disk:
        scene.disk.delay(0)
    await asyncio.to_thread(scene.primary.start)
    await scene.redis_died(died_at)
    return died_at


async def clock_stepped(scene: Scene, stripe: Stripe, random: Random) -> None:
    """Redis's clock steps back by minutes as a worker dies, and forward as another does."""
    assert scene.clock
    for step_s in (-STEP_S, 0.0):
        scene.clock.step(step_s)
        random.choice(scene.of("work")).kill()
        await _watched(scene, "Redis's clock stepped")


async def clock_days_ahead(scene: Scene, stripe: Stripe, random: Random) -> None:
    """Redis's clock is 40 days ahead for a while; as it steps back, a worker dies."""
    assert scene.clock
    scene.clock.step(DAYS_AHEAD_S)
    await asyncio.sleep(AHEAD_S)
    scene.clock.step(0)
    random.choice(scene.of("work")).kill()
    await _watched(scene, "Redis's clock was days ahead")


async def _watched(scene: Scene, cause: str) -> None:
    """Ask for prompt acknowledgements and deliveries from now on for a while."""
    began = time.time()
    await asyncio.sleep(WATCHED_S)
    for handlers in ((), tuple(STEADFAST)):
        scene.bounds.append(Bound(began, time.time(), RECOVERY_S, cause, handlers))


async def restored(scene: Scene, stripe: Stripe, random: Random) -> None:
    """Redis dies and comes back with an older copy of its data, as a replica that was behind."""
    copied_at = time.time()
    copy = scene.directory / f"copy-{copied_at}"
    await asyncio.to_thread(scene.primary.copy, copy)
    await asyncio.sleep(COPY_AGE_S)
    died_at = time.time()
    scene.primary.kill()
    scene.primary.restore(copy)
    await asyncio.to_thread(scene.primary.start)
    scene.rollbacks.append(Window(copied_at, died_at, "an older copy of the data"))
    await scene.redis_died(died_at)


async def streams_filled(scene: Scene, stripe: Stripe, random: Random) -> None:
    """A handler's queue is away until all streams are full, and comes back.

    Then the streams are full of what is settled, and that must refuse nothing.
    """
    scene.mood(Mood.DOWN)
    await until(lambda: _are_full(scene), FILL_DEADLINE_S)
    await asyncio.sleep(FULL_S)
    scene.mood(Mood.FINE)
    await asyncio.sleep(SETTLED_AFTER_S)
    began = time.time()
    await asyncio.sleep(WATCHED_S)
    cause = "streams full of settled history"
    scene.bounds.append(Bound(began, time.time(), FULL_PROMPT_S, cause))


def _are_full(scene: Scene) -> bool:
    with scene.client() as client:
        streams = map(scene.keys.transitions, range(scene.keys.partitions))
        return all(int(client.xlen(stream)) >= STREAM_CAP for stream in streams)


SCRIPTS = (
    ("service.inbox", "admit.lua"),
    *(
        ("service.delivery", f"lua/{name}.lua")
        for name in ("read", "ack", "record_attempts", "claim_pending", "lease")
    ),
)


async def replies_lost(scene: Scene, stripe: Stripe, random: Random) -> None:
    """Redis does what it is asked, and its reply is lost: for each script in turn."""
    assert scene.wire
    for package, name in SCRIPTS:
        fault = random.choice([WireFault.LOSE_REPLY, WireFault.LOSE_REQUEST])
        at = Script(package, name).sha.encode()
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
