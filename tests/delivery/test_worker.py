"""Laws of the worker: shares, leases and hand-over among real workers and real processes."""

from __future__ import annotations

import asyncio
import contextlib
import operator
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
import structlog.testing

from service.config import Settings
from service.delivery import maintenance, retention, stream_watcher, worker
from service.delivery.consumer_groups import create_groups
from service.delivery.deliverer import MAX_DELIVERIES_WITHOUT_OUTCOME, DeadLetterReason
from service.delivery.worker import Worker
from service.errors import ConfigError
from service.handlers import Handler
from service.runtime.embedded_redis import EmbeddedServer, find_server
from service.secret import Secret
from service.storage import clients
from service.storage.connections import Connections, connect
from service.storage.layout import Keys
from service.telemetry import metrics
from service.transitions.transition import StatusTransition
from tests.support.clocks import clocked_server, needs_libfaketime
from tests.support.proxy import proxy_to
from tests.support.servers import PATIENCE_S, frozen, until
from tests.support.virtual_time import push

# For those who wait for leases to run out. All others hold theirs for longer than anybody waits.
TTL_S = 1.0
TURN_S = 0.1
WORK = {
    "lease_ttl_s": 10 * PATIENCE_S,
    "shutdown_grace_s": PATIENCE_S,
    "retry_initial_delay_s": 0.02,
    "retry_max_delay_s": 0.1,
    "handler_timeout_s": 10 * PATIENCE_S,
}

Entry = tuple[str, int]

# The handler writes one line per call and one per return: "<worker> > <session> <sequence>". From
# one sequence number on it does not return before there is a file with the worker's name.
CHILD = f"""
import asyncio, os, signal, sys
from service.storage import clients
from service.delivery import worker
from service.config import Settings
from service.storage.connections import connect
from service.storage.layout import Keys
from service.secret import Secret
from service.delivery.worker import Worker

clients.CALL_TIMEOUT_S = clients.CONNECT_TIMEOUT_S = {PATIENCE_S}
worker.MAX_INTERVAL_S = {TURN_S}
url, journal, name, held_from, ttl_s = sys.argv[1:]
out = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

async def handle(transition):
    session, sequence = transition.session_id, transition.sequence
    os.write(out, f"{{name}} > {{session}} {{sequence}}\\n".encode())
    if session.startswith("vs_killer"):
        os._exit(9)
    while sequence >= int(held_from) and not os.path.exists(f"{{journal}}.{{name}}"):
        await asyncio.sleep(0.01)
    os.write(out, f"{{name}} < {{session}} {{sequence}}\\n".encode())

async def main():
    settings = Settings(
        redis_url=Secret(url),
        lease_ttl_s=float(ttl_s),
        shutdown_grace_s={PATIENCE_S},
        handler_timeout_s={10 * PATIENCE_S},
    )
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    async with connect(settings.redis_url) as connections:
        keys = Keys(settings.redis_prefix, settings.partitions)
        await Worker(connections, keys, settings, {{"log": handle}}).run(stopping)

asyncio.run(main())
"""


class Journal:
    """What handlers were given, in the order of their calls."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.returned: list[Entry] = []

    def handler(self, act: Callable[[Entry], Awaitable[None]] | None = None) -> Handler:
        """Return a handler that writes here."""

        async def handle(transition: StatusTransition) -> None:
            one = (transition.session_id, transition.sequence)
            self.entries.append(one)
            if act is not None:
                await act(one)
            self.returned.append(one)

        return handle


class FileJournal:
    """The journal that child processes write to together."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def let_go(self, name: str) -> None:
        """Let the calls of one worker return."""
        self.path.with_name(f"{self.path.name}.{name}").touch()

    def lines(self) -> list[tuple[str, str, Entry]]:
        """Return all lines: worker, mark, entry."""
        if not self.path.exists():
            return []
        found = [line.split() for line in self.path.read_text().splitlines()]
        return [(name, mark, (session, int(n))) for name, mark, session, n in found]

    def calls(self, name: str = "") -> list[Entry]:
        """Return what was given, to one worker or to all."""
        return [one for by, mark, one in self.lines() if mark == ">" and by.startswith(name)]

    def returns(self, name: str = "") -> list[Entry]:
        """Return what was taken."""
        return [one for by, mark, one in self.lines() if mark == "<" and by.startswith(name)]


def check(calls: Sequence[Entry], admitted: Sequence[Entry]) -> None:
    """Assert what a consumer may rely on: nothing lost, first deliveries in order, repeats seen."""
    last: dict[str, int] = defaultdict(int)
    for session, sequence in calls:
        assert sequence <= last[session] + 1, f"{session} {sequence} came before its predecessor"
        last[session] = max(last[session], sequence)
    assert set(calls) == set(admitted)


class Site:
    """One Redis with admitted transitions, and the workers started on it."""

    def __init__(self, settings: Settings, client: redis.Redis) -> None:
        self.settings = settings
        self.keys = Keys(settings.redis_prefix, settings.partitions)
        self.client: Any = client
        self.admitted: list[Entry] = []
        self._tasks: dict[Worker, tuple[asyncio.Task[None], asyncio.Event]] = {}

    def admit(self, sessions: int, each: int = 1, *, name: str = "vs_s") -> list[Entry]:
        """Put the next *each* transitions of so many sessions onto the streams, interleaved."""
        before = Counter(session for session, _ in self.admitted)
        entries = [
            (session, before[session] + n)
            for n in range(1, each + 1)
            for session in (f"{name}{i}" for i in range(sessions))
        ]
        with self.client.pipeline(transaction=False) as pipeline:
            for session, n in entries:
                pipeline.xadd(
                    self.keys.transitions(self.keys.partition(session)), fields(session, n)
                )
            pipeline.execute()
        self.admitted += entries
        return entries

    def pending(self, handler: str = "log") -> int:
        """Return how many entries are read and not settled, in all partitions."""
        total = 0
        for partition in range(self.keys.partitions):
            with contextlib.suppress(redis.ResponseError):
                total += self.client.xpending(self.keys.transitions(partition), handler)["pending"]
        return total

    def dead(self, handler: str = "log") -> list[tuple[str, str]]:
        """Return session and reason of each dead letter."""
        streams = [self.keys.dead_letters(p, handler) for p in range(self.keys.partitions)]
        found = [fields for stream in streams for _, fields in self.client.xrange(stream)]
        return [
            (
                one[b"change"].split(b'"session_id":"')[1].split(b'"')[0].decode(),
                one[b"reason"].decode(),
            )
            for one in found
        ]

    def leases(self, handler: str = "log") -> int:
        """Return how many leases are held."""
        return int(
            self.client.exists(*(self.keys.lease(p, handler) for p in range(self.keys.partitions)))
        )

    def ends(self, handler: str = "log") -> list[int]:
        """Return when each lease ends, by Redis's clock."""
        return [
            self.client.pexpiretime(self.keys.lease(partition, handler))
            for partition in range(self.keys.partitions)
        ]

    def start(
        self, connections: Connections, handlers: dict[str, Handler], **changes: Any
    ) -> Worker:
        """Start a worker in this loop."""
        settings = replace(self.settings, **changes)
        one = Worker(connections, self.keys, settings, handlers)
        stopping = asyncio.Event()
        self._tasks[one] = (asyncio.create_task(one.run(stopping)), stopping)
        return one

    async def stop(self, one: Worker) -> None:
        """Stop a worker as SIGTERM would, and wait until it has ended."""
        task, stopping = self._tasks.pop(one)
        stopping.set()
        await task

    async def is_leaving(self, one: Worker) -> None:
        """Wait until a worker that was told to stop prolongs the leases it still needs."""
        tenures = one._partition_tasks
        await until(lambda: all(tenure.is_stopping for tenure in tenures.values()))
        leases = [
            self.keys.lease(partition, handler)
            for (handler, partition), tenure in tenures.items()
            if tenure.dispatcher.in_hand
        ]
        for lease in leases:
            self.client.pexpire(lease, 100_000)
        await until(lambda: min(map(self.client.pttl, leases)) > 200_000)

    def kill(self, one: Worker) -> None:
        """End a worker as SIGKILL would: without a word to Redis."""
        task, stopping = self._tasks.pop(one)
        # A client of Redis may keep a cancellation to itself.
        stopping.set()
        for tenure in one._partition_tasks.values():
            tenure.lease.release = _nothing  # type: ignore[method-assign]
            tenure.abandon()
        one._shut_down = _nothing  # type: ignore[method-assign]
        task.cancel()

    async def close(self) -> None:
        """Stop all workers."""
        for one in list(self._tasks):
            await self.stop(one)


async def _nothing() -> None:
    """Do nothing."""


def fields(session: str, sequence: int) -> dict[str, str | int]:
    """Return a stream entry as admission writes it."""
    change = (
        f'{{"event_id":"evt_{session}_{sequence}",'
        '"event_type":"identity.verification_session.processing",'
        f'"occurred_at":"2026-01-01T00:00:00Z","session_id":"{session}","current":"processing"}}'
    )
    return {"change": change, "previous": "", "sequence": sequence, "epoch": 1}


def troubles(logs: Sequence[Any]) -> list[Any]:
    """Return the lines that say that work or leases were lost."""
    events = {
        "dispatcher.ended",
        "dispatcher.failed",
        "partitions.taken_over",
        "worker.rebalance_failed",
    }
    return [line for line in logs if line["event"] in events]


def held(one: Worker, handler: str = "log") -> int:
    """Return how many partitions a worker works."""
    return len(one._held(handler))


@pytest.fixture
async def site(
    make_settings: Callable[..., Settings],
    connections: Connections,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Site]:
    """Yield an empty site, where nobody polls for mail; its workers are stopped at the end."""
    monkeypatch.setattr(worker, "MAX_INTERVAL_S", TURN_S)
    monkeypatch.setattr(stream_watcher, "BLOCK_S", 10 * PATIENCE_S)
    settings = make_settings(**WORK)
    with redis.Redis.from_url(settings.redis_url.reveal()) as client:
        yielded = Site(settings, client)
        yield yielded
        await yielded.close()


@pytest.fixture
def children(site: Site, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Yield what starts a worker in a process of its own; all are killed at the end."""
    started: list[subprocess.Popen[bytes]] = []

    def start(
        name: str, *, held_from: int = 10**9, ttl_s: float = 10 * PATIENCE_S
    ) -> subprocess.Popen[bytes]:
        url = site.settings.redis_url.reveal()
        arguments = [url, tmp_path / "journal", name, held_from, ttl_s]
        command = [sys.executable, "-c", CHILD, *map(str, arguments)]
        started.append(
            subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        )
        return started[-1]

    yield start
    for child in started:
        child.kill()
        child.wait(PATIENCE_S)


@pytest.fixture
def journal(tmp_path: Path) -> FileJournal:
    """Return the journal of the children."""
    return FileJournal(tmp_path / "journal")


async def test_one_worker_delivers_everything(site: Site, connections: Connections) -> None:
    """A single worker takes every partition, and delivers what is there and what wakes it."""
    site.admit(50, 3)
    journal = Journal()
    one = site.start(connections, {"log": journal.handler()})
    await until(lambda: len(journal.returned) == 150)
    site.admit(50, 2)
    await until(lambda: len(journal.returned) == 250)
    await until(lambda: site.pending() == 0)

    check(journal.entries, site.admitted)
    assert len(journal.entries) == 250
    assert held(one) == site.keys.partitions


async def test_pending_is_what_is_in_hand(site: Site, connections: Connections) -> None:
    """What Redis believes to be with us is what we have: nothing is lost between the two."""
    site.admit(300, 2)
    gate = asyncio.Event()
    one = site.start(connections, {"log": Journal().handler(lambda _: gate.wait())})  # type: ignore[arg-type,return-value]

    def in_hand() -> int:
        return sum(tenure.dispatcher.in_hand for tenure in one._partition_tasks.values())

    await until(lambda: in_hand() == 600)
    assert site.pending() == 600
    gate.set()
    await until(lambda: in_hand() == 0)
    assert site.pending() == 0


async def test_a_failing_session_is_parked_and_goes_on_whole(
    site: Site, connections: Connections
) -> None:
    """More than a window of one session rests beside others, is measured, and comes in order."""
    bad = site.admit(1, 600, name="vs_bad")
    site.admit(25)
    is_failing = True

    async def act(one: Entry) -> None:
        if is_failing and one in bad:
            raise LookupError

    journal = Journal()
    site.start(connections, {"log": journal.handler(act)}, retry_max_attempts=1000)
    await until(lambda: len(journal.returned) == 25)
    parked = metrics.PARKED_ENTRIES.labels("log")._value
    await until(lambda: parked.get() >= 599)
    is_failing = False
    await until(lambda: len(journal.returned) == 625)
    await until(lambda: parked.get() == 0 and site.pending() == 0)
    assert [one for one in journal.returned if one in bad] == bad


async def test_each_handler_is_alone(site: Site, connections: Connections) -> None:
    """A handler that hangs and fails delays no other, and its dead letters are its own."""
    settings = replace(site.settings, handlers=("log", "other"))
    await create_groups(connections, site.keys, settings.handlers)
    site.admit(20, 2)
    journal = Journal()
    are_taken = asyncio.Event()

    async def fail(_: StatusTransition) -> None:
        await are_taken.wait()
        raise ValueError

    site.start(connections, {"log": journal.handler(), "other": fail}, retry_max_attempts=2)
    await until(lambda: len(journal.returned) == 40)
    are_taken.set()
    await until(lambda: len(site.dead("other")) == 40)

    check(journal.entries, site.admitted)
    assert not site.dead("log")


async def test_shares_are_fair_and_move_without_disorder(
    site: Site, connections: Connections
) -> None:
    """Workers that come take their share, what leaves goes to the rest at once, order holds."""
    journal = Journal()

    async def slowly(_: Entry) -> None:
        await asyncio.sleep(0.01)

    handlers = {"log": journal.handler(slowly)}
    partitions = site.keys.partitions
    workers = [site.start(connections, handlers)]
    site.admit(40, 10)
    await until(lambda: held(workers[0]) == partitions)
    workers += [site.start(connections, handlers), site.start(connections, handlers)]
    await until(lambda: sorted(map(held, workers)) == [2, 3, 3])
    site.admit(40, 10)
    for leaving in workers[:2]:
        await site.stop(leaving)
    await until(lambda: held(workers[2]) == partitions)
    await until(lambda: set(journal.returned) == set(site.admitted))
    await until(lambda: site.pending() == 0)

    check(journal.entries, site.admitted)
    assert len(journal.entries) == len(site.admitted), "nothing is repeated when all end well"
    assert not site.dead()


async def test_a_dead_worker_is_replaced_within_its_lease(
    site: Site, connections: Connections
) -> None:
    """What a killed worker held is taken over when its leases have ended."""
    journal = Journal()
    never = asyncio.Event()

    async def hang(_: Entry) -> None:
        await never.wait()

    first = site.start(connections, {"log": Journal().handler(hang)}, lease_ttl_s=TTL_S)
    await until(lambda: held(first) == site.keys.partitions)
    site.admit(30, 2)
    await until(lambda: site.pending() == 60)
    second = site.start(connections, {"log": journal.handler()}, lease_ttl_s=TTL_S)
    site.kill(first)
    await until(lambda: held(second) == site.keys.partitions)
    await until(lambda: site.pending() == 0)

    check(journal.entries, site.admitted)


@needs_libfaketime
async def test_a_dead_worker_is_replaced_though_redis_clock_steps_back(tmp_path: Path) -> None:
    """What a killed worker held is not held for the length of a step, and the living are told."""
    with clocked_server(tmp_path) as clocked, clocked.server.client() as client:
        settings = Settings(redis_url=Secret(clocked.server.url), **{**WORK, "lease_ttl_s": TTL_S})  # type: ignore[arg-type]
        site = Site(settings, client)
        journal = Journal()
        never = asyncio.Event()

        async def hang(_: Entry) -> None:
            await never.wait()

        async with connect(settings.redis_url) as connections:
            await create_groups(connections, site.keys, settings.handlers)
            first = site.start(connections, {"log": Journal().handler(hang)})
            second = site.start(connections, {"log": journal.handler()})
            await until(lambda: held(first) == held(second) == site.keys.partitions / 2)
            site.admit(30, 2)
            await until(lambda: len(journal.returned) + site.pending() == 60)
            clocked.step(-600)
            with structlog.testing.capture_logs() as logs:
                site.kill(first)
                await until(lambda: held(second) == site.keys.partitions)
                await until(lambda: site.pending() == 0)
            await site.close()

    check(journal.entries, site.admitted)
    taken = [
        line["partitions"]
        for line in logs
        if line["event"] == "partitions.taken_over" and line["worker"] == first.name
    ]
    assert sum(taken) == site.keys.partitions / 2


async def test_a_lost_lease_ends_the_work_and_begins_again(
    site: Site, connections: Connections
) -> None:
    """When every lease is gone from Redis, work begins again from taking over."""
    journal = Journal()
    one = site.start(connections, {"log": journal.handler()})
    await until(lambda: held(one) == site.keys.partitions)
    before = set(one._partition_tasks.values())
    for partition in range(site.keys.partitions):
        site.client.delete(site.keys.lease(partition, "log"))
    await until(lambda: held(one) == 8 and before.isdisjoint(one._partition_tasks.values()))
    site.admit(20)
    await until(lambda: len(journal.returned) == 20)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return how long workers have rested after each turn and each failure, as it grows."""
    found: list[float] = []
    wait = worker._wait

    async def noting(event: asyncio.Event, most_s: float) -> None:
        found.append(most_s)
        await wait(event, most_s)

    monkeypatch.setattr(worker, "_wait", noting)
    return found


async def test_a_stolen_lease_is_waited_for(
    site: Site, connections: Connections, waits: list[float]
) -> None:
    """A lease somebody else holds is left alone until it is free, without asking all the time."""
    for partition in range(site.keys.partitions):
        site.client.set(site.keys.lease(partition, "log"), "somebody else")
    one = site.start(connections, {"log": Journal().handler()})
    await until(lambda: len(waits) > 5)
    assert held(one) == 0
    assert set(waits) == {TURN_S}
    site.client.delete(*(site.keys.lease(p, "log") for p in range(8)))
    await until(lambda: held(one) == 8)


async def test_a_blocked_loop_fences_itself(site: Site, connections: Connections) -> None:
    """After a handler blocked the loop for longer than the lease, work begins again, none lost."""
    journal = Journal()
    blocked = False

    async def block(_: Entry) -> None:
        nonlocal blocked
        if not blocked:
            blocked = True
            time.sleep(TTL_S * 1.3)  # noqa: ASYNC251 - the point

    site.admit(40, 2)
    site.start(connections, {"log": journal.handler(block)}, lease_ttl_s=TTL_S)
    await until(lambda: set(journal.returned) == set(site.admitted))
    await until(lambda: site.pending() == 0)
    check(journal.entries, site.admitted)


async def test_far_from_redis_with_many_partitions_nothing_is_lost_or_repeated(
    make_settings: Callable[..., Settings],
    redis_server: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """256 partitions, two handlers, Redis 20 ms away: no lease is lost, no hand-over repeated.

    Connections are as few, and waited for as shortly, as in service.
    """
    monkeypatch.setattr(clients, "POOL_WAIT_S", 0.25)
    monkeypatch.setattr(retention, "TRIM_EVERY_S", 0.0)
    monkeypatch.setattr(maintenance, "MEASURE_EVERY_S", 0.0)
    async with proxy_to(redis_server.url) as proxy:
        settings = make_settings(
            **{**WORK, "redis_url": Secret(proxy.url), "partitions": 256},
            handlers=("log", "other"),
        )
        async with connect(settings.redis_url) as connections:
            with redis.Redis.from_url(redis_server.url) as client:
                site = Site(settings, client)
                await create_groups(connections, site.keys, settings.handlers)
                proxy.delay_s = 0.04
                journals = {name: Journal() for name in settings.handlers}
                handlers = {name: journal.handler() for name, journal in journals.items()}
                with structlog.testing.capture_logs() as logs:
                    one = site.start(connections, handlers)
                    for _ in range(10):
                        site.admit(200)
                        await asyncio.sleep(0.2)
                    for journal in journals.values():
                        await until(lambda: len(journal.returned) >= len(site.admitted))  # noqa: B023
                    assert [held(one, name) for name in handlers] == [256, 256]
                    await site.stop(one)
                assert not site.pending()
    assert not troubles(logs)
    for journal in journals.values():
        assert sorted(journal.entries) == sorted(site.admitted)


async def test_a_turn_is_few_round_trips_however_many_partitions(
    make_settings: Callable[..., Settings],
    redis_server: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Renewing, counting the living, measuring and trimming do not ask once for each partition."""
    monkeypatch.setattr(worker, "MAX_INTERVAL_S", 10 * PATIENCE_S)
    monkeypatch.setattr(stream_watcher, "BLOCK_S", 10 * PATIENCE_S)
    monkeypatch.setattr(retention, "TRIM_EVERY_S", 0.0)
    monkeypatch.setattr(maintenance, "MEASURE_EVERY_S", 0.0)
    async with proxy_to(redis_server.url) as proxy:
        settings = make_settings(
            **{**WORK, "redis_url": Secret(proxy.url), "partitions": 256, "lease_ttl_s": 3600}
        )
        async with connect(settings.redis_url) as connections:
            with redis.Redis.from_url(redis_server.url) as client:
                site = Site(settings, client)
                await create_groups(connections, site.keys, settings.handlers)
                one = site.start(connections, {"log": Journal().handler()})
                blocked = partial(client.info, "clients")
                await until(lambda: blocked()["blocked_clients"] == 256)
                before = proxy.requests
                for turn in (one._renew_leases, one._rebalance, one._maintain):
                    await turn()
                assert proxy.requests - before < 20
                await site.stop(one)


@pytest.mark.parametrize("hanging", ["_rebalance", "_maintain"])
async def test_leases_are_renewed_whatever_else_hangs(
    site: Site, connections: Connections, monkeypatch: pytest.MonkeyPatch, hanging: str
) -> None:
    """A worker that cannot measure, trim or look for its share keeps what it has, and works."""
    journal = Journal()
    one = site.start(connections, {"log": journal.handler()})
    await until(lambda: held(one) == site.keys.partitions)
    hangs, is_over = asyncio.Event(), asyncio.Event()

    async def hang(_: object) -> None:
        hangs.set()
        await is_over.wait()
        raise redis.TimeoutError

    # The turn is looked up once, so what it calls is replaced.
    inner = {"_rebalance": one._heartbeats, "_maintain": one._maintenance}[hanging]
    monkeypatch.setattr(inner, {"_rebalance": "send", "_maintain": "run_due"}[hanging], hang)
    before = set(one._partition_tasks.values())
    await hangs.wait()
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            ends = site.ends()
            await until(lambda: all(map(operator.lt, ends, site.ends())))  # noqa: B023
        site.admit(20)
        await until(lambda: len(journal.returned) == 20)
    assert set(one._partition_tasks.values()) == before
    assert not troubles(logs)
    is_over.set()


async def test_a_deleted_stream_is_opened_again(site: Site, connections: Connections) -> None:
    """When an operator deletes a stream the groups are made again, and what comes is delivered."""
    journal = Journal()
    one = site.start(connections, {"log": journal.handler()})
    await until(lambda: held(one) == 8)
    site.admit(20)
    await until(lambda: len(journal.returned) == 20)
    for partition in range(8):
        site.client.delete(site.keys.transitions(partition))
    with structlog.testing.capture_logs() as logs:
        site.admit(20)
        await until(lambda: len(journal.returned) == 40)
    check(journal.entries, site.admitted)
    assert "group.created" in {line["event"] for line in logs}


async def test_lag_is_measured(site: Site, connections: Connections) -> None:
    """The gauges tell how much is not settled and how old the oldest of it is."""
    gate = asyncio.Event()
    site.admit(30)
    await asyncio.sleep(0.02)
    one = site.start(connections, {"log": Journal().handler(lambda _: gate.wait())})  # type: ignore[arg-type,return-value]
    await until(lambda: site.pending() == 30)
    entries = metrics.LAG_ENTRIES.labels("log")._value
    await until(lambda: entries.get() == 30)
    assert 0.02 < metrics.OLDEST_SECONDS.labels("log")._value.get() < 60

    gate.set()
    await until(lambda: site.pending() == 0)
    one._maintenance._measured_at = float("-inf")
    await until(lambda: entries.get() == 0)
    assert metrics.OLDEST_SECONDS.labels("log")._value.get() == 0


async def test_stopping_settles_and_renews_within_the_grace(
    site: Site, connections: Connections
) -> None:
    """A call is finished and settled while stopping, however short its lease: that is kept."""
    journal = Journal()
    gate = asyncio.Event()
    site.admit(8, 2)
    one = site.start(connections, {"log": journal.handler(lambda _: gate.wait())})  # type: ignore[arg-type,return-value]
    await until(lambda: len(journal.entries) == 8)
    stopping = asyncio.create_task(site.stop(one))
    await site.is_leaving(one)
    gate.set()
    await stopping

    assert len(journal.returned) == len(journal.entries) == 8
    assert site.pending() == 8
    assert site.leases() == 0


async def test_stopping_ends_with_the_grace(site: Site, connections: Connections) -> None:
    """A call that does not end in time is canceled; its entry stays, its lease is released."""
    never = asyncio.Event()
    journal = Journal()
    site.admit(8)
    one = site.start(
        connections,
        {"log": journal.handler(lambda _: never.wait())},  # type: ignore[arg-type,return-value]
        shutdown_grace_s=600,
        lease_ttl_s=3600,
    )
    await until(lambda: len(journal.entries) == 8)
    stopping = asyncio.create_task(site.stop(one))
    await site.is_leaving(one)
    assert not stopping.done()
    push(600)
    await stopping

    assert not journal.returned
    assert site.pending() == 8
    assert site.leases() == 0
    assert not site.client.zcard(site.keys.workers("log"))


async def test_a_handler_deaf_to_cancellation_does_not_hold_the_worker(
    site: Site, connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker ends although a handler ignores its cancellation, and says which one."""
    monkeypatch.setattr(worker, "CANCEL_GRACE_S", 0.2)
    deaf = True

    async def ignore(_: Entry) -> None:
        while deaf:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.05)

    site.admit(1)
    journal = Journal()
    one = site.start(connections, {"log": journal.handler(ignore)}, shutdown_grace_s=0.2)
    await until(lambda: len(journal.entries) == 1)
    with structlog.testing.capture_logs() as logs:
        await site.stop(one)
    assert [line["handler"] for line in logs if line["event"] == "handler.stuck"] == ["log"]
    deaf = False
    await until(lambda: not one._partition_tasks)


async def test_stopping_without_redis_ends(site: Site, tmp_path: Path) -> None:
    """A worker whose Redis is gone stops within its grace time all the same."""
    settings = replace(site.settings, redis_url=Secret(f"unix://{tmp_path}/nothing"))
    async with connect(settings.redis_url) as nowhere:
        one = site.start(nowhere, {"log": Journal().handler()})
        await asyncio.sleep(0.1)
        await site.stop(one)


@asynccontextmanager
async def _server(directory: Path) -> AsyncIterator[EmbeddedServer]:
    chosen = {**os.environ, "REDIS_SERVER": os.environ.get("TEST_REDIS_SERVER", "")}
    with EmbeddedServer.start(find_server(chosen), directory=directory) as server:
        yield server


async def test_a_worker_outlives_its_redis(tmp_path: Path, waits: list[float]) -> None:
    """While Redis is away the worker asks now and then; when it is back, work goes on by itself."""
    link = tmp_path / "redis.sock"
    settings = Settings(redis_url=Secret(f"unix://{link}"), **{**WORK, "lease_ttl_s": TTL_S})  # type: ignore[arg-type]
    journal = Journal()

    async def slowly(_: Entry) -> None:
        await asyncio.sleep(0.01)

    async with connect(settings.redis_url) as connections:
        with redis.Redis.from_url(settings.redis_url.reveal()) as client:
            site = Site(settings, client)
            async with _server(tmp_path / "data") as server:
                link.symlink_to(server.socket)
                await create_groups(connections, site.keys, settings.handlers)
                one = site.start(connections, {"log": journal.handler(slowly)})
                site.admit(100, 4)
                await until(lambda: len(journal.returned) > 100)
            link.unlink()
            with structlog.testing.capture_logs() as logs:
                rested = len(waits)
                await until(lambda: held(one) == 0)
                idle = len(waits)
                await until(lambda: len(waits) > idle + 3)
            # The last of each kind of turn, and of each reason, may be told of before their rest.
            assert len(logs) <= len(waits) - rested + 3 + 2
            assert set(waits[idle:]) == {one._interval_s}
            ended = [line for line in logs if line["event"] == "dispatcher.ended"]
            assert len(ended) == len({line["reason"] for line in ended})
            assert max(line["dispatchers"] for line in ended) == 8
            async with _server(tmp_path / "data") as server:
                link.symlink_to(server.socket)
                await until(lambda: held(one) == 8)
                await until(lambda: set(journal.returned) == set(site.admitted))
                await until(lambda: site.pending() == 0)
                await site.stop(one)

    check(journal.entries, site.admitted)


async def test_a_redis_that_comes_back_empty_is_worked_again(
    site: Site, connections: Connections
) -> None:
    """After Redis forgot everything, groups and leases are made anew without a restart."""
    journal = Journal()
    one = site.start(connections, {"log": journal.handler()})
    await until(lambda: held(one) == 8)
    site.client.flushall()
    site.admit(30)
    await until(lambda: len(journal.returned) == 30)
    check(journal.entries, site.admitted)


async def test_a_layout_that_redis_has_lost_is_claimed_anew(
    site: Site, connections: Connections
) -> None:
    """A worker keeps the layout its own, so that no process with another one begins beside it."""
    one = site.start(connections, {"log": Journal().handler()})
    await until(lambda: held(one) == 8)
    site.client.flushall()
    await until(lambda: site.client.hget(site.keys.layout, "partitions") == b"8")


async def test_another_layout_ends_the_worker(site: Site, connections: Connections) -> None:
    """Where another layout has been claimed meanwhile the worker leaves, and says why."""
    one = site.start(connections, {"log": Journal().handler()})
    await until(lambda: held(one) == 8)
    site.client.hset(site.keys.layout, "partitions", 16)
    task, _ = site._tasks.pop(one)
    with pytest.raises(ConfigError, match="PARTITIONS is 8"):
        await asyncio.wait_for(task, PATIENCE_S)
    assert site.leases() == 0


async def test_sigkill_loses_nothing(
    site: Site, children: Callable[..., subprocess.Popen[bytes]], journal: FileJournal
) -> None:
    """A process killed in the middle of its calls leaves everything to its successor."""
    first = children("first", held_from=4, ttl_s=TTL_S)
    site.admit(60, 6)
    await until(lambda: len(set(journal.calls("first"))) == 60 * 4)
    children("second", ttl_s=TTL_S)
    first.kill()
    await until(lambda: set(journal.returns()) == set(site.admitted))
    await until(lambda: site.pending() == 0)

    check(journal.calls(), site.admitted)
    assert not site.dead()


async def test_a_paused_process_settles_nothing_that_is_not_its_own(
    site: Site, children: Callable[..., subprocess.Popen[bytes]], journal: FileJournal
) -> None:
    """A process stopped for longer than its lease and woken again disturbs nobody's order."""
    first = children("first", held_from=3, ttl_s=TTL_S)
    site.admit(40, 6)
    await until(lambda: len(set(journal.calls("first"))) == 40 * 3)
    with frozen(first.pid):
        children("second", held_from=5, ttl_s=TTL_S)
        await until(lambda: len(set(journal.returns("second"))) == 40 * 2)
        assert len(set(journal.calls("first")) - set(journal.returns("first"))) == 40
        assert site.pending() >= 40
        # As soon as it wakes, all its calls return.
        journal.let_go("first")
    await until(lambda: site.client.zcard(site.keys.workers("log")) == 2)
    assert site.pending() >= 40
    site.admit(40, 5)
    journal.let_go("second")
    await until(
        lambda: set(journal.returns("second")) | set(journal.returns("first")) == set(site.admitted)
    )
    await until(lambda: site.pending() == 0)

    check(journal.calls(), site.admitted)
    assert not site.dead()


async def test_sigterm_finishes_what_is_in_hand(
    site: Site, children: Callable[..., subprocess.Popen[bytes]], journal: FileJournal
) -> None:
    """A process told to end finishes its calls, settles, exits with 0 and is followed at once."""
    first = children("first", held_from=2)
    site.admit(60, 3)
    await until(lambda: len(journal.calls()) == 120)
    children("second")
    await until(lambda: site.client.zcard(site.keys.workers("log")) == 2)
    first.send_signal(signal.SIGTERM)
    await until(lambda: site.client.zcard(site.keys.workers("log")) == 1)
    journal.let_go("first")
    status = await asyncio.to_thread(first.wait, PATIENCE_S)
    # Nobody waits for a lease to run out: it would be for longer than we do.
    await until(lambda: site.leases() == 8)
    await until(lambda: set(journal.returns()) == set(site.admitted))
    await until(lambda: site.pending() == 0)

    assert status == 0
    assert sorted(journal.calls("first")) == sorted(journal.returns("first"))
    assert len(journal.calls()) == len(site.admitted), "no delivery is repeated"
    check(journal.calls(), site.admitted)


async def test_an_entry_that_kills_is_buried_and_innocents_are_not(
    site: Site, children: Callable[..., subprocess.Popen[bytes]], journal: FileJournal
) -> None:
    """An entry whose every call kills the process is buried; all others are delivered."""
    site.admit(20, 3)
    site.admit(1, name="vs_killer")
    site.admit(20, 3)
    good = [one for one in site.admitted if not one[0].startswith("vs_killer")]
    deaths = 0
    child = children("w0")

    def is_over() -> bool:
        nonlocal deaths, child
        if child.poll() is not None:
            deaths += 1
            assert deaths <= MAX_DELIVERIES_WITHOUT_OUTCOME
            # A process manager would start it again; its leases are freed to save the test time.
            site.client.delete(*(site.keys.lease(p, "log") for p in range(8)))
            site.client.delete(site.keys.workers("log"))
            child = children(f"w{deaths}")
        return site.pending() == 0 and set(good) <= set(journal.returns())

    await until(is_over, deadline_s=4 * PATIENCE_S)

    check([one for one in journal.calls() if one in set(good)], good)
    assert site.dead() == [("vs_killer0", DeadLetterReason.KILLED_WORKER)]
    assert deaths == MAX_DELIVERIES_WITHOUT_OUTCOME
