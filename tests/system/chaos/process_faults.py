"""Faults of the service's processes: they die, stop, are restarted, or cannot write.

Each function injects its fault and returns when it is over.
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
from tests.support.waiting import PATIENCE_S
from tests.system.chaos.deployment import LEASE_TTL_S, SKEWED, STEADY, Deployment
from tests.system.chaos.evidence import Bound, HostileResponse, Probe
from tests.system.chaos.hostile_clients import attacking
from tests.system.chaos.instances import Instance
from tests.system.chaos.stripe_client import Stripe

PAST_THE_LEASE_S = 2.5 * LEASE_TTL_S
STOPPED_S, SKEW_S = 3.0, 5.0
OUTPUT_STALL_S, ATTACK_S = 12.0, 10.0
PROBE_INTERVAL_S, PROBE_TIMEOUT_S = 0.3, 4.0
# How long events may take while all output is stalled: as long as at other times.
PROMPT_S = 6.0


async def worker_killed(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """A worker dies at once."""
    random.choice(deployment.of("work")).kill()


async def worker_stopped(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """A worker stops for longer than its leases last, and continues."""
    await _frozen(random.choice(deployment.of("work")), PAST_THE_LEASE_S)


async def worker_restarted(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """A worker gets SIGTERM and is started again."""
    await _restarted(deployment, random.choice(deployment.of("work")))


async def receiver_killed(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """A receiver dies at once."""
    random.choice(deployment.of("serve")).kill()


async def receiver_stopped(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """A receiver stops for a while."""
    await _frozen(random.choice(deployment.of("serve")), STOPPED_S)


async def receivers_restarted(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """Every receiver gets SIGTERM and is started again, one after the other."""
    for instance in deployment.of("serve"):
        await _restarted(deployment, instance)


async def clock_skewed(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """A third receiver has a clock that is far ahead: it rejects events, and is not ready."""
    instance = Instance(
        f"skewed{len(deployment.skewed)}", "serve", port=servers.free_port(), program=SKEWED
    )
    await deployment.start(instance)
    stripe.receivers[instance.name] = instance.port
    await asyncio.sleep(SKEW_S)
    async with httpx2.AsyncClient(timeout=PATIENCE_S) as client:
        ready = await client.get(f"http://127.0.0.1:{instance.port}/readyz")
    if ready.status_code == 503:
        deployment.skewed.add(instance.name)
    del stripe.receivers[instance.name]
    await deployment.end(instance)


async def output_stalled(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """No process reads the logs, as when a node's log driver hangs."""
    began = time.time()
    async with _probing(deployment), contextlib.AsyncExitStack() as stalled:
        for instance in deployment.instances.values():
            stalled.enter_context(instance.reader.stalled())
        await asyncio.sleep(OUTPUT_STALL_S)
    # Events sent near the end may be answered after reading continues, so they prove nothing.
    until = time.time() - PROMPT_S
    for handlers in ((), tuple(STEADY)):
        deployment.bounds.append(Bound(began, until, PROMPT_S, "output stalled", handlers))


async def hostile_clients(deployment: Deployment, stripe: Stripe, random: Random) -> None:
    """Hostile clients open more connections to every receiver than it allows."""

    def note(kind: str, status: int) -> None:
        deployment.hostile_responses.append(HostileResponse(kind, status))

    async with contextlib.AsyncExitStack() as attacks:
        for port in stripe.receivers.values():
            await attacks.enter_async_context(attacking(port, note))
        await asyncio.sleep(ATTACK_S)


@asynccontextmanager
async def _probing(deployment: Deployment) -> AsyncIterator[None]:
    """Probe every process's `/livez` again and again."""
    ports = {
        instance.name: instance.port or instance.admin_port
        for instance in deployment.instances.values()
        if instance.process.popen.poll() is None
    }
    probing = [asyncio.create_task(_probe(deployment, *one)) for one in ports.items()]
    try:
        yield
    finally:
        for task in probing:
            task.cancel()
        await asyncio.gather(*probing, return_exceptions=True)


async def _probe(deployment: Deployment, name: str, port: int) -> None:
    async with httpx2.AsyncClient(timeout=PROBE_TIMEOUT_S) as client:
        while True:
            at, status = time.time(), None
            with contextlib.suppress(httpx2.HTTPError):
                status = (await client.get(f"http://127.0.0.1:{port}/livez")).status_code
            deployment.probes.append(Probe(name, at, time.time() - at, status))
            await asyncio.sleep(PROBE_INTERVAL_S)


async def _frozen(instance: Instance, seconds: float) -> None:
    process = instance.process.popen
    process.send_signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        process.send_signal(signal.SIGCONT)


async def _restarted(deployment: Deployment, instance: Instance) -> None:
    await deployment.end(instance)
    await deployment.start(instance)
