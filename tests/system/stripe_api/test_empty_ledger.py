"""Redis loses everything in mid-run: `backfill` makes each session's latest change right again.

TEST_SESSIONS is the number of sessions.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from random import Random

import pytest
import redis

from service.storage.layout import Keys
from tests.support.asking import asking, latest_states
from tests.support.processes import open_sandbox
from tests.support.stripe_api import LIVES, MAX_LIFE_S, StripeStandIn, final_states, live
from tests.support.waiting import DEADLINE_S, until
from tests.system.chaos import collecting

SESSIONS = int(os.environ.get("TEST_SESSIONS", "20"))
SETTLE_DEADLINE_S = DEADLINE_S + SESSIONS / 2
KEYS = Keys("idv", 8)


@pytest.mark.timeout(2 * SETTLE_DEADLINE_S)
async def test_an_empty_ledger_is_filled_again(tmp_path: Path) -> None:
    """Records, and consumers that follow epoch and sequence, end as at Stripe."""
    stand_in, random = StripeStandIn(), Random(14)
    lives = [LIVES[number % len(LIVES)] for number in range(SESSIONS)]
    with open_sandbox(tmp_path) as sandbox, redis.Redis.from_url(sandbox.url) as client:
        async with asking(stand_in, sandbox, HANDLERS="log") as made:
            await made.start("serve")
            worker = await made.start("work")

            async def let_live(count: int) -> None:
                """Let sessions live in the past, one after the other, and settle."""
                stand_in.clock.advance(-MAX_LIFE_S * (count + 1))
                for _ in range(count):
                    live(stand_in, lives.pop(), random)
                stand_in.clock.advance(time.time() - stand_in.clock.time())
                await until(lambda: stand_in.pushes.is_idle, SETTLE_DEADLINE_S)

            await let_live(SESSIONS // 2)
            # Some sessions have more to come, of which one part is known and then forgotten.
            going_on = [stand_in.sessions.create().id for _ in range(5)]
            for session_id in going_on:
                stand_in.sessions.submit(session_id)
            await until(lambda: stand_in.pushes.is_idle, SETTLE_DEADLINE_S)
            client.flushall()
            for session_id in going_on:
                stand_in.sessions.verify(session_id)
            await let_live(len(lives))
            assert stand_in.sessions.all.keys() - collecting.records(client).keys()

            filled = await made.run("backfill", "--since", "30d")
            assert filled.wait() == 0, filled.err

            def is_settled() -> bool:
                return (
                    collecting.unfetched(client, KEYS) == 0
                    and collecting.unsettled(client, KEYS, "log") == 0
                    and latest_states(worker) == final_states(stand_in)
                )

            await until(is_settled, SETTLE_DEADLINE_S)
        records = collecting.records(client)

    assert {one: record.status for one, record in records.items()} == final_states(stand_in)
    known = {event_id for record in records.values() for event_id in record.events}
    assert known == {event.id for event in stand_in.events.all}
