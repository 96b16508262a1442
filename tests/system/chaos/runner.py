"""One chaos run: a deployment under load, concurrent faults, then quiet, then the evidence."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from tests.support.stripe_api import final_states
from tests.support.waiting import until
from tests.system.chaos import collecting
from tests.system.chaos.api_workload import api_sessions
from tests.system.chaos.checker import Judgement, judge
from tests.system.chaos.deployment import HANDLERS, STEADY, Deployment, deployment
from tests.system.chaos.evidence import Reading, Run
from tests.system.chaos.faults import ALONE, FAULTS, Fault
from tests.system.chaos.hostile_clients import CANARY as HOSTILE_CANARY
from tests.system.chaos.needs import Needs, combined
from tests.system.chaos.stripe_client import Stripe
from tests.system.chaos.workload import CANARY, PUBLISHED, sessions

WARM_UP_S = 3.0
LONGEST_PAUSE_S = 1.5
GIVE_UP_S = 30.0
DRAIN_DEADLINE_S = 60.0
QUIET_S = 3.0
# The reconciler reads an event a minute after its creation, or later.
RECONCILE_DEADLINE_S = 150.0
# Longer than any pause of the client and any recovery that a fault needs.
CALM_DEADLINE_S = 30.0


class Plan(NamedTuple):
    """The parameters of a run.

    Attributes:
        seed: The seed of every random choice.
        rate: Events begun per second.
        seconds: How long the load lasts at least; it lasts until the last fault is over.
        faults: Names of faults, one for each time.
    """

    seed: int
    rate: float
    seconds: float
    faults: tuple[str, ...]


class Outcome(NamedTuple):
    """The outcome of a run.

    Attributes:
        plan: Its parameters.
        judgement: The checker's result.
        load_s: How long events were sent.
        longest_s: The longest time from the first request with an event to its acknowledgement.
        restarts: How many processes were restarted.
    """

    plan: Plan
    judgement: Judgement
    load_s: float
    longest_s: float
    restarts: int

    @property
    def rate(self) -> float:
        """Events per second."""
        return self.judgement.counts["events"] / self.load_s


async def run(plan: Plan, directory: Path, **settings: str) -> Outcome:
    """Make one run, and judge it; *settings* of the service are added to those of the faults."""
    needs = combined([*(FAULTS[name].needs for name in plan.faults), Needs(settings=settings)])
    async with deployment(directory, needs) as made:
        stripe = Stripe(Random(plan.seed), rate=plan.rate)
        stripe.receivers = {instance.name: instance.port for instance in made.of("serve")}
        before, load_s = await _loaded(made, stripe, plan)
        run = await _evidence(made, stripe, before)
    return Outcome(plan, judge(run), load_s, _longest_s(run), made.restarts)


async def _loaded(
    deployment: Deployment, stripe: Stripe, plan: Plan
) -> tuple[tuple[dict[str, Reading], int], float]:
    """Send until all faults are over; return the early usage, and how long it took."""
    stopping = asyncio.Event()
    began, random = time.monotonic(), Random(plan.seed + 1)
    if deployment.stand_in:
        workload = api_sessions(deployment.stand_in, random)
    else:
        workload = sessions(random, int(time.time()))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(stripe.send(workload, stopping))
        await asyncio.sleep(WARM_UP_S)
        before = deployment.readings(), _connections(deployment)
        await _in_lanes(deployment, stripe, plan)
        await asyncio.sleep(max(0.0, began + plan.seconds - time.monotonic()))
        stopping.set()
        load_s = time.monotonic() - began
        stripe.give_up_in(GIVE_UP_S)
    return before, load_s


async def _in_lanes(deployment: Deployment, stripe: Stripe, plan: Plan) -> None:
    """Inject the faults: those of different lanes concurrently, some alone."""
    random = Random(plan.seed + 2)
    lanes: dict[str, list[Fault]] = defaultdict(list)
    for name in random.sample(plan.faults, len(plan.faults)):
        lanes[FAULTS[name].lane].append(FAULTS[name])

    async def happen(lane: Sequence[Fault], chances: Random) -> None:
        for fault in lane:
            await asyncio.sleep(chances.uniform(0, LONGEST_PAUSE_S))
            await fault.act(deployment, stripe, chances)

    alone = lanes.pop(ALONE, [])
    async with asyncio.TaskGroup() as tasks:
        for lane in lanes.values():
            tasks.create_task(happen(lane, Random(random.random())))
    for fault in alone:
        await _calm(stripe)
        await happen([fault], random)
    deployment.faults_ended = time.time()
    await _calm(stripe)


async def _calm(stripe: Stripe) -> None:
    """Wait until everything that was sent so far is acknowledged, up to a deadline."""
    now = time.time()
    with contextlib.suppress(TimeoutError):
        await until(lambda: stripe.is_acknowledged_until(now), CALM_DEADLINE_S)


async def _evidence(
    deployment: Deployment, stripe: Stripe, before: tuple[dict[str, Reading], int]
) -> Run:
    """Wait until all is delivered and quiet, end all processes, and collect the evidence."""
    if deployment.stand_in and deployment.settings["RECONCILE_EVERY_S"] != "0":
        with contextlib.suppress(TimeoutError):
            await until(deployment.is_complete, RECONCILE_DEADLINE_S)
    with contextlib.suppress(TimeoutError):
        await until(lambda: not any(_unsettled(deployment).values()), DRAIN_DEADLINE_S)
    stripe.close()
    await asyncio.sleep(QUIET_S)
    after, connections = deployment.readings(), (before[1], _connections(deployment))
    for instance in list(deployment.instances.values()):
        if instance.process.popen.poll() is None:
            await deployment.end(instance)
    calls = {name: collecting.calls(_call_log(deployment, name)) for name in HANDLERS}
    with deployment.client() as client:
        transitions = {*collecting.transitions(client, deployment.keys)}
        if "STREAM_MAX_ENTRIES" in deployment.settings:
            transitions |= collecting.taken(calls)
        return Run(
            events=stripe.events,
            answers=stripe.answers,
            calls=calls,
            dead_letters={
                name: collecting.dead_letters(client, deployment.keys, name) for name in HANDLERS
            },
            transitions=[*transitions],
            unsent=frozenset(stripe.unsent),
            thin=stripe.thin,
            states=final_states(deployment.stand_in) if deployment.stand_in else {},
            decisions=collecting.decisions(deployment.directory / "logs"),
            faults_ended=deployment.faults_ended,
            records=collecting.records(client),
            deleted=deployment.deleted,
            unsettled=_unsettled(deployment),
            crashes=deployment.crashes,
            rollbacks=deployment.rollbacks,
            bounds=deployment.bounds,
            probes=deployment.probes,
            hostile_responses=deployment.hostile_responses,
            skewed=frozenset(deployment.skewed),
            steady=STEADY,
            attempts=int(deployment.settings["RETRY_MAX_ATTEMPTS"]),
            before={name: one for name, one in before[0].items() if name in after},
            after=after,
            connections=connections,
            exits=deployment.exits,
            texts=collecting.texts(deployment.directory, sorted(stripe.bodies)),
            canaries={
                CANARY.encode(): (),
                PUBLISHED.encode(): ("redis",),
                HOSTILE_CANARY.encode(): (),
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


def _call_log(deployment: Deployment, handler: str) -> Path:
    return deployment.directory / f"{handler.rpartition(':')[2]}.calls"


def _unsettled(deployment: Deployment) -> dict[str, int]:
    with deployment.client() as client:
        handlers = {
            name: collecting.unsettled(client, deployment.keys, name)
            for name in deployment.handlers
        }
        return {**handlers, "fetch": collecting.unfetched(client, deployment.keys)}


def _connections(deployment: Deployment) -> int:
    with deployment.client() as client:
        return int(client.info("clients")["connected_clients"])
