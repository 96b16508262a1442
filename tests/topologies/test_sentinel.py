"""Laws of a fail-over under Sentinel, with real receivers and workers under load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import takes_long
from landscapes import Pair, watched_pair
from traffic import AFTER, BEFORE, deployment, during, remembered

pytestmark = [pytest.mark.timeout(400), takes_long]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """Yield a pair under three Sentinels."""
    with watched_pair(tmp_path / "servers") as started:
        yield started


async def test_a_killed_primary_costs_nothing_that_a_replica_has(
    pair: Pair, tmp_path: Path
) -> None:
    """With DURABILITY=replica every 200 outlives the primary, and all begin again by themselves."""
    async with deployment(pair.url, tmp_path, DURABILITY="replica") as deployed:
        await deployed.load.answered(BEFORE)
        await during(pair.kill)
        await during(pair.revive)
        await deployed.load.answered(AFTER)
        deployed.load.stop()
        await deployed.settled({*deployed.load.outcomes})
    deployed.assert_nothing_lost(remembered([pair.primary()]))


async def test_a_planned_change_costs_nothing_that_a_replica_has(
    pair: Pair, tmp_path: Path
) -> None:
    """With DURABILITY=replica every 200 outlives `SENTINEL FAILOVER`, there and back."""
    async with deployment(pair.url, tmp_path, DURABILITY="replica") as deployed:
        await deployed.load.answered(BEFORE)
        await during(pair.switch)
        await deployed.load.answered(BEFORE)
        await during(pair.switch)
        await deployed.load.answered(AFTER)
        deployed.load.stop()
        await deployed.settled({*deployed.load.outcomes})
    deployed.assert_nothing_lost(remembered([pair.primary()]))


async def test_without_a_replica_s_word_some_of_it_may_be_lost_and_no_more(
    pair: Pair, tmp_path: Path
) -> None:
    """With DURABILITY=none a killed primary takes with it what was under way, and nothing older."""
    async with deployment(pair.url, tmp_path, DURABILITY="none") as deployed:
        await deployed.load.answered(BEFORE)
        old = {*deployed.load.outcomes}
        await deployed.load.answered(BEFORE)
        await during(pair.kill)
        await deployed.load.answered(AFTER)
        deployed.load.stop()
        ledger = remembered([pair.primary()])
        await deployed.settled({*ledger})
    lost = deployed.load.outcomes.keys() - ledger.keys()
    assert not lost & old
    print(f"lost {len(lost)} of {len(deployed.load.outcomes)}")  # noqa: T201 - to be read with -s
