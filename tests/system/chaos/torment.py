"""One chaos run: a deployment under load, faults in their lanes, then quiet, then the evidence."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from tests.support.waiting import until
from tests.system.chaos import collecting
from tests.system.chaos.checker import Judgement, judge
from tests.system.chaos.evidence import Reading, Run
from tests.system.chaos.faults import ALONE, FAULTS, Fault
from tests.system.chaos.lives import CANARY, PUBLISHED, lives
from tests.system.chaos.needs import combined
from tests.system.chaos.scene import HANDLERS, STEADFAST, Scene, scene
from tests.system.chaos.strangers import CANARY as STRANGER
from tests.system.chaos.stripe_client import Stripe

WARM_UP_S = 3.0
LONGEST_PAUSE_S = 1.5
GIVE_UP_S = 30.0
DRAIN_DEADLINE_S = 60.0
QUIET_S = 3.0
# Longer than any pause of the client and any recovery that a fault needs.
CALM_DEADLINE_S = 30.0


class Plan(NamedTuple):
    """What a run is to be.

    Attributes:
        seed: Where every choice comes from.
        rate: Events begun per second.
        seconds: How long the load lasts at least; it lasts until the last fault is over.
        faults: Names of faults, one for each time.
    """

    seed: int
    rate: float
    seconds: float
    faults: tuple[str, ...]


class Outcome(NamedTuple):
    """What became of a run.

    Attributes:
        plan: What it was to be.
        judgement: What the checker says.
        load_s: How long events were begun.
        longest_s: The longest that any event had to be sent again before it was acknowledged.
        restarts: How often something was started again.
    """

    plan: Plan
    judgement: Judgement
    load_s: float
    longest_s: float
    restarts: int

    @property
    def rate(self) -> float:
        """Events per second, through everything."""
        return self.judgement.counts["events"] / self.load_s


async def torment(plan: Plan, directory: Path) -> Outcome:
    """Make one run come true, and judge it."""
    needs = combined(FAULTS[name].needs for name in plan.faults)
    async with scene(directory, needs) as made:
        stripe = Stripe(Random(plan.seed), rate=plan.rate)
        stripe.receivers = {place.name: place.port for place in made.of("serve")}
        before, load_s = await _loaded(made, stripe, plan)
        run = await _evidence(made, stripe, before)
    return Outcome(plan, judge(run), load_s, _longest_s(run), made.restarts)


async def _loaded(
    scene: Scene, stripe: Stripe, plan: Plan
) -> tuple[tuple[dict[str, Reading], int], float]:
    """Send until all faults are over; return what was used early, and how long it took."""
    stopping = asyncio.Event()
    began = time.monotonic()
    sending = asyncio.create_task(
        stripe.send(lives(Random(plan.seed + 1), int(time.time())), stopping)
    )
    try:
        await asyncio.sleep(WARM_UP_S)
        before = scene.readings(), _connections(scene)
        await _in_lanes(scene, stripe, plan)
        await asyncio.sleep(max(0.0, began + plan.seconds - time.monotonic()))
    finally:
        stopping.set()
        load_s = time.monotonic() - began
        stripe.give_up_in(GIVE_UP_S)
        await sending
    return before, load_s


async def _in_lanes(scene: Scene, stripe: Stripe, plan: Plan) -> None:
    """Let the faults happen: side by side where they are of different lanes, some alone."""
    random = Random(plan.seed + 2)
    lanes: dict[str, list[Fault]] = defaultdict(list)
    for name in random.sample(plan.faults, len(plan.faults)):
        lanes[FAULTS[name].lane].append(FAULTS[name])

    async def happen(lane: Sequence[Fault], chances: Random) -> None:
        for fault in lane:
            await asyncio.sleep(chances.uniform(0, LONGEST_PAUSE_S))
            await fault.act(scene, stripe, chances)

    alone = lanes.pop(ALONE, [])
    async with asyncio.TaskGroup() as tasks:
        for lane in lanes.values():
            tasks.create_task(happen(lane, Random(random.random())))
    for fault in alone:
        await _calm(stripe)
        await happen([fault], random)
    await _calm(stripe)


async def _calm(stripe: Stripe) -> None:
    """Wait until everything that was sent so far is acknowledged, or for a while."""
    now = time.time()
    with contextlib.suppress(TimeoutError):
        await until(lambda: stripe.is_acknowledged_until(now), CALM_DEADLINE_S)


async def _evidence(scene: Scene, stripe: Stripe, before: tuple[dict[str, Reading], int]) -> Run:
    """Wait until all is settled and quiet, end everything, and gather what is left."""
    with contextlib.suppress(TimeoutError):
        await until(lambda: not any(_unsettled(scene).values()), DRAIN_DEADLINE_S)
    stripe.close()
    await asyncio.sleep(QUIET_S)
    after, connections = scene.readings(), (before[1], _connections(scene))
    for place in list(scene.places.values()):
        if place.process.popen.poll() is None:
            await scene.end(place)
    journals = {name: collecting.journal(_journal(scene, name)) for name in HANDLERS}
    with scene.client() as client:
        transitions = {*collecting.transitions(client, scene.keys)}
        if "STREAM_MAX_ENTRIES" in scene.settings:
            transitions |= collecting.taken(journals)
        return Run(
            events=stripe.events,
            answers=stripe.answers,
            journals=journals,
            letters={name: collecting.letters(client, scene.keys, name) for name in HANDLERS},
            transitions=[*transitions],
            records=collecting.records(client),
            deleted=scene.deleted,
            unsettled=_unsettled(scene),
            crashes=scene.crashes,
            rollbacks=scene.rollbacks,
            bounds=scene.bounds,
            probes=scene.probes,
            strangers=scene.strangers,
            skewed=frozenset(scene.skewed),
            steadfast=STEADFAST,
            attempts=int(scene.settings["RETRY_MAX_ATTEMPTS"]),
            before={name: one for name, one in before[0].items() if name in after},
            after=after,
            connections=connections,
            exits=scene.exits,
            texts=collecting.texts(scene.directory, sorted(stripe.bodies)),
            canaries={
                CANARY.encode(): (),
                PUBLISHED.encode(): ("redis",),
                STRANGER.encode(): (),
                b"whsec_": (),
            },
        )


def _longest_s(run: Run) -> float:
    asked: dict[str, float] = {}
    longest_s, acknowledged = 0.0, set()
    for answer in sorted(run.answers, key=lambda one: one.answered_at):
        began = asked.setdefault(answer.event_id, answer.asked_at)
        if answer.is_acknowledgement and answer.event_id not in acknowledged:
            acknowledged.add(answer.event_id)
            longest_s = max(longest_s, answer.answered_at - began)
    return longest_s


def _journal(scene: Scene, handler: str) -> Path:
    return scene.directory / f"{handler.rpartition(':')[2]}.journal"


def _unsettled(scene: Scene) -> dict[str, int]:
    with scene.client() as client:
        return {name: collecting.unsettled(client, scene.keys, name) for name in scene.handlers}


def _connections(scene: Scene) -> int:
    with scene.client() as client:
        return int(client.info("clients")["connected_clients"])
