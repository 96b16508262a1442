"""Faults of the service's processes: they die, stand still, are rolled, or cannot write.

Each function makes its fault so and ends when it is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import httpx2

from tests.support import servers
from tests.system.chaos.evidence import Bound, Probe, StrangerAnswer
from tests.system.chaos.places import Place
from tests.system.chaos.scene import LEASE_TTL_S, SKEWED, STEADFAST, Scene
from tests.system.chaos.strangers import besieging
from tests.system.chaos.stripe_client import Stripe

PAST_THE_LEASE_S = 2.5 * LEASE_TTL_S
STOPPED_S, SKEW_S = 3.0, 5.0
OUTPUT_STALL_S, SIEGE_S = 12.0, 10.0
PROBE_INTERVAL_S, PROBE_TIMEOUT_S = 0.3, 4.0
# How long events may take while all output is stalled: as long as at other times.
PROMPT_S = 6.0


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


async def output_stalled(scene: Scene, stripe: Stripe, random: Random) -> None:
    """Nobody reads what the processes write, as when a node's log driver hangs."""
    began = time.time()
    async with _probing(scene), contextlib.AsyncExitStack() as stalled:
        for place in scene.places.values():
            stalled.enter_context(place.reader.stalled())
        await asyncio.sleep(OUTPUT_STALL_S)
    # What is first sent near the end would tell nothing: it has time until reading goes on.
    until = time.time() - PROMPT_S
    for handlers in ((), tuple(STEADFAST)):
        scene.bounds.append(Bound(began, until, PROMPT_S, "output stalled", handlers))


async def strangers(scene: Scene, stripe: Stripe, random: Random) -> None:
    """Strangers come to every receiver, with more connections than it has room for."""

    def heard(kind: str, status: int) -> None:
        scene.strangers.append(StrangerAnswer(kind, status))

    async with contextlib.AsyncExitStack() as sieges:
        for port in stripe.receivers.values():
            await sieges.enter_async_context(besieging(port, heard))
        await asyncio.sleep(SIEGE_S)


@asynccontextmanager
async def _probing(scene: Scene) -> AsyncIterator[None]:
    """Ask every process whether it is alive, again and again."""
    ports = {
        place.name: place.port or place.admin_port
        for place in scene.places.values()
        if place.process.popen.poll() is None
    }
    probing = [asyncio.create_task(_probe(scene, *one)) for one in ports.items()]
    try:
        yield
    finally:
        for task in probing:
            task.cancel()
        await asyncio.gather(*probing, return_exceptions=True)


async def _probe(scene: Scene, name: str, port: int) -> None:
    async with httpx2.AsyncClient(timeout=PROBE_TIMEOUT_S) as client:
        while True:
            at, status = time.time(), None
            with contextlib.suppress(httpx2.HTTPError):
                status = (await client.get(f"http://127.0.0.1:{port}/livez")).status_code
            scene.probes.append(Probe(name, at, time.time() - at, status))
            await asyncio.sleep(PROBE_INTERVAL_S)


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
