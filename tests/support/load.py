"""A steady stream of events to real receivers and workers, and what became of each."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import ssl
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import redis

from tests.support.harness import event, signed
from tests.support.processes import Process, Processes
from tests.support.servers import Server
from tests.support.waiting import until

# Events before and after what happens to the servers.
BEFORE = 150
AFTER = 250
SESSIONS = 20
PER_SECOND = 100
# Stripe sends an event again hours later.
RESEND_AFTER_S = 0.3
DEADLINE_S = 90.0


class Load:
    """Sends one event after the other for each session, each until it is answered 200.

    Args:
        urls: The endpoints, used in turn.
        verify: How certificates are verified.

    Attributes:
        outcomes: The outcome of each event, by event id.
        statuses: How often each HTTP status was answered; 0 for no answer.
    """

    def __init__(self, urls: Sequence[str], *, verify: ssl.SSLContext | bool = True) -> None:
        self.outcomes: dict[str, str] = {}
        self.statuses: Counter[int] = Counter()
        self._urls = urls
        self._verify = verify
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Send until stopped, and after that until every event has been answered 200."""
        async with (
            httpx2.AsyncClient(verify=self._verify) as client,
            asyncio.TaskGroup() as sessions,
        ):
            for n in range(SESSIONS):
                sessions.create_task(self._session(client, n))

    def stop(self) -> None:
        """Begin no further events."""
        self._stopping.set()

    async def answered(self, count: int) -> None:
        """Wait until so many more events have been answered 200."""
        goal = len(self.outcomes) + count
        await until(lambda: len(self.outcomes) >= goal)

    async def _session(self, client: httpx2.AsyncClient, number: int) -> None:
        began = int(time.time()) - 20_000
        count = 0
        while not self._stopping.is_set():
            word = "requires_input" if count % 2 else "processing"
            name = f"evt_{number}_{count}"
            body = event(
                word, id=name, session=f"vs_{number}", status=word, created=began + 10 * count
            )
            await self._send_until_answered(client, name, body, self._urls[count % len(self._urls)])
            count += 1
            await asyncio.sleep(SESSIONS / PER_SECOND)

    async def _send_until_answered(
        self, client: httpx2.AsyncClient, name: str, body: bytes, url: str
    ) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while name not in self.outcomes:
                try:
                    answer = await client.post(url, content=body, headers=signed(body))
                except httpx2.TransportError:
                    self.statuses[0] += 1
                else:
                    self.statuses[answer.status_code] += 1
                    if answer.status_code == 200:
                        self.outcomes[name] = answer.json()["outcome"]
                        return
                    assert answer.status_code == 503
                    assert answer.headers["Retry-After"]
                await asyncio.sleep(RESEND_AFTER_S)


def remembered(servers: Iterable[Server]) -> dict[str, str]:
    """Return the letter of the outcome of each event id in the records on some servers."""
    found: dict[str, str] = {}
    for one in servers:
        with redis.Redis(port=one.port, decode_responses=True) as client:
            for key in client.scan_iter("idv:*:session:*"):
                fields: Any = client.hgetall(key)
                found |= {
                    name: value.partition(" ")[0]
                    for name, value in fields.items()
                    if name.startswith("evt_")
                }
    return found


def handed_over(workers: Iterable[Process]) -> set[str]:
    """Return the ids of the events that workers have delivered."""
    return {line["event_id"] for worker in workers for line in worker.lines("transition")}


def assert_in_order(workers: Iterable[Process]) -> None:
    """Assert that each session's transitions were first delivered in order, without a gap."""
    for delivered in first_deliveries(workers).values():
        assert delivered == sorted(delivered)
        for _, places in itertools.groupby(delivered, key=lambda place: place[0]):
            numbers = [sequence for _, sequence, _ in places]
            assert numbers == [*range(1, len(numbers) + 1)]


def first_deliveries(workers: Iterable[Process]) -> dict[str, list[tuple[int, int, str]]]:
    """Return, for each session, (epoch, sequence, event id) as first handed over, in order."""
    found: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    lines = [line for worker in workers for line in worker.lines("transition")]
    for line in sorted(lines, key=lambda line: str(line["timestamp"])):
        place = (line["epoch"], line["sequence"], line["event_id"])
        delivered = found[line["session_id"]]
        if place not in delivered:
            delivered.append(place)
    return found


class Deployment:
    """Receivers and workers under load.

    Attributes:
        receivers: Two of them.
        workers: Two of them.
        load: The events sent, and their answers.
    """

    def __init__(self, processes: Processes, settings: Mapping[str, str]) -> None:
        self.receivers = [processes.start("serve", **settings).ready() for _ in range(2)]
        self.workers = [processes.start("work", **settings).ready() for _ in range(2)]
        self.load = Load([one.url for one in self.receivers])

    async def handed_over(self, expected: set[str]) -> None:
        """Wait until all events of *expected* have been handed over."""
        await until(lambda: expected <= handed_over(self.workers), DEADLINE_S)

    def assert_nothing_lost(self, recorded: dict[str, str]) -> None:
        """Assert that each event answered 200 is recorded, and delivered in order."""
        assert self.load.outcomes.keys() == recorded.keys()
        assert set(recorded.values()) == {"a"}
        assert handed_over(self.workers) == recorded.keys()
        assert_in_order(self.workers)


@asynccontextmanager
async def deployment(url: str, directory: Path, **settings: str) -> AsyncIterator[Deployment]:
    """Run two receivers and two workers on a Redis; load them until the block is left.

    At its end every process must stop with exit code 0, and none may have written a traceback.
    """
    quick = {"LEASE_TTL_S": "3", "ADMIT_DEADLINE_S": "5", **settings}
    with contextlib.closing(Processes(url, directory)) as processes:
        started = await asyncio.to_thread(Deployment, processes, quick)
        loading = asyncio.create_task(started.load.run())
        try:
            yield started
        finally:
            started.load.stop()
            await loading
        for process in [*started.receivers, *started.workers]:
            code = await asyncio.to_thread(process.stop)
            assert code == 0, (code, process.out[-3000:], process.err[-3000:])
            assert b"Traceback" not in process.out + process.err
