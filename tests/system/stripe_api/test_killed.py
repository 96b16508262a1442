"""Processes are killed between two steps of asking Stripe: nothing is lost, nothing comes twice."""

from __future__ import annotations

import signal
from collections import defaultdict
from pathlib import Path
from random import Random

import pytest
import redis

from service.storage.keys import Keys
from tests.support.asking import Asking, asking, killed_at
from tests.support.depth import takes_long
from tests.support.processes import Process, open_sandbox
from tests.support.stripe_api import (
    LIVES,
    MAX_LIFE_S,
    StripeStandIn,
    final_states,
    live,
    lose_all,
    thin_only,
)
from tests.support.waiting import until
from tests.system.chaos import collecting

KEYS = Keys("idv", 8)
ADMIT, NOTE = "service.inbox.admission:Inbox.admit", "service.inbox.admission:Inbox.note"
GET = "service.stripe_api.client:StripeApi.get"
MOVE_CURSOR = "service.stripe_api.account_pass:move_cursor"


def lived(stand_in: StripeStandIn) -> None:
    """Let some sessions live two minutes ago."""
    random = Random(9)
    stand_in.clock.advance(-120 - MAX_LIFE_S * len(LIVES))
    for life in LIVES:
        live(stand_in, life, random)
    stand_in.clock.advance(120 + MAX_LIFE_S * len(LIVES))


async def until_killed(process: Process) -> None:
    """Wait for the end of a process, by SIGKILL."""
    assert await until(process.popen.poll) == -signal.SIGKILL


async def until_as_at_stripe(stand_in: StripeStandIn, client: redis.Redis) -> None:
    """Wait until all is known, and check that nothing is on the streams twice."""

    def is_settled() -> bool:
        records = collecting.records(client)
        states = {session_id: record.status for session_id, record in records.items()}
        known = {event_id for record in records.values() for event_id in record.events}
        return (
            known == {event.id for event in stand_in.events.all}
            and states == final_states(stand_in)
            and collecting.unfetched(client, KEYS) == 0
            and collecting.unsettled(client, KEYS, "log") == 0
        )

    await until(is_settled)
    sequences = defaultdict(list)
    transitions = collecting.transitions(client, KEYS)
    for one in transitions:
        sequences[one.place.session_id].append(one.place.sequence)
    assert all(found == [*range(1, len(found) + 1)] for found in sequences.values())
    assert len({one.event_id for one in transitions}) == len(transitions)


@pytest.mark.parametrize(
    ("command", "when", "place"),
    [
        pytest.param("serve", "after", NOTE, id="noted, not answered", marks=takes_long),
        pytest.param("work", "before", GET, id="noted, not fetched", marks=takes_long),
        pytest.param("work", "before", ADMIT, id="fetched, not admitted"),
        pytest.param("work", "after", ADMIT, id="admitted, not acknowledged", marks=takes_long),
    ],
)
async def test_a_notification_survives(tmp_path: Path, command: str, when: str, place: str) -> None:
    """It is fetched once more, and its event admitted once."""
    stand_in = StripeStandIn()
    stand_in.pushes.loses = thin_only
    with open_sandbox(tmp_path) as sandbox, redis.Redis.from_url(sandbox.url) as client:
        async with asking(stand_in, sandbox) as made:
            killed = await made.start(command, program=killed_at(when, place))
            await start_other(made, command)
            lived(stand_in)
            await until_killed(killed)
            await made.start(command)
            await until(lambda: stand_in.pushes.is_idle)
            await until_as_at_stripe(stand_in, client)


async def start_other(made: Asking, command: str) -> None:
    """Start the other one of receiver and worker."""
    await made.start("work" if command == "serve" else "serve")


@pytest.mark.parametrize(
    ("when", "place"),
    [
        pytest.param("before", ADMIT, id="page read, not admitted", marks=takes_long),
        pytest.param("before", MOVE_CURSOR, id="admitted, cursor not moved"),
        pytest.param("after", MOVE_CURSOR, id="cursor moved", marks=takes_long),
    ],
)
async def test_a_pass_of_the_reconciler_is_taken_up(tmp_path: Path, when: str, place: str) -> None:
    """What it had not finished is read again."""
    stand_in = StripeStandIn()
    with open_sandbox(tmp_path) as sandbox, redis.Redis.from_url(sandbox.url) as client:
        async with asking(stand_in, sandbox, RECONCILE_EVERY_S="1") as made:
            stand_in.pushes.loses = lose_all
            lived(stand_in)
            killed = made.launch("work", program=killed_at(when, place))
            await until_killed(killed)
            await made.start("work")
            await until_as_at_stripe(stand_in, client)
