"""Who works what: leases, fair shares, and one dispatcher for each lease held.

Every worker announces itself per handler and takes at most its share of the partitions; leases
of the dead run out and are taken by the living. What is done under a lease is `dispatch`'s.

Three tasks take turns, each for itself. Leases are renewed in one round trip and by nothing that
waits for anything else: late by a few seconds they are lost, and with them all that is in hand.
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
from collections.abc import Awaitable, Callable, Collection, Mapping

import structlog
from redis.exceptions import RedisError

from .. import cancellation
from ..config import Settings
from ..errors import UnavailableReason
from ..handlers import Handler
from ..storage.batching import ScriptBatcher
from ..storage.connections import Connections
from ..storage.layout import Keys, claim, is_claimed
from ..storage.redis_errors import unavailable_reason
from ..telemetry import metrics
from .consumer import Assignment, Consumer, LeaseLostError
from .consumer_groups import create_groups
from .dispatcher import Dispatcher
from .failure_log import FailureLog
from .leases import Heartbeats, LeaseWatch, lease
from .maintenance import PartitionMaintenance
from .retries import CircuitBreakers, RetryPolicy
from .stream_watcher import StreamWatcher

RENEWALS_PER_TTL = 3
# So soon a lease that was given up is found by who may take it.
MAX_INTERVAL_S = 1.0
MIN_INTERVAL_S = 0.02
# A silent worker stops counting a little before its leases run out, so nobody waits for both.
HEARTBEAT_TTL_FRACTION = 2 / 3
MAX_RESTART_DELAY_S = 1.0
# What is canceled at the end of the grace time may still say goodbye.
CANCEL_GRACE_S = 2.0

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Worker:
    """Works its share of all partitions for some handlers, until stopped.

    Args:
        connections: Open clients.
        keys: The layout.
        settings: Retry policy, lease time, and the names of all handlers of the deployment.
        handlers: The open handlers this worker works for: some or all of those names.
    """

    def __init__(
        self,
        connections: Connections,
        keys: Keys,
        settings: Settings,
        handlers: Mapping[str, Handler],
    ) -> None:
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.failure_log = FailureLog()
        self._connections = connections
        self._batches = ScriptBatcher(connections)
        self._keys = keys
        self._settings = settings
        self._handlers = handlers
        self._quarantine = asyncio.Lock()
        self._circuits = {
            handler: CircuitBreakers(handler, initial_delay_s=settings.retry_initial_delay_s)
            for handler in handlers
        }
        self._maintenance = PartitionMaintenance(
            connections, keys, settings, self.name, self._circuits
        )
        self._stream_watchers = [StreamWatcher(connections, p) for p in range(keys.partitions)]
        self._partition_tasks: dict[Assignment, _PartitionTask] = {}
        self._interval_s = min(MAX_INTERVAL_S, settings.lease_ttl_s / RENEWALS_PER_TTL)
        self._watch = LeaseWatch(settings.lease_ttl_s)
        self._heartbeats = Heartbeats(
            connections,
            keys,
            worker=self.name,
            ttl_s=settings.lease_ttl_s * HEARTBEAT_TTL_FRACTION,
        )

    async def run(self, stopping: asyncio.Event) -> None:
        """Work until *stopping* is set; then settle what is in hand and give everything up."""
        turns = [
            asyncio.create_task(self._repeat(turn, stopping))
            for turn in (self._renew, self._rebalance, self._maintain)
        ]
        try:
            await asyncio.gather(*turns)
        finally:
            for turn in turns:
                await cancellation.cancel_and_wait(turn)
            await self._shut_down()

    async def _repeat(self, turn: Callable[[], Awaitable[float]], stopping: asyncio.Event) -> None:
        """Take one turn after the other; each says in how many seconds the next one is due."""
        while not stopping.is_set():
            pause_s = self._interval_s
            try:
                pause_s = await turn()
            except (RedisError, OSError) as error:
                metrics.REDIS_ERRORS.labels(unavailable_reason(error)).inc()
                log.warning("worker.rebalance_failed", reason=unavailable_reason(error))
            await _wait(stopping, max(MIN_INTERVAL_S, pause_s))

    async def _renew(self) -> float:
        """Renew every lease; drop what is done under one that is not ours any more."""
        tenures = [tenure for tenure in self._partition_tasks.values() if not tenure.abandoned]
        waits: list[float | Exception] = []
        if tenures:
            consumers = [tenure.consumer for tenure in tenures]
            waits = await lease(self._connections, consumers, self._settings.lease_ttl_s)
            for tenure in tenures:
                if not tenure.consumer.is_ours():
                    tenure.abandon()
        for handler in self._handlers:
            metrics.LEASES_HELD.labels(handler).set(len(self._held(handler)))
            dispatchers = [
                one.dispatcher for (h, _), one in self._partition_tasks.items() if h == handler
            ]
            metrics.PARKED_ENTRIES.labels(handler).set(sum(one.parked for one in dispatchers))
            metrics.READING_PAUSED.labels(handler).set(sum(one.is_full for one in dispatchers))
        _raise_first(waits)
        return self._interval_s

    async def _rebalance(self) -> float:
        """Say that we live, and take and give up leases until we hold our share."""
        await self._watch_layout()
        living = await self._heartbeats.beat([*self._handlers])
        return min([await self._rebalance_handler(each, living[each]) for each in self._handlers])

    async def _watch_layout(self) -> None:
        """Claim the layout anew where Redis has lost it.

        Raises:
            ConfigError: Another process has claimed another layout since: this one has to end.
        """
        if not await is_claimed(self._connections, self._keys):
            await claim(self._connections, self._keys)

    async def _maintain(self) -> float:
        """Measure, trim, and tell of what is wrong."""
        await self._maintenance.run_due([*self._partition_tasks])
        return self._interval_s

    async def _rebalance_handler(self, handler: str, living: int) -> float:
        """Hold our count of one handler's partitions; return the seconds until the next look."""
        share = math.ceil(self._keys.partitions / max(1, living))
        held = self._held(handler)
        for tenure in held[share:]:
            tenure.stop()
        return await self._take(handler, share - len(held))

    async def _take(self, handler: str, most: int) -> float:
        """Take up to *most* free partitions; return the seconds until another may be free."""
        free = [
            p for p in range(self._keys.partitions) if (handler, p) not in self._partition_tasks
        ]
        # Workers that start together should not all reach for the same partition first.
        random.shuffle(free)
        soonest_s = self._interval_s
        while free and most > 0:
            tried = [self._consumer(handler, free.pop()) for _ in range(min(most, len(free)))]
            owners = [self._watch.owner(consumer.assignment) for consumer in tried]
            waits = await lease(self._connections, tried, self._settings.lease_ttl_s, self._watch)
            taken = [i for i, wait_s in enumerate(waits) if wait_s == 0]
            most -= len(taken)
            for i in taken:
                self._begin(tried[i])
            for owner, count in Counter(owners[i] for i in taken if owners[i]).items():
                log.info("partitions.taken_over", handler=handler, partitions=count, worker=owner)
            _raise_first(waits)
            soonest_s = min([soonest_s, *(w for w in waits if isinstance(w, float) and w)])
        return soonest_s

    def _consumer(self, handler: str, partition: int) -> Consumer:
        return Consumer(
            self._batches,
            self._keys,
            self._stream_watchers[partition],
            handler=handler,
            worker=self.name,
            replicas=self._settings.durability.replicas,
        )

    def _begin(self, consumer: Consumer) -> None:
        self._partition_tasks[consumer.assignment] = tenure = _PartitionTask(self, consumer)
        tenure.task.add_done_callback(lambda _: self._partition_tasks.pop(consumer.assignment))

    def dispatcher(self, consumer: Consumer) -> Dispatcher:
        """Return a fresh dispatcher for a consumer."""
        settings = self._settings
        policy = RetryPolicy(
            concurrency=settings.handler_concurrency,
            timeout_s=settings.handler_timeout_s,
            initial_delay_s=settings.retry_initial_delay_s,
            max_delay_s=settings.retry_max_delay_s,
            max_attempts=settings.retry_max_attempts,
        )
        return Dispatcher(
            consumer.handler,
            self._handlers[consumer.handler],
            consumer,
            policy,
            circuits=self._circuits[consumer.handler],
            quarantine=self._quarantine,
        )

    async def create_groups(self) -> None:
        """Create the groups again, if an operator deleted a stream."""
        for handler in await create_groups(self._connections, self._keys, self._settings.handlers):
            log.warning("group.created", handler=handler)

    def _held(self, handler: str) -> list[_PartitionTask]:
        return [
            tenure
            for (name, _), tenure in self._partition_tasks.items()
            if name == handler and not tenure.is_stopping
        ]

    async def _shut_down(self) -> None:
        """Say goodbye, finish within the grace time, and give everything up."""
        for tenure in self._partition_tasks.values():
            tenure.stop()
        with contextlib.suppress(RedisError, OSError):
            # First, so that the others take over each lease as soon as it is free.
            await self._heartbeats.end([*self._handlers])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.shutdown_grace_s):
                while self._partition_tasks:
                    await self._until_ended(self._interval_s)
                    with contextlib.suppress(RedisError, OSError):
                        await self._renew()
        for tenure in self._partition_tasks.values():
            tenure.abandon()
        await self._until_ended(CANCEL_GRACE_S)
        for handler, partition in self._partition_tasks:
            log.error("handler.stuck", handler=handler, partition=partition)
        for stream_watcher in self._stream_watchers:
            await stream_watcher.close()
        self.failure_log.flush()

    async def _until_ended(self, most_s: float) -> None:
        if self._partition_tasks:
            await asyncio.wait(
                [tenure.task for tenure in self._partition_tasks.values()], timeout=most_s
            )


class _PartitionTask:
    """One lease held, and the work done under it."""

    def __init__(self, worker: Worker, consumer: Consumer) -> None:
        self.consumer = consumer
        self.abandoned = False
        self._worker = worker
        self._stopping = asyncio.Event()
        self._dispatcher = worker.dispatcher(consumer)
        self.task = asyncio.create_task(self._serve())

    @property
    def is_stopping(self) -> bool:
        """Whether this is about to end."""
        return self._stopping.is_set()

    @property
    def dispatcher(self) -> Dispatcher:
        """What works under this lease at present."""
        return self._dispatcher

    def stop(self) -> None:
        """Finish what is started, then give the lease up."""
        self._stopping.set()
        self._dispatcher.stop()

    def abandon(self) -> None:
        """Drop everything: the lease is somebody else's, or time is up."""
        if not self.abandoned:
            self.abandoned = True
            self.stop()
            self.task.cancel()

    async def _serve(self) -> None:
        """Dispatch while the lease holds; after any error begin again from taking over."""
        try:
            while self.consumer.is_ours() and not self.is_stopping:
                await self._dispatch_once()
        finally:
            with contextlib.suppress(RedisError, OSError):
                await self.consumer.release()

    async def _dispatch_once(self) -> None:
        reason = ""
        try:
            # A task of its own: before Python 3.13 a task group may leave its task half canceled.
            await asyncio.create_task(self._dispatcher.run())
        except* LeaseLostError:
            self.consumer.lost()
            reason = "lease_lost"
        except* (RedisError, OSError) as group:
            reason = unavailable_reason(group.exceptions[0])
        except* Exception:
            reason = "unforeseen"
            handler, partition = self.consumer.assignment
            log.exception("dispatcher.failed", handler=handler, partition=partition)
        if reason:
            self._worker.failure_log.record(reason, self.consumer.assignment)
            await self._recover(reason)

    async def _recover(self, reason: str) -> None:
        """Rest a little, in case the lease is still ours, and make ready to begin again."""
        if not self.consumer.is_ours():
            return
        await _wait(self._stopping, random.uniform(0, MAX_RESTART_DELAY_S))  # noqa: S311 - jitter
        if reason == UnavailableReason.REDIS_REFUSED:
            with contextlib.suppress(RedisError, OSError):
                await self._worker.create_groups()
        if not self.is_stopping:
            self._dispatcher = self._worker.dispatcher(self.consumer)


def _raise_first(waits: Collection[float | Exception]) -> None:
    for wait_s in waits:
        if isinstance(wait_s, Exception):
            raise wait_s


async def _wait(event: asyncio.Event, most_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(most_s):
            await event.wait()
