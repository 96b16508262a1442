"""Who works what: leases, fair shares, and one dispatcher for each lease held.

Every worker announces itself per handler and takes at most its share of the partitions; leases
of the dead run out and are taken by the living. What is done under a lease is `dispatch`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import secrets
import socket
from collections.abc import Mapping

import structlog
from redis.exceptions import RedisError

from . import metrics
from .arrivals import Arrivals
from .circuit import Circuit
from .config import DAY_S, Settings
from .connections import Connections, shortage
from .dispatch import Dispatcher
from .errors import Shortage
from .handlers import Handler
from .janitor import Janitor
from .lag import Lag, lags
from .layout import Keys, exists, guard, open_groups
from .mailbox import LeaseLostError, Mailbox, announce, lease
from .retries import RetryPolicy

RENEWALS_PER_TTL = 3
# So soon a lease that was given up is found by who may take it.
LONGEST_TURN_S = 1.0
SHORTEST_TURN_S = 0.02
# A silent worker stops counting a little before its leases run out, so nobody waits for both.
ANNOUNCED_PER_TTL = 2 / 3
RESTART_PAUSE_S = 1.0
MEASURE_EVERY_S = 15.0
# Told again every turn, forgotten when nobody tells any more.
CIRCUIT_TOLD_S = 5
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
        self._connections = connections
        self._keys = keys
        self._settings = settings
        self._handlers = handlers
        self._suspects = asyncio.Lock()
        self._circuits = {
            handler: Circuit(handler, first_s=settings.retry_first_s) for handler in handlers
        }
        self._janitor = Janitor(
            connections,
            keys,
            handlers=settings.handlers,
            retention_s=settings.stream_retention_days * DAY_S,
        )
        self._arrivals = [Arrivals(connections, p) for p in range(keys.partitions)]
        self._tenures: dict[tuple[str, int], _Tenure] = {}
        self._turn_s = min(LONGEST_TURN_S, settings.lease_ttl_s / RENEWALS_PER_TTL)
        self._measured_at = float("-inf")

    async def run(self, stopping: asyncio.Event) -> None:
        """Work until *stopping* is set; then settle what is in hand and give everything up."""
        try:
            while not stopping.is_set():
                pause_s = await self._turn()
                await _wait(stopping, max(SHORTEST_TURN_S, pause_s))
        finally:
            await self._leave()

    async def _turn(self) -> float:
        """Renew, give up and take leases once; return the seconds until the next turn."""
        waits = [self._turn_s]
        try:
            await self._renew()
            await self._watch_layout()
            waits += [await self._take_share(handler) for handler in self._handlers]
            await self._measure()
            await self._janitor.tidy({partition for _, partition in self._tenures})
            await self._tell_of_circuits()
        except (RedisError, OSError) as error:
            metrics.REDIS_ERRORS.labels(shortage(error)).inc()
            log.warning("worker.turn_failed", reason=shortage(error))
        for handler in self._handlers:
            metrics.LEASES_HELD.labels(handler).set(len(self._held(handler)))
        return min(waits)

    async def _watch_layout(self) -> None:
        """Claim the layout anew where Redis has lost it.

        Raises:
            ConfigError: Another process has claimed another layout since: this one has to end.
        """
        if not await exists(self._connections, self._keys):
            await guard(self._connections, self._keys)

    async def _tell_of_circuits(self) -> None:
        """Let `check` see which queues cannot be reached from here."""
        for handler, circuit in self._circuits.items():
            if circuit.is_open:
                key = self._keys.circuit(handler)
                await self._connections.client.set(key, self.name, ex=CIRCUIT_TOLD_S)

    async def _renew(self) -> None:
        """Renew every lease; drop what is done under one that is not ours any more."""
        tenures = [tenure for tenure in self._tenures.values() if not tenure.abandoned]
        if not tenures:
            return
        mailboxes = [tenure.mailbox for tenure in tenures]
        for wait_s in await lease(self._connections, mailboxes, self._settings.lease_ttl_s):
            if isinstance(wait_s, Exception):
                metrics.REDIS_ERRORS.labels(shortage(wait_s)).inc()
        for tenure in tenures:
            if not tenure.mailbox.is_ours():
                tenure.abandon()

    async def _take_share(self, handler: str) -> float:
        """Hold our count of one handler's partitions; return the seconds until the next look."""
        living = await self._announce(handler, self._settings.lease_ttl_s * ANNOUNCED_PER_TTL)
        share = math.ceil(self._keys.partitions / max(1, living))
        held = self._held(handler)
        for tenure in held[share:]:
            tenure.stop()
        return await self._take(handler, share - len(held))

    async def _take(self, handler: str, most: int) -> float:
        """Take up to *most* free partitions; return the seconds until another may be free."""
        free = [p for p in range(self._keys.partitions) if (handler, p) not in self._tenures]
        # Workers that start together should not all reach for the same partition first.
        random.shuffle(free)
        soonest_s = self._turn_s
        while free and most > 0:
            tried = [self._mailbox(handler, free.pop()) for _ in range(min(most, len(free)))]
            waits = await lease(self._connections, tried, self._settings.lease_ttl_s)
            for mailbox, wait_s in zip(tried, waits, strict=True):
                if wait_s == 0:
                    most -= 1
                    self._begin(mailbox)
                elif not isinstance(wait_s, Exception):
                    soonest_s = min(soonest_s, wait_s)
            for wait_s in waits:
                if isinstance(wait_s, Exception):
                    raise wait_s
        return soonest_s

    def _mailbox(self, handler: str, partition: int) -> Mailbox:
        return Mailbox(
            self._connections,
            self._keys,
            self._arrivals[partition],
            handler=handler,
            worker=self.name,
            replicas=self._settings.durability.replicas,
        )

    def _begin(self, mailbox: Mailbox) -> None:
        at = (mailbox.handler, mailbox.partition)
        self._tenures[at] = tenure = _Tenure(self, mailbox)
        tenure.task.add_done_callback(lambda _: self._tenures.pop(at))

    async def _announce(self, handler: str, ttl_s: float) -> int:
        return await announce(
            self._connections, self._keys, handler=handler, worker=self.name, ttl_s=ttl_s
        )

    async def _measure(self) -> None:
        """Set the gauges of what is not settled, now and then."""
        now = asyncio.get_running_loop().time()
        if now < self._measured_at + MEASURE_EVERY_S:
            return
        self._measured_at = now
        places = [*self._tenures]
        found: dict[str, list[Lag]] = {handler: [] for handler in self._handlers}
        measured = await lags(self._connections, self._keys, places)
        for (handler, _), lag in zip(places, measured, strict=True):
            if not isinstance(lag, Exception):
                found[handler].append(lag)
        for handler, each in found.items():
            oldest_s = max((lag.oldest_s for lag in each), default=0.0)
            metrics.OLDEST_SECONDS.labels(handler).set(oldest_s)
            metrics.DEAD_LETTERS.labels(handler).set(sum(lag.dead for lag in each))
            entries = [lag.entries for lag in each if lag.entries is not None]
            # Where Redis does not know, the last it knew says more than a wrong number.
            if len(entries) == len(each):
                metrics.LAG_ENTRIES.labels(handler).set(sum(entries))

    def dispatcher(self, mailbox: Mailbox) -> Dispatcher:
        """Return a fresh dispatcher for a mailbox."""
        settings = self._settings
        policy = RetryPolicy(
            concurrency=settings.handler_concurrency,
            timeout_s=settings.handler_timeout_s,
            first_s=settings.retry_first_s,
            ceiling_s=settings.retry_ceiling_s,
            attempts=settings.retry_attempts,
        )
        return Dispatcher(
            mailbox.handler,
            self._handlers[mailbox.handler],
            mailbox,
            policy,
            circuit=self._circuits[mailbox.handler],
            suspects=self._suspects,
        )

    async def open_groups(self) -> None:
        """Create the groups again, if an operator deleted a stream."""
        for handler in await open_groups(self._connections, self._keys, self._settings.handlers):
            log.warning("group.created", handler=handler)

    def _held(self, handler: str) -> list[_Tenure]:
        return [
            tenure
            for (name, _), tenure in self._tenures.items()
            if name == handler and not tenure.is_stopping
        ]

    async def _leave(self) -> None:
        """Say goodbye, finish within the grace time, and give everything up."""
        for tenure in self._tenures.values():
            tenure.stop()
        with contextlib.suppress(RedisError, OSError):
            # First, so that the others take over each lease as soon as it is free.
            for handler in self._handlers:
                await self._announce(handler, 0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.shutdown_grace_s):
                while self._tenures:
                    await self._until_ended(self._turn_s)
                    await self._renew()
        for tenure in self._tenures.values():
            tenure.abandon()
        await self._until_ended(CANCEL_GRACE_S)
        for handler, partition in self._tenures:
            log.error("handler.stuck", handler=handler, partition=partition)
        for arrivals in self._arrivals:
            await arrivals.close()

    async def _until_ended(self, most_s: float) -> None:
        if self._tenures:
            await asyncio.wait([tenure.task for tenure in self._tenures.values()], timeout=most_s)


class _Tenure:
    """One lease held, and the work done under it."""

    def __init__(self, worker: Worker, mailbox: Mailbox) -> None:
        self.mailbox = mailbox
        self.abandoned = False
        self._worker = worker
        self._stopping = asyncio.Event()
        self._dispatcher = worker.dispatcher(mailbox)
        self.task = asyncio.create_task(self._serve())

    @property
    def is_stopping(self) -> bool:
        """Whether this is about to end."""
        return self._stopping.is_set()

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
            while self.mailbox.is_ours() and not self.is_stopping:
                await self._dispatch_once()
        finally:
            with contextlib.suppress(RedisError, OSError):
                await self.mailbox.release()

    async def _dispatch_once(self) -> None:
        reason = ""
        try:
            # A task of its own: before Python 3.13 a task group may leave its task half canceled.
            await asyncio.create_task(self._dispatcher.run())
        except* LeaseLostError:
            self.mailbox.lost()
            reason = "lease_lost"
        except* (RedisError, OSError) as group:
            reason = shortage(group.exceptions[0])
        except* Exception:
            reason = "unforeseen"
            log.exception("dispatcher.failed", **self._where())
        if reason:
            log.warning("dispatcher.ended", **self._where(), reason=reason)
            await self._recover(reason)

    async def _recover(self, reason: str) -> None:
        """Rest a little, in case the lease is still ours, and make ready to begin again."""
        if not self.mailbox.is_ours():
            return
        await _wait(self._stopping, random.uniform(0, RESTART_PAUSE_S))  # noqa: S311 - jitter
        if reason == Shortage.REDIS_REFUSED:
            with contextlib.suppress(RedisError, OSError):
                await self._worker.open_groups()
        if not self.is_stopping:
            self._dispatcher = self._worker.dispatcher(self.mailbox)

    def _where(self) -> dict[str, object]:
        return {"handler": self.mailbox.handler, "partition": self.mailbox.partition}


async def _wait(event: asyncio.Event, most_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(most_s):
            await event.wait()
