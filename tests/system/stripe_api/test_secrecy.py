"""What Stripe's API answers leaves no trace but what may be kept: in processes that fetch."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from random import Random

import httpx2
import redis

from service.storage.layout import Keys
from tests.support.asking import asking
from tests.support.processes import Process, open_sandbox
from tests.support.stripe_api import (
    CANARY,
    CANARY_NUMBERS,
    LIVES,
    MAX_LIFE_S,
    Fault,
    StripeStandIn,
    live,
)
from tests.support.traces import everything_in, everything_written, hits
from tests.support.waiting import until
from tests.system.chaos import collecting

KEYS = Keys("idv", 8)
# Every seventh session is read itself; for every fifth one Stripe's answers are not what was asked.
WITHOUT_TWINS, BROKEN = 7, 5


def break_answers(stand_in: StripeStandIn, session_id: str) -> None:
    """Answer requests about a session with errors and objects that are not what was asked for."""
    ids = [event.thin_id for event in stand_in.events.about(session_id)]
    headers = {"Content-Type": "application/json", "Request-Id": CANARY, "Location": f"/{CANARY}"}
    for event_id, status in zip(ids, (200, 302, 400, 402, 200, 200), strict=False):
        body = f'{{"error": {{"message": "{CANARY}"}}, "{CANARY}": {CANARY_NUMBERS[1]}}}'.encode()
        answer = body[: -(status % 3)] if status == 200 else body
        path = f"/v2/core/events/{event_id}"
        fault = Fault(kind="answer", path=path, status=status, headers=headers, body=answer)
        stand_in.faults.add(fault)


def has_ended(stand_in: StripeStandIn, worker: Process) -> bool:
    """Say whether each thin event was fetched or given up."""
    lines = [*worker.lines("event.fetched"), *worker.lines("delivery.dead_lettered")]
    return len(lines) == len(stand_in.events.all)


async def test_answers_of_the_api_leave_no_trace(tmp_path: Path) -> None:
    """Not in output, metrics and Redis, nor in its file; neither does the key."""
    stand_in = StripeStandIn()
    stand_in.expands_everything = True
    stand_in.pushes.loses = lambda _, destination: destination.payload == "snapshot"
    more = {"LOG_LEVEL": "debug", "RETRY_INITIAL_DELAY_S": "0.01"}
    with open_sandbox(tmp_path) as sandbox, redis.Redis.from_url(sandbox.url) as client:
        async with asking(stand_in, sandbox, RETRY_MAX_ATTEMPTS="2", **more) as made:
            stand_in.clock.advance(-MAX_LIFE_S * 30)
            for number, life in enumerate(LIVES * 4):
                stand_in.makes_twins = number % WITHOUT_TWINS > 0
                session = live(stand_in, life, Random(number))
                if number % BROKEN == 0:
                    break_answers(stand_in, session.id)
            stand_in.clock.advance(time.time() - stand_in.clock.time())
            processes = [await made.start("serve"), await made.start("work")]
            await until(lambda: stand_in.pushes.is_idle)
            await until(lambda: has_ended(stand_in, processes[1]))
            await until(lambda: collecting.unsettled(client, KEYS, "log") == 0)
            shown = await asyncio.to_thread(
                lambda: [httpx2.get(f"{each.admin}/metrics").content for each in processes]
            )
            looked = await made.run("dead", "list", "fetch", "--json")
            kept = everything_in(sandbox.url)
            assert [each.stop() for each in processes] == [0, 0]
        kept += everything_written(tmp_path)
    output = b"".join(each.out + each.err for each in [*processes, looked])
    assert b"event.fetched" in output
    assert b"api_unexpected" in looked.out
    assert CANARY in str([event.session for event in stand_in.events.all])
    assert hits(output + b"".join(shown) + kept, [CANARY], CANARY_NUMBERS) == []
