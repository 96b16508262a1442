"""A destination for snapshots and one for thin events share a URL: each change is one transition.

TEST_SESSIONS is the number of sessions.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import redis

from service.storage.layout import Keys
from tests.support.asking import asking, change_of, latest_states
from tests.support.processes import open_sandbox
from tests.support.stripe_api import LIVES, MAX_LIFE_S, StripeStandIn, final_states, live
from tests.support.waiting import DEADLINE_S, until
from tests.system.chaos import collecting

SESSIONS = int(os.environ.get("TEST_SESSIONS", "20"))
SETTLE_DEADLINE_S = DEADLINE_S + SESSIONS / 2
KEYS = Keys("idv", 8)
# Of one session in so many there are no snapshots, so that the session itself is read.
WITHOUT_TWINS = 10


@pytest.mark.timeout(2 * SETTLE_DEADLINE_S)
async def test_a_change_that_comes_in_both_forms_is_one_transition(tmp_path: Path) -> None:
    """All six types, shuffled, some twice: sessions end in the service as at Stripe."""
    stand_in, random = StripeStandIn(), Random(14)
    stand_in.pushes.max_delay_s = MAX_LIFE_S
    stand_in.pushes.duplicate_share = 0.2
    with open_sandbox(tmp_path) as sandbox, redis.Redis.from_url(sandbox.url) as client:
        async with asking(stand_in, sandbox) as made:
            _, worker = await made.start("serve"), await made.start("work")
            stand_in.clock.advance(-MAX_LIFE_S * (SESSIONS + 1))
            for number in range(SESSIONS):
                stand_in.makes_twins = number % WITHOUT_TWINS > 0
                live(stand_in, LIVES[number % len(LIVES)], random)
            stand_in.clock.advance(time.time() - stand_in.clock.time())

            def is_settled() -> bool:
                return (
                    stand_in.pushes.is_idle
                    and collecting.unfetched(client, KEYS) == 0
                    and collecting.unsettled(client, KEYS, "log") == 0
                )

            await until(is_settled, SETTLE_DEADLINE_S)
            await until(lambda: latest_states(worker) == final_states(stand_in))
            lines = worker.lines("transition")
        records = collecting.records(client)

    states = {session_id: record.status for session_id, record in records.items()}
    assert states == final_states(stand_in)
    snapshots = {event.id for event in stand_in.events.all if event.id}
    recorded = {event_id for record in records.values() for event_id in record.events}
    assert recorded == snapshots
    assert {event.type.rpartition(".")[2] for event in stand_in.events.all} == {
        *("canceled", "created", "processing", "redacted", "requires_input", "verified"),
    }
    by_session = defaultdict(list)
    for line in lines:
        by_session[line["session_id"]].append(line)
    for session_id, written in by_session.items():
        assert [line["sequence"] for line in written] == [*range(1, len(written) + 1)]
        events = {
            event.id or f"read:{event.thin_id}" for event in stand_in.events.about(session_id)
        }
        ids = [line["event_id"] for line in written]
        assert len({*ids}) == len(ids)
        assert events.issuperset(ids)
        assert all(change_of(one) != change_of(other) for one, other in pairwise(written))
    assert {line["origin"] for line in lines} == {"webhook", "thin"}
    # One by one it would be two requests for each thin event.
    assert len(stand_in.requests) < len(stand_in.events.all)
