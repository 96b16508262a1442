"""Redis loses everything in mid-run: what Stripe still lists is found again.

TEST_SESSIONS is the number of sessions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random

import pytest
import redis

from service.storage.keys import Keys
from tests.support import roles
from tests.support.asking import asking, latest_states
from tests.support.processes import Processes
from tests.support.servers import free_port, server
from tests.support.stripe_api import (
    LIVES,
    MAX_LIFE_S,
    StripeStandIn,
    final_states,
    live,
    lose_all,
    lose_nothing,
)
from tests.support.waiting import DEADLINE_S, until
from tests.system.chaos import collecting

SESSIONS = int(os.environ.get("TEST_SESSIONS", "30"))
SETTLE_DEADLINE_S = DEADLINE_S + SESSIONS / 2
KEYS = Keys("idv", 8)
DAY_S = 86_400.0
# The reconciler begins three days ago. After 30 days Stripe itself forgets.
MAX_AGE_S = 29 * DAY_S
# Of each of these a part is known, then forgotten, and then more comes.
GOING_ON = 5


class Servers:
    """Redis servers on one port, one after the other: each begins with nothing."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._port = free_port()
        self._started = 0
        self.url = f"redis://127.0.0.1:{self._port}"

    @contextmanager
    def running(self) -> Iterator[redis.Redis]:
        """Run the next one until the block is left, and yield a client."""
        self._started += 1
        directory = self._directory / f"redis-{self._started}"
        options = ("--appendonly", "yes")
        with server(directory, *options, port=self._port) as started, started.client() as client:
            if roles.are_wanted():
                roles.grant(client)
            yield client


def lived(stand_in: StripeStandIn, random: Random, ages_s: list[float]) -> None:
    """Let sessions live, each so long ago."""
    for number, age_s in enumerate(ages_s):
        stand_in.clock.advance(time.time() - age_s - stand_in.clock.time())
        live(stand_in, LIVES[number % len(LIVES)], random)
    stand_in.clock.advance(time.time() - stand_in.clock.time())


@pytest.mark.timeout(3 * SETTLE_DEADLINE_S)
async def test_an_empty_redis_is_filled_again(tmp_path: Path) -> None:
    """By `backfill`, beside the reconciler and webhooks: records and consumers end as at Stripe."""
    stand_in, random, servers = StripeStandIn(), Random(30), Servers(tmp_path)
    ages_s = [random.uniform(MAX_LIFE_S, MAX_AGE_S) for _ in range(SESSIONS)]
    with closing(Processes(servers.url, tmp_path)) as processes:
        async with asking(stand_in, processes, RECONCILE_EVERY_S="1") as made:
            with servers.running():
                await made.start("serve")
                worker = await made.start("work")
                lived(stand_in, random, ages_s[: SESSIONS // 2])
                going_on = [stand_in.sessions.create().id for _ in range(GOING_ON)]
                await until(
                    lambda: latest_states(worker) == final_states(stand_in), SETTLE_DEADLINE_S
                )
            before = max(line["epoch"] for line in worker.lines("transition"))
            with servers.running() as client:
                for session_id in going_on:
                    stand_in.sessions.cancel(session_id)
                # No webhook announces these.
                stand_in.pushes.loses = lose_all
                lived(stand_in, random, ages_s[SESSIONS // 2 :])
                stand_in.pushes.loses = lose_nothing
                filled = await made.run("backfill", "--since", "30d")
                assert filled.wait() == 0, filled.out + filled.err

                def is_settled() -> bool:
                    return (
                        stand_in.pushes.is_idle
                        and collecting.unfetched(client, KEYS) == 0
                        and collecting.unsettled(client, KEYS, "log") == 0
                        and latest_states(worker) == final_states(stand_in)
                    )

                await until(is_settled, SETTLE_DEADLINE_S)
                records = collecting.records(client)
    assert {one: record.status for one, record in records.items()} == final_states(stand_in)
    assert min(record.epoch for record in records.values()) > before
    known = {event_id for record in records.values() for event_id in record.events}
    assert known == {event.id for event in stand_in.events.all}
