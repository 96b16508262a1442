"""Workers are killed while they fetch: no event is lost, and none becomes two transitions."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from asyncio import gather
from collections import defaultdict
from collections.abc import Iterator

import pytest

from service.inbox.admission import Inbox
from service.parsers import FETCH
from service.storage.connections import Connections
from service.stripe.events import Event
from service.transitions import stream_entry
from service.transitions.transition import Origin, StatusTransition, make_change
from tests.support import roles
from tests.support.admissions import make_event, make_notification
from tests.support.waiting import PATIENCE_S, until
from tests.support.workers import Deployment

# What Stripe would answer is made from the notification. At one point of the third call to get
# there, the process is killed: other calls are anywhere by then.
PROGRAM = f"""
import asyncio, os, signal, sys
from service.config import Settings
from service.delivery import worker
from service.delivery.worker import Worker
from service.inbox.admission import Inbox
from service.parsers import FETCH
from service.secret import Secret
from service.storage.connections import connect
from service.storage.layout import Keys
from service.transitions.transition import Origin, make_change
from tests.support.admissions import NOW, make_event

worker.MAX_INTERVAL_S = 0.1
url, killed_at = sys.argv[1:]
passed = 0

async def reach(point):
    global passed
    await asyncio.sleep(0.01)
    passed += point == killed_at
    if passed == 3:
        os.kill(os.getpid(), signal.SIGKILL)

async def main():
    settings = Settings(
        redis_url=Secret(url),
        stripe_api_key=(Secret("rk_test_1"),),
        lease_ttl_s={10 * PATIENCE_S},
        shutdown_grace_s={PATIENCE_S},
    )
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    async with connect(settings.redis_url) as connections:
        keys = Keys(settings.redis_prefix, settings.partitions)
        inbox = Inbox(connections, keys, settings, judges_age=False)

        async def fetch(notification):
            await reach("noted")
            step = notification.event_type.rpartition(".")[2]
            event = make_event(
                step,
                "requires_input" if step == "created" else step,
                id=notification.event_id.replace("thin", "twin"),
                at=notification.created - NOW,
                session=notification.session_id,
            )
            await reach("fetched")
            await inbox.admit(event, make_change(event, origin=Origin.THIN))
            await reach("admitted")

        await Worker(connections, keys, settings, {{FETCH: fetch}}).run(stopping)

asyncio.run(main())
"""
STEPS = ("created", "processing", "verified")
POINTS = ("noted", "fetched", "admitted")


class Workers:
    """Worker processes, one after the other, as a process manager would start them."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, killed_at: str) -> subprocess.Popen[bytes]:
        """Start a worker; the leases of those before are freed to save the time."""
        keys = self._deployment.keys
        self._deployment.client.delete(*self._deployment.lease_keys(FETCH), keys.workers(FETCH))
        url = self._deployment.settings.redis_url.reveal()
        url = roles.as_user(url, roles.WORKER) if roles.are_wanted() else url
        started = subprocess.Popen([sys.executable, "-c", PROGRAM, url, killed_at])
        self._running.append(started)
        return started

    def close(self) -> None:
        """Kill all that still run."""
        for process in self._running:
            process.kill()
            process.wait(PATIENCE_S)


@pytest.fixture
def workers(deployment: Deployment) -> Iterator[Workers]:
    """Yield a starter of worker processes; those that run are killed at the end."""
    yielded = Workers(deployment)
    yield yielded
    yielded.close()


def twin(session: str, n: int) -> Event:
    """Return the event that is fetched for the *n*-th notification of a session."""
    step = STEPS[n]
    status = "requires_input" if step == "created" else step
    return make_event(step, status, id=f"evt_twin_{session}_{n}", at=10 * n, session=session)


def admitted(deployment: Deployment) -> dict[str, list[StatusTransition]]:
    """Return the transitions of each session, in order."""
    found = defaultdict(list)
    for partition in range(deployment.keys.partitions):
        for _, fields in deployment.client.xrange(deployment.keys.transitions(partition)):
            transition = stream_entry.unpack(fields)
            found[transition.session_id].append(transition)
    return found


@pytest.mark.timeout(4 * PATIENCE_S)
async def test_killed_between_note_fetch_and_admission(
    deployment: Deployment, connections: Connections, workers: Workers
) -> None:
    """Each event is admitted once and in order; also where its webhook comes as well."""
    keys, client = deployment.keys, deployment.client
    inbox = Inbox(connections, keys, deployment.settings)
    sessions = [f"vs_{n}" for n in range(40)]
    for n, step in enumerate(STEPS):
        noted = [
            make_notification(step, id=f"evt_thin_{session}_{n}", at=10 * n, session=session)
            for session in sessions
        ]
        assert {one.outcome for one in await gather(*map(inbox.note, noted))} == {"queued"}
        assert {one.outcome for one in await gather(*map(inbox.note, noted))} == {"duplicate"}

    for point in POINTS:
        killed = workers.start(point)
        assert await asyncio.to_thread(killed.wait, PATIENCE_S) == -signal.SIGKILL
        waiting = sum(client.xlen(keys.notifications(p)) for p in range(keys.partitions))
        assert waiting > 0
    both = sessions[::2]
    for n in range(len(STEPS)):
        events = [twin(session, n) for session in both]
        await gather(*(inbox.admit(event, make_change(event)) for event in events))
    workers.start("")
    streams = [keys.notifications(partition) for partition in range(keys.partitions)]
    await until(lambda: not any(map(client.xlen, streams)))

    found = admitted(deployment)
    for session in sessions:
        assert [one.event_id for one in found[session]] == [
            f"evt_twin_{session}_{n}" for n in range(len(STEPS))
        ]
        assert [one.sequence for one in found[session]] == [1, 2, 3]
    for session in {*sessions} - {*both}:
        assert {one.origin for one in found[session]} == {Origin.THIN}
    assert not any(client.xlen(keys.dead_letters(p, FETCH)) for p in range(keys.partitions))
