"""A rolling restart under load: every process is replaced, and no client notices."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest

from tests.support.depth import takes_long
from tests.support.harness import WEBHOOK
from tests.support.load import BEFORE, Load, assert_in_order, handed_over
from tests.support.processes import Process, Sandbox, open_sandbox
from tests.support.waiting import until
from tests.system.balancers.balancer import HAPROXY, receivers, trusting

DRAIN_S = "3"


async def replaced(sandbox: Sandbox, old: Process, command: str, **settings: str) -> Process:
    """Stop a process and start another in its place."""
    assert await asyncio.to_thread(old.stop) == 0
    return await asyncio.to_thread(sandbox.start(command, **settings).ready)


@takes_long
@pytest.mark.timeout(180)
async def test_a_rolling_restart_loses_nothing(tmp_path: Path) -> None:
    """Under load both receivers and both workers are replaced: only 200s, and no gap."""
    with open_sandbox(tmp_path) as sandbox:
        fronts = receivers(sandbox, DRAIN_S=DRAIN_S)
        workers = [sandbox.start("work", LEASE_TTL_S="2").ready() for _ in range(2)]
        addresses = [f"127.0.0.1:{front.port}" for front in fronts]
        with HAPROXY.running(sandbox.directory, addresses) as url:
            load = Load([url + WEBHOOK], verify=trusting())
            running = asyncio.create_task(load.run())
            await load.answered(BEFORE)
            for front in fronts:
                settings = {"PORT": str(front.port), "ALLOWED_NETWORKS": "127.0.0.1"}
                again = await replaced(sandbox, front, "serve", DRAIN_S=DRAIN_S, **settings)
                await until(partial(again.lines, "event.admitted"))
            every = [*workers]
            every += [await replaced(sandbox, one, "work", LEASE_TTL_S="2") for one in workers]
            load.stop()
            await running
        await until(lambda: handed_over(every) == load.outcomes.keys())
    assert set(load.statuses) == {200}
    # The balancer may retry a request whose first attempt was admitted.
    assert set(load.outcomes.values()) <= {"admitted", "duplicate"}
    assert_in_order(every)
