"""Which partitions this process works on: leases, heartbeats, fair shares, shutting down.

For each handler, every worker writes heartbeats and takes at most its share of the partitions:

    share = partitions / live workers, rounded up

A worker that holds more than its share releases the rest; one that holds less takes leases that
are free. The leases of a dead worker expire and are taken by the live ones. A `PartitionTask`
does the work on a partition under its lease.

Three tasks run periodically, each on its own:

    renew leases    in one round trip, and waiting for nothing else: a lease that is renewed a few
                    seconds late is lost, and with it the work in hand
    rebalance       heartbeat, count the live workers, take and release leases
    maintain        measure and trim (`maintenance`)
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import secrets
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

import structlog
from redis.exceptions import RedisError

from .. import cancellation
from ..config import Settings
from ..handlers import AnyHandler
from ..parsers import FETCH
from ..storage.batching import ScriptBatcher
from ..storage.connections import Connections
from ..storage.keys import Keys
from ..storage.layout import claim, is_claimed
from ..storage.redis_errors import unavailable_reason
from ..storage.scripts import raise_first
from ..telemetry import metrics
from .consumer import Consumer
from .consumer_groups import create_groups
from .dispatcher import Dispatcher
from .failure_log import FailureLog
from .leases import Assignment, Heartbeats, Lease, ObservedLeases, take_or_renew
from .maintenance import PartitionMaintenance
from .partition_task import PartitionTask
from .retries import CircuitBreakers, RetryPolicy
from .sources import source_of
from .stream_watcher import StreamWatcher

RENEWALS_PER_TTL = 3
# The longest time for which a released lease is not noticed by workers that may take it.
MAX_INTERVAL_S = 1.0
MIN_INTERVAL_S = 0.02
# Heartbeats expire a little before leases do: when the leases of a dead worker are free, the others
# no longer count it and their shares have grown.
HEARTBEAT_TTL_FRACTION = 2 / 3
# For handlers that clean up when they are canceled at the end of the grace time.
CANCEL_GRACE_S = 2.0
# Calls of `fetch` wait for each other, so that one page of Stripe's events answers many of them.
FETCH_CONCURRENCY = 64
FETCH_TIMEOUT_S = 120.0

# Regular work; returns in how many seconds it is due again.
Step: TypeAlias = Callable[[], Awaitable[float]]

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Worker:
    """Works on its share of all partitions for some handlers, until stopped.

    Args:
        connections: Open clients.
        keys: The layout.
        settings: Retry policy, lease time, and the names of all handlers of the deployment.
        handlers: The open handlers that this worker runs: some or all of those names.
    """

    def __init__(
        self,
        connections: Connections,
        keys: Keys,
        settings: Settings,
        handlers: Mapping[str, AnyHandler],
    ) -> None:
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._connections = connections
        self._batches = ScriptBatcher(connections)
        self._keys = keys
        self._settings = settings
        self._handlers = handlers
        self._quarantine = asyncio.Lock()
        self._failure_log = FailureLog()
        self._circuits = {
            handler: CircuitBreakers(handler, initial_delay_s=settings.retry_initial_delay_s)
            for handler in handlers
        }
        self._maintenance = PartitionMaintenance(
            connections, keys, settings, self.name, self._circuits
        )
        self._stream_watchers: dict[str, StreamWatcher] = {}
        self._partition_tasks: dict[Assignment, PartitionTask] = {}
        self._failing_steps: set[Step] = set()
        self._logged_failures: set[str] = set()
        self._interval_s = min(MAX_INTERVAL_S, settings.lease_ttl_s / RENEWALS_PER_TTL)
        self._observed_leases = ObservedLeases(settings.lease_ttl_s)
        self._heartbeats = Heartbeats(
            connections,
            keys,
            worker=self.name,
            ttl_s=settings.lease_ttl_s * HEARTBEAT_TTL_FRACTION,
        )

    async def run(self, stopping: asyncio.Event) -> None:
        """Work until *stopping* is set; then shut down."""
        periodic = [
            asyncio.create_task(self._repeat(step, stopping))
            for step in (self._renew_leases, self._rebalance, self._maintain)
        ]
        try:
            await asyncio.gather(*periodic)
        finally:
            for task in periodic:
                await cancellation.cancel_and_wait(task)
            await self._shut_down()

    async def _repeat(self, step: Step, stopping: asyncio.Event) -> None:
        """Repeat a step."""
        while not stopping.is_set():
            interval_s = self._interval_s
            try:
                interval_s = await step()
                self._note_success(step)
            except (RedisError, OSError) as error:
                self._note_failure(step, unavailable_reason(error))
            await _wait(stopping, max(MIN_INTERVAL_S, interval_s))

    def _note_failure(self, step: Step, reason: str) -> None:
        """Count a failure; log each reason once, until all steps succeed again."""
        metrics.REDIS_ERRORS.labels(reason).inc()
        self._failing_steps.add(step)
        if reason not in self._logged_failures:
            self._logged_failures.add(reason)
            log.warning("worker.rebalance_failed", reason=reason)

    def _note_success(self, step: Step) -> None:
        self._failing_steps.discard(step)
        if self._logged_failures and not self._failing_steps:
            self._logged_failures.clear()
            log.info("worker.rebalance_recovered")

    async def _renew_leases(self) -> float:
        """Renew every lease, abandon the work under those that are lost, and set the gauges."""
        held = [task for task in self._partition_tasks.values() if not task.is_abandoned]
        waits: list[float | Exception] = []
        if held:
            leases = [task.lease for task in held]
            waits = await take_or_renew(self._connections, leases, self._settings.lease_ttl_s)
            for task in held:
                if not task.lease.is_held():
                    task.abandon()
        self._set_gauges()
        raise_first(waits)
        return self._interval_s

    def _set_gauges(self) -> None:
        for handler in self._handlers:
            tasks = [task for (name, _), task in self._partition_tasks.items() if name == handler]
            parked = sum(task.dispatcher.parked for task in tasks)
            paused = sum(task.dispatcher.is_reading_paused for task in tasks)
            metrics.LEASES_HELD.labels(handler).set(len(self._held(handler)))
            metrics.PARKED_ENTRIES.labels(handler).set(parked)
            metrics.READING_PAUSED.labels(handler).set(paused)

    async def _rebalance(self) -> float:
        """Write heartbeats, then take and release leases until each handler's share is held."""
        await self._restore_layout()
        live_workers = await self._heartbeats.send([*self._handlers])
        return min([await self._hold_share(each, live_workers[each]) for each in self._handlers])

    async def _restore_layout(self) -> None:
        """Claim the layout again, if Redis has lost it.

        Raises:
            ConfigError: Another process has claimed another layout since: this one has to end.
        """
        if not await is_claimed(self._connections, self._keys):
            await claim(self._connections, self._keys)

    async def _hold_share(self, handler: str, live_workers: int) -> float:
        """Hold the share of one handler's partitions; return the seconds until the next check."""
        share = math.ceil(self._keys.partitions / max(1, live_workers))
        held = self._held(handler)
        for task in held[share:]:
            task.stop()
        return await self._take_leases(handler, share - len(held))

    async def _take_leases(self, handler: str, wanted: int) -> float:
        """Take up to *wanted* leases; return the seconds until another one may be free."""
        candidates = [
            p for p in range(self._keys.partitions) if (handler, p) not in self._partition_tasks
        ]
        # Workers that start together should not all try the same partition first.
        random.shuffle(candidates)
        next_check_s = self._interval_s
        while candidates and wanted > 0:
            count = min(wanted, len(candidates))
            tried = [self._new_lease(handler, candidates.pop()) for _ in range(count)]
            # Whose leases they were: those of a dead worker are taken from it.
            owners = [self._observed_leases.owner(lease.assignment) for lease in tried]
            waits = await take_or_renew(
                self._connections, tried, self._settings.lease_ttl_s, self._observed_leases
            )
            taken = [i for i, wait_s in enumerate(waits) if wait_s == 0]
            wanted -= len(taken)
            for i in taken:
                self._start(tried[i])
            for owner, partitions in Counter(owners[i] for i in taken if owners[i]).items():
                log.info(
                    "partitions.taken_over", handler=handler, partitions=partitions, worker=owner
                )
            raise_first(waits)
            next_check_s = min([next_check_s, *(w for w in waits if isinstance(w, float) and w)])
        return next_check_s

    async def _maintain(self) -> float:
        """Measure, publish and trim."""
        await self._maintenance.run_due([*self._partition_tasks])
        return self._interval_s

    def _new_lease(self, handler: str, partition: int) -> Lease:
        return Lease(
            self._batches, self._keys, handler=handler, partition=partition, worker=self.name
        )

    def _start(self, lease: Lease) -> None:
        """Start the work on a partition whose lease has just been taken."""
        started = PartitionTask(lease, self._new_dispatcher, self._create_groups, self._failure_log)
        self._partition_tasks[lease.assignment] = started
        started.task.add_done_callback(lambda _: self._partition_tasks.pop(lease.assignment))

    def _new_dispatcher(self, lease: Lease) -> Dispatcher:
        """Return a fresh dispatcher, with a consumer of its own, that works under a lease."""
        stream = source_of(lease.handler).stream(self._keys, lease.partition)
        stream_watcher = self._stream_watchers.setdefault(stream, StreamWatcher(self._connections))
        replicas = self._settings.durability.replicas
        consumer = Consumer(lease, self._keys, stream_watcher, replicas=replicas)
        return Dispatcher(
            lease.handler,
            self._handlers[lease.handler],
            consumer,
            _policy(lease.handler, self._settings),
            circuits=self._circuits[lease.handler],
            quarantine=self._quarantine,
        )

    async def _create_groups(self) -> None:
        """Create the consumer groups again, if an operator has deleted a stream."""
        names = self._settings.all_handlers
        for handler in await create_groups(self._connections, self._keys, names):
            log.warning("group.created", handler=handler)

    def _held(self, handler: str) -> list[PartitionTask]:
        """Return the tasks of a handler's partitions that are not about to end."""
        return [
            task
            for (name, _), task in self._partition_tasks.items()
            if name == handler and not task.is_stopping
        ]

    async def _shut_down(self) -> None:
        """Finish the calls that have begun within the grace time, and release all leases."""
        for task in self._partition_tasks.values():
            task.stop()
        with contextlib.suppress(RedisError, OSError):
            # First, so that other workers' shares grow and they take each lease once it is free.
            await self._heartbeats.remove([*self._handlers])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.shutdown_grace_s):
                while self._partition_tasks:
                    await self._wait_for_tasks(self._interval_s)
                    with contextlib.suppress(RedisError, OSError):
                        await self._renew_leases()
        for task in self._partition_tasks.values():
            task.abandon()
        await self._wait_for_tasks(CANCEL_GRACE_S)
        for handler, partition in self._partition_tasks:
            log.error("handler.stuck", handler=handler, partition=partition)
        for stream_watcher in self._stream_watchers.values():
            await stream_watcher.close()
        self._failure_log.flush()

    async def _wait_for_tasks(self, timeout_s: float) -> None:
        """Wait until all partition tasks have ended, or for *timeout_s*."""
        if self._partition_tasks:
            tasks = [each.task for each in self._partition_tasks.values()]
            await asyncio.wait(tasks, timeout=timeout_s)


def _policy(handler: str, settings: Settings) -> RetryPolicy:
    """Return the retry policy of a handler."""
    is_fetch = handler == FETCH
    return RetryPolicy(
        concurrency=FETCH_CONCURRENCY if is_fetch else settings.handler_concurrency,
        timeout_s=FETCH_TIMEOUT_S if is_fetch else settings.handler_timeout_s,
        initial_delay_s=settings.retry_initial_delay_s,
        max_delay_s=settings.retry_max_delay_s,
        max_attempts=settings.retry_max_attempts,
    )


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
