"""For tests of workers with a real Redis: what they are given, what they do with it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import redis

from service.config import Settings
from service.delivery.sources import source_of
from service.delivery.worker import Worker
from service.handlers import AnyHandler, Handler
from service.storage.connections import Connections
from service.storage.keys import Keys
from service.transitions.transition import StatusTransition
from tests.support.transitions import stored_entry
from tests.support.waiting import PATIENCE_S, until

# For tests in which leases expire. In all others they are held for longer than a test takes.
TTL_S = 1.0
INTERVAL_S = 0.1
SETTINGS = {
    "lease_ttl_s": 10 * PATIENCE_S,
    "shutdown_grace_s": PATIENCE_S,
    "retry_initial_delay_s": 0.02,
    "retry_max_delay_s": 0.1,
    "handler_timeout_s": 10 * PATIENCE_S,
}

# A session and a sequence.
Entry = tuple[str, int]


class CallLog:
    """The calls of handlers in this process.

    Attributes:
        transitions: The transition of each call, in their order.
        calls: The same as entries.
        returns: The entries whose calls have returned, in that order.
    """

    def __init__(self) -> None:
        self.transitions: list[StatusTransition] = []
        self.calls: list[Entry] = []
        self.returns: list[Entry] = []

    def handler(self, act: Callable[[Entry], Awaitable[object]] | None = None) -> Handler:
        """Return a handler that records its calls here."""

        async def handle(transition: StatusTransition) -> None:
            one = (transition.session_id, transition.sequence)
            self.transitions.append(transition)
            self.calls.append(one)
            if act is not None:
                await act(one)
            self.returns.append(one)

        return handle


def check_order(calls: Sequence[Entry], admitted: Sequence[Entry]) -> None:
    """Assert that nothing was lost, and first deliveries were in order."""
    last: dict[str, int] = defaultdict(int)
    for session, sequence in calls:
        assert sequence <= last[session] + 1, f"{session} {sequence} came too early"
        last[session] = max(last[session], sequence)
    assert set(calls) == set(admitted)


def held(worker: Worker, handler: str = "log") -> int:
    """Return how many partitions a worker holds."""
    return len(worker._held(handler))


class Deployment:
    """One Redis with admitted transitions, and the workers started in this process.

    Attributes:
        admitted: All entries, in order.
    """

    def __init__(self, settings: Settings, client: redis.Redis, connections: Connections) -> None:
        self.settings = settings
        self.connections = connections
        self.keys = Keys(settings.redis_prefix, settings.partitions)
        self.client: Any = client
        self.admitted: list[Entry] = []
        self._workers: dict[Worker, tuple[asyncio.Task[None], asyncio.Event]] = {}

    def admit(self, sessions: int, each: int = 1, *, name: str = "vs_s") -> list[Entry]:
        """Append the next *each* transitions of some sessions to the streams, interleaved."""
        before = Counter(session for session, _ in self.admitted)
        entries = [
            (session, before[session] + n)
            for n in range(1, each + 1)
            for session in (f"{name}{i}" for i in range(sessions))
        ]
        with self.client.pipeline(transaction=False) as pipeline:
            for session, n in entries:
                stream = self.keys.transitions(self.keys.partition(session))
                pipeline.xadd(stream, stored_entry(session, n))
            pipeline.execute()
        self.admitted += entries
        return entries

    def pending(self, handler: str = "log") -> int:
        """Return how many entries are pending, in all partitions."""
        total = 0
        for partition in range(self.keys.partitions):
            with contextlib.suppress(redis.ResponseError):
                stream = source_of(handler).stream(self.keys, partition)
                total += self.client.xpending(stream, handler)["pending"]
        return total

    def dead_letters(self, handler: str = "log") -> list[tuple[str, str]]:
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

    def lease_keys(self, handler: str = "log") -> list[str]:
        """Return the keys of a handler's leases."""
        return [self.keys.lease(partition, handler) for partition in range(self.keys.partitions)]

    def leases(self) -> int:
        """Return how many leases are held."""
        return int(self.client.exists(*self.lease_keys()))

    def live_workers(self) -> int:
        """Return how many workers have a heartbeat."""
        return int(self.client.zcard(self.keys.workers("log")))

    def start(self, handlers: Mapping[str, AnyHandler], **changes: Any) -> Worker:
        """Start a worker."""
        settings = replace(self.settings, **changes)
        worker = Worker(self.connections, self.keys, settings, handlers)
        stopping = asyncio.Event()
        self._workers[worker] = (asyncio.create_task(worker.run(stopping)), stopping)
        return worker

    async def hold_all(self, worker: Worker) -> None:
        """Wait until a worker holds all partitions."""
        await until(lambda: held(worker) == self.keys.partitions)

    async def deliver_all(self, returns: Callable[[], Sequence[Entry]]) -> None:
        """Wait until all calls have returned and all entries are acknowledged."""
        await until(lambda: set(returns()) == set(self.admitted))
        await until(lambda: self.pending() == 0)

    async def stop(self, worker: Worker) -> None:
        """Stop a worker as SIGTERM would, and wait until it has ended."""
        task, stopping = self._workers.pop(worker)
        stopping.set()
        await task

    async def until_ended(self, worker: Worker) -> None:
        """Wait until a worker ends by itself."""
        task, _ = self._workers.pop(worker)
        await asyncio.wait_for(task, PATIENCE_S)

    async def renew_while_stopping(self, worker: Worker) -> None:
        """Wait until a worker that is stopping has renewed the leases it still needs."""
        tasks = worker._partition_tasks
        await until(lambda: all(task.is_stopping for task in tasks.values()))
        leases = [
            self.keys.lease(partition, handler)
            for (handler, partition), task in tasks.items()
            if task.dispatcher._backlog.sessions
        ]
        for lease in leases:
            self.client.pexpire(lease, 100_000)
        await until(lambda: min(map(self.client.pttl, leases)) > 200_000)

    def kill(self, worker: Worker) -> None:
        """End a worker as SIGKILL would: it writes nothing more to Redis."""
        task, stopping = self._workers.pop(worker)
        # The client of Redis may swallow the cancellation.
        stopping.set()
        for partition_task in worker._partition_tasks.values():
            partition_task.lease.release = _do_nothing  # type: ignore[method-assign]
            partition_task.abandon()
        worker._shut_down = _do_nothing  # type: ignore[method-assign]
        task.cancel()

    async def close(self) -> None:
        """Stop all workers."""
        for worker in list(self._workers):
            await self.stop(worker)


async def _do_nothing() -> None:
    pass
