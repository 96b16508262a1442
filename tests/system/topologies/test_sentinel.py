"""Fail-over under Sentinel, with real receivers and workers under load."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.depth import takes_long
from tests.support.load import AFTER, BEFORE, SESSIONS, deployment, remembered
from tests.support.servers import Server
from tests.support.topologies import Pair, command, wait_for, watched_pair
from tests.support.waiting import until

pytestmark = [pytest.mark.timeout(400), takes_long]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """Yield a pair under three Sentinels."""
    with watched_pair(tmp_path / "servers") as started:
        yield started


async def test_a_new_primary_costs_nothing_that_a_replica_has(pair: Pair, tmp_path: Path) -> None:
    """With DURABILITY=replica a killed primary, and then a planned change, lose nothing answered.

    All recovers by itself.
    """
    async with deployment(pair.url, tmp_path, DURABILITY="replica") as deployed:
        await deployed.load.answered(BEFORE)
        await asyncio.to_thread(pair.kill)
        await asyncio.to_thread(pair.revive)
        await deployed.load.answered(BEFORE)
        await asyncio.to_thread(pair.switch)
        await deployed.load.answered(AFTER)
        deployed.load.stop()
        await deployed.handed_over({*deployed.load.outcomes})
    deployed.assert_nothing_lost(remembered([pair.primary()]))


async def test_whichever_replica_is_promoted_has_it(tmp_path: Path) -> None:
    """Sentinel promotes the replica with the better priority, which is the one that hung.

    What only the other had was not answered 200.
    """
    with watched_pair(tmp_path / "servers", priorities=(100, 1)) as family:
        async with deployment(family.url, tmp_path, DURABILITY="replica") as deployed:
            await deployed.load.answered(BEFORE)
            await until(lambda: b"differ in replica-priority" in deployed.receivers[0].out)
            _, preferred = family.replicas()
            # It receives nothing from its primary, and looks healthy to the Sentinels.
            command(preferred, "CLIENT", "PAUSE", 600_000, "WRITE")
            refused = deployed.load.statuses[503]
            await until(lambda: deployed.load.statuses[503] >= refused + SESSIONS)
            promoted = await asyncio.to_thread(_kill_before_it_is_up_to_date, family, preferred)
            assert promoted == preferred
            await deployed.load.answered(AFTER)
            deployed.load.stop()
            await deployed.handed_over({*deployed.load.outcomes})
        deployed.assert_nothing_lost(remembered([promoted]))


def _kill_before_it_is_up_to_date(family: Pair, paused: Server) -> Server:
    """Kill the primary, and only then resume a paused replica, which lacks the last writes."""
    family.primary().process.kill()
    wait_for(lambda: command(paused, "ROLE")[3] != b"connected")
    command(paused, "CLIENT", "UNPAUSE")
    return family.kill()
