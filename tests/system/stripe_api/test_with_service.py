"""The service takes what the stand-in pushes, and ends where the stand-in does."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tests.support.harness import SECRET
from tests.support.processes import Process, open_sandbox
from tests.support.stripe_api import (
    CANARY,
    LIVES,
    READ_ONLY,
    Destination,
    Event,
    StripeStandIn,
    final_states,
    live,
    running,
)
from tests.support.stripe_api.app import create_app
from tests.support.waiting import until

TIMES = 6


def live_all(stand_in: StripeStandIn) -> None:
    """Let sessions have all lives within the last hour; what is pushed for it is due now."""
    random = Random(14)
    stand_in.clock.advance(-3600)
    stand_in.pushes.max_delay_s = 5
    stand_in.pushes.duplicate_share = 0.2
    for life in LIVES * TIMES:
        live(stand_in, life, random)
    stand_in.clock.advance(3600)


def in_one_form_or_both(event: Event, destination: Destination) -> bool:
    """Lose a third of the pushes of either form, of different events."""
    return event.sequence % 3 == (destination.payload == "thin")


async def push_all(stand_in: StripeStandIn) -> None:
    """Push everything; each push is accepted."""
    assert await stand_in.pushes.push_due() > len(stand_in.events.all)
    assert {one.status for one in stand_in.pushes.attempts} == {200}


async def end_alike(stand_in: StripeStandIn, worker: Process) -> None:
    """Wait until a worker's handler has seen each session end as it did at Stripe."""

    def arrived() -> bool:
        lines = worker.lines("transition")
        states = {line["session_id"]: line["current"] for line in lines}
        return states == final_states(stand_in)

    await until(arrived)


async def test_sessions_end_in_the_service_as_at_stripe(tmp_path: Path) -> None:
    """Out of order, some twice, through a receiver and a worker."""
    stand_in = StripeStandIn()
    with open_sandbox(tmp_path) as sandbox:
        receiver, worker = sandbox.start("serve").ready(), sandbox.start("work").ready()
        stand_in.subscribe(receiver.url, secret=SECRET.reveal().decode())
        live_all(stand_in)
        await push_all(stand_in)
        await end_alike(stand_in, worker)


async def test_sessions_end_alike_with_thin_events(tmp_path: Path) -> None:
    """Both forms on one URL, some lost; one worker fetches and another one delivers."""
    stand_in = StripeStandIn()
    stand_in.expands_everything = True
    key = stand_in.directory.add_key(permissions=READ_ONLY).secret
    async with running(create_app(stand_in)) as address:
        with open_sandbox(tmp_path) as sandbox:
            api = {"STRIPE_API_KEY": key, "STRIPE_API_BASE": address}
            started = [
                sandbox.start("serve", **api),
                sandbox.start("work", "--handlers", "fetch", **api),
                sandbox.start("work", "--handlers", "log", **api),
            ]
            receiver, fetcher, worker = [process.ready() for process in started]
            secret = SECRET.reveal().decode()
            stand_in.subscribe(receiver.url, secret=secret, payload="snapshot")
            stand_in.subscribe(receiver.url, secret=secret, payload="thin")
            stand_in.pushes.loses = in_one_form_or_both
            live_all(stand_in)
            await push_all(stand_in)
            await end_alike(stand_in, worker)
            changed = [(one["session_id"], one["sequence"]) for one in worker.lines("transition")]
            assert len(set(changed)) == len(changed)
            assert [process.started["works"] for process in started] == [[], ["fetch"], ["log"]]
            assert [process.stop() for process in started] == [0, 0, 0]
    fetched = fetcher.lines("event.fetched")
    assert {one["outcome"] for one in fetched} >= {"admitted", "duplicate", "late"}
    assert not worker.lines("event.fetched")
    for process in started:
        assert CANARY.encode() not in process.out + process.err
