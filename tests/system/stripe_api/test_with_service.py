"""The service takes what the stand-in pushes, and ends where the stand-in does."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tests.support.harness import SECRET
from tests.support.processes import open_sandbox
from tests.support.stripe_api import LIVES, StripeStandIn, final_states, live
from tests.support.waiting import until

TIMES = 6


async def test_sessions_end_in_the_service_as_at_stripe(tmp_path: Path) -> None:
    """Out of order, some twice, through a receiver and a worker."""
    stand_in, random = StripeStandIn(), Random(14)
    stand_in.clock.advance(-3600)
    with open_sandbox(tmp_path) as sandbox:
        receiver, worker = sandbox.start("serve").ready(), sandbox.start("work").ready()
        stand_in.subscribe(receiver.url, secret=SECRET.reveal().decode())
        stand_in.pushes.max_delay_s = 5
        stand_in.pushes.duplicate_share = 0.2
        for life in LIVES * TIMES:
            live(stand_in, life, random)
        stand_in.clock.advance(3600)
        assert await stand_in.pushes.push_due() > len(stand_in.events.all)
        assert {one.status for one in stand_in.pushes.attempts} == {200}

        def arrived() -> bool:
            lines = worker.lines("transition")
            states = {line["session_id"]: line["current"] for line in lines}
            return states == final_states(stand_in)

        await until(arrived)
