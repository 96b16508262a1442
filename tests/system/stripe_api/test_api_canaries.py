"""What Stripe's API answers leaves no trace outside of process memory but what is allowed to.

The stand-in has a canary in each secret and each personal value that it serves, in its keys, and
here in each answer that is wrong.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Final, NamedTuple

import httpx2
import orjson
import redis

from service.storage.keys import Keys
from tests.support.asking import asking
from tests.support.processes import open_sandbox
from tests.support.stripe_api import (
    CANARY,
    CANARY_NUMBERS,
    LIVES,
    Event,
    Fault,
    StripeStandIn,
    answer,
    in_one_form,
    live,
    thin_only,
)
from tests.support.traces import everything_in, everything_written, hits
from tests.support.waiting import until
from tests.system.chaos import collecting

KEYS = Keys("idv", 8)
SECRETS = (CANARY, "whsec_", "sk_test_", "rk_test_")
WRONG_ID: Final = {"id": f"evt_{CANARY}", "object": "event", "type": CANARY, "created": 1}
# Answers that are none, by what is wrong with them.
WRONG: Final = (
    (200, f'{{"id": "{CANARY}'.encode()),
    (200, orjson.dumps([CANARY])),
    (200, orjson.dumps({**WRONG_ID, "created": CANARY, "data": {"object": {"id": CANARY}}})),
    (200, orjson.dumps({**WRONG_ID, "data": {"object": {"id": CANARY, "status": CANARY}}})),
    (302, CANARY.encode()),
    (400, orjson.dumps({"error": {"message": CANARY, "type": CANARY}})),
    (404, orjson.dumps({"error": {"message": CANARY, "code": CANARY}})),
)
WRONG_LIST: Final = orjson.dumps(
    {"object": "list", "data": [{**WRONG_ID, CANARY: CANARY}], "has_more": CANARY, "url": CANARY}
)
AGO_S = 1800.0
WITHOUT_SNAPSHOTS = 5
LISTS = ("/v1/events", "/v1/webhook_endpoints", "/v2/core/event_destinations")
COMMANDS = (
    ("check",),
    ("backfill", "--since", "1d"),
    ("backfill", "--since", "1d", "--dry-run", "--json"),
    ("dead", "list", "fetch"),
    ("dead", "list", "fetch", "--json"),
)
# What must be found, or the test looked at nothing.
SEEN = (b"api_unexpected", b"event.fetched", b"delivery.dead_lettered")


def wrong(path: str, status: int, body: bytes, times: int | None = None) -> Fault:
    """Return a fault that answers wrongly, with a canary in each header too."""
    headers = {
        "Content-Type": "application/json",
        "Location": f"http://127.0.0.1:9/{CANARY}",
        "Request-Id": CANARY,
    }
    return answer(body, path=path, status=status, headers=headers, times=times)


def fail_in_each_way(stand_in: StripeStandIn) -> None:
    """Let there be a notification for each wrong answer, and only wrong answers about it."""
    for status, body in WRONG:
        session = stand_in.sessions.create()
        event = stand_in.events.all[-1]
        for name in (event.thin_id, event.id, session.id):
            stand_in.faults.add(wrong(f".*/{name}", status, body))
    for path in LISTS:
        for status, body in ((200, WRONG_LIST), WRONG[0], WRONG[4]):
            stand_in.faults.add(wrong(path, status, body, times=1))


def lived(stand_in: StripeStandIn, random: Random) -> list[Event]:
    """Let some sessions live half an hour ago, and return their events.

    Of some sessions there are no snapshots, so that the session itself is read.
    """
    before = len(stand_in.events.all)
    stand_in.clock.advance(-AGO_S)
    for number, life in enumerate(LIVES * 3):
        stand_in.makes_snapshots = number % WITHOUT_SNAPSHOTS > 0
        live(stand_in, life, random)
    stand_in.makes_snapshots = True
    stand_in.clock.advance(time.time() - stand_in.clock.time())
    return stand_in.events.all[before:]


def is_settled(events: Iterable[Event], client: redis.Redis) -> bool:
    """Return whether *events* are known, and each notification fetched or given up."""
    pipeline = client.pipeline(transaction=False)
    for key in client.scan_iter("idv:*:session:*"):
        pipeline.hkeys(key)
    known = {field.decode() for fields in pipeline.execute() for field in fields}
    is_known = known.issuperset(event.id for event in events if event.id)
    return is_known and collecting.unfetched(client, KEYS) == len(WRONG)


def dead_letters(client: redis.Redis) -> int:
    """Return how many notifications were given up."""
    streams = [KEYS.dead_letters(partition, "fetch") for partition in range(KEYS.partitions)]
    return sum(int(client.xlen(stream)) for stream in streams)


class Traces(NamedTuple):
    """All that could be seen from outside during a run."""

    output: bytes
    metrics: bytes
    redis: bytes
    codes: list[int]


async def traces_of(directory: Path) -> Traces:
    """Let fetch, reconciler, backfill and check read right answers and wrong ones."""
    stand_in, random = StripeStandIn(), Random(4)
    stand_in.expands_everything = True
    stand_in.subscribe(None)
    before = lived(stand_in, random)
    settings = {
        "LOG_LEVEL": "debug",
        "RECONCILE_EVERY_S": "1",
        "RETRY_MAX_ATTEMPTS": "2",
        "RETRY_INITIAL_DELAY_S": "0.01",
        "RETRY_MAX_DELAY_S": "0.02",
    }
    with open_sandbox(directory) as sandbox, redis.Redis.from_url(sandbox.url) as client:
        async with asking(stand_in, sandbox, **settings) as made:
            running = [await made.start(command) for command in ("serve", "work")]
            stand_in.pushes.loses = thin_only
            fail_in_each_way(stand_in)
            await until(lambda: dead_letters(client) == len(WRONG))
            stand_in.pushes.loses = in_one_form
            events = before + lived(stand_in, random)
            await until(lambda: stand_in.pushes.is_idle and is_settled(events, client))
            ran = [await made.run(*arguments) for arguments in COMMANDS]
            metrics = [
                (await asyncio.to_thread(httpx2.get, f"{one.admin}/metrics")).content
                for one in running
            ]
        dump = everything_in(sandbox.url)
        codes = [process.stop() for process in running] + [process.wait() for process in ran[1:]]
        output = b"".join(process.out + process.err for process in (*running, *ran))
        written = everything_written(directory / "redis")
    return Traces(output, b"".join(metrics), dump + written, codes)


async def test_answers_of_the_api_leave_no_trace(tmp_path: Path) -> None:
    """No secret, no personal value, and no part of a wrong answer."""
    traces = await traces_of(tmp_path)
    for text in (traces.output, traces.metrics, traces.redis):
        assert hits(text, SECRETS, CANARY_NUMBERS) == []
    for word in SEEN:
        assert word in traces.output
    assert b"read:evt_" in traces.redis
    assert b"Traceback" not in traces.output
    assert {*traces.codes} == {0}
