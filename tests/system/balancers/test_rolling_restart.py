"""A rolling restart under load: every process is replaced, and no client notices."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx2
import pytest

from tests.support.depth import takes_long
from tests.support.harness import NOW, WEBHOOK, event, signed
from tests.support.processes import Process, Sandbox, open_sandbox
from tests.support.waiting import DEADLINE_S, until
from tests.system.balancers.balancer import receivers, trusting
from tests.system.balancers.haproxy import HAProxy

EVENTS_PER_S = 50
CHAINS = 25
# The life of a session: each step changes its status.
STEPS = ("requires_input", "processing", "requires_input", "processing", "verified")
SETTLED_DEADLINE_S = 30
DRAIN_S = 3


class Load:
    """Sessions that change at a steady pace, one step after the other, until `end`.

    Attributes:
        statuses: The number of responses of each status.
        outcomes: The number of responses of each outcome.
        sent: The number of events of each session that were answered with 200.
    """

    def __init__(self, url: str) -> None:
        self._url = url + WEBHOOK
        self._ending = False
        self.statuses: Counter[int] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    async def run(self) -> None:
        """Send until `end` is called and all sessions are complete."""
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=CHAINS)
        async with httpx2.AsyncClient(
            verify=trusting(), timeout=DEADLINE_S, limits=limits
        ) as client:
            await asyncio.gather(*(self._chain(client, number) for number in range(CHAINS)))

    def end(self) -> None:
        """Complete the current sessions, and begin no others."""
        self._ending = True

    async def _chain(self, client: httpx2.AsyncClient, chain: int) -> None:
        pace_s = CHAINS / EVENTS_PER_S
        await asyncio.sleep(pace_s * chain / CHAINS)
        life = 0
        while not self._ending:
            life += 1
            for step, status in enumerate(STEPS):
                await self._post(client, f"vs_{chain}_{life}", step, status)
                await asyncio.sleep(pace_s)

    async def _post(self, client: httpx2.AsyncClient, session: str, step: int, status: str) -> None:
        body = event(
            status if step else "created",
            id=f"evt_{session}_{step}",
            session=session,
            status=status,
            # Further apart than the clocks of Stripe's machines may be.
            created=NOW - 600 + 60 * step,
        )
        answer = await client.post(self._url, content=body, headers=signed(body))
        self.statuses[answer.status_code] += 1
        if answer.status_code == 200:
            self.outcomes[answer.json()["outcome"]] += 1
            self.sent[session] += 1


def delivered(workers: list[Process]) -> dict[str, set[int]]:
    """Return the sequence numbers that workers have delivered, by session."""
    sequences: dict[str, set[int]] = defaultdict(set)
    for worker in workers:
        for line in worker.lines("transition"):
            sequences[line["session_id"]].add(line["sequence"])
    return sequences


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Sandbox]:
    """Yield a sandbox."""
    with open_sandbox(tmp_path) as opened:
        yield opened


async def replaced(ground: Sandbox, old: Process, command: str, **settings: str) -> Process:
    """Stop a process and start another in its place."""
    assert await asyncio.to_thread(old.stop) == 0
    return await asyncio.to_thread(ground.start(command, **settings).ready)


@takes_long
@pytest.mark.timeout(180)
async def test_a_rolling_restart_loses_nothing(ground: Sandbox) -> None:
    """At 50 events/s both receivers and both workers are replaced: only 200s, and no gap."""
    fronts = receivers(ground, DRAIN_S=str(DRAIN_S))
    workers = [ground.start("work", LEASE_TTL_S="2") for _ in range(2)]
    for worker in workers:
        worker.ready()
    ports = [process.port for process in fronts]
    with HAProxy().running(ground.directory, [f"127.0.0.1:{port}" for port in ports]) as url:
        load = Load(url)
        running = asyncio.create_task(load.run())
        await until(lambda: load.statuses.total() > 2 * EVENTS_PER_S)
        all_workers = [*workers]
        for front, port in zip(fronts, ports, strict=True):
            again = await replaced(
                ground,
                front,
                "serve",
                PORT=str(port),
                DRAIN_S=str(DRAIN_S),
                ALLOWED_NETWORKS="127.0.0.1",
            )
            await until(partial(again.lines, "event.admitted"))
        all_workers += [
            await replaced(ground, worker, "work", LEASE_TTL_S="2") for worker in workers
        ]
        load.end()
        await running
    expected = {session: set(range(1, count + 1)) for session, count in load.sent.items()}
    await until(lambda: delivered(all_workers) == expected, SETTLED_DEADLINE_S)
    assert set(load.statuses) == {200}
    # The balancer may retry a request whose first attempt was admitted.
    assert set(load.outcomes) <= {"admitted", "duplicate"}
    assert all(count == len(STEPS) for count in load.sent.values())
