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
from .config import Settings
from .connections import Connections, shortage
from .dispatch import Dispatcher, RetryPolicy
from .handlers import Handler
from .layout import Keys, open_groups
from .mailbox import Arrivals, LeaseLostError, Mailbox, announce, lease

RENEWALS_PER_TTL = 3
RESTART_PAUSE_S = 1.0

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
        self._arrivals = [Arrivals(connections, keys, p) for p in range(keys.partitions)]
        self._tenures: dict[tuple[str, int], _Tenure] = {}

    async def run(self, stopping: asyncio.Event) -> None:
        """Work until *stopping* is set; then settle what is in hand and give everything up."""
        try:
            while not stopping.is_set():
                pause_s = await self._turn()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stopping.wait(), pause_s)
        finally:
            await self._leave()

    async def _turn(self) -> float:
        """Renew, give up and take leases once; return the seconds until the next turn."""
        ttl_s = self._settings.lease_ttl_s
        waits = [ttl_s / RENEWALS_PER_TTL]
        try:
            await self._renew()
            waits += [await self._take_share(handler) for handler in self._handlers]
        except (RedisError, OSError) as error:
            metrics.REDIS_ERRORS.labels(shortage(error)).inc()
            log.warning("worker.turn_failed", reason=shortage(error))
            waits.append(RESTART_PAUSE_S)
        for handler in self._handlers:
            metrics.LEASES_HELD.labels(handler).set(len(self._held(handler)))
        return min(waits)

    async def _renew(self) -> None:
        held = list(self._tenures.values())
        if not held:
            return
        waits = await lease(
            self._connections, [tenure.mailbox for tenure in held], self._settings.lease_ttl_s
        )
        for tenure, wait_s in zip(held, waits, strict=True):
            if wait_s:
                tenure.abandon()

    async def _take_share(self, handler: str) -> float:
        """Hold our count of one handler's partitions; return the seconds until the next look."""
        ttl_s = self._settings.lease_ttl_s
        living = await announce(
            self._connections, self._keys, handler=handler, worker=self.name, ttl_s=ttl_s
        )
        share = math.ceil(self._keys.partitions / max(1, living))
        held = self._held(handler)
        for tenure in held[share:]:
            tenure.stop()
        if len(held) >= share:
            return ttl_s
        return await self._take(handler, share - len(held))

    async def _take(self, handler: str, most: int) -> float:
        """Take up to *most* free partitions; return the seconds until another may be free."""
        candidates = [p for p in range(self._keys.partitions) if (handler, p) not in self._tenures]
        # Workers that start together should not all reach for the same partition first.
        random.shuffle(candidates)
        waits: list[float] = []
        for partition in candidates:
            if most == 0:
                break
            mailbox = _PartitionMail(
                self._connections,
                self._keys,
                self._arrivals[partition],
                partition=partition,
                handler=handler,
                worker=self.name,
            )
            [wait_s] = await lease(self._connections, [mailbox], self._settings.lease_ttl_s)
            if wait_s:
                waits.append(wait_s)
            else:
                most -= 1
                self._begin(mailbox)
        return min(waits, default=self._settings.lease_ttl_s)

    def _begin(self, mailbox: _PartitionMail) -> None:
        at = (mailbox.handler, mailbox.partition)
        tenure = _Tenure(self, mailbox)
        self._tenures[at] = tenure
        tenure.task.add_done_callback(lambda _: self._tenures.pop(at, None))

    def dispatcher(self, mailbox: _PartitionMail) -> Dispatcher:
        """Return a fresh dispatcher for a mailbox."""
        settings = self._settings
        policy = RetryPolicy(
            concurrency=settings.handler_concurrency,
            timeout_s=settings.handler_timeout_s,
            first_s=settings.retry_first_s,
            ceiling_s=settings.retry_ceiling_s,
            attempts=settings.retry_attempts,
        )
        handler = self._handlers[mailbox.handler]
        return Dispatcher(mailbox.handler, handler, mailbox, policy, suspects=self._suspects)

    async def open_groups(self) -> None:
        """Create the groups again, if an operator deleted a stream."""
        for handler in await open_groups(self._connections, self._keys, self._settings.handlers):
            log.warning("group.created", handler=handler)

    def _held(self, handler: str) -> list[_Tenure]:
        return [
            tenure
            for (name, _), tenure in self._tenures.items()
            if name == handler and not tenure.stopping
        ]

    async def _leave(self) -> None:
        """Finish within the grace time, then say goodbye."""
        ending = list(self._tenures.values())
        for tenure in ending:
            tenure.stop()
        if ending:
            _, late = await asyncio.wait(
                {tenure.task for tenure in ending}, timeout=self._settings.shutdown_grace_s
            )
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        for arrivals in self._arrivals:
            arrivals.close()
        for handler in self._handlers:
            with contextlib.suppress(RedisError, OSError):
                await announce(
                    self._connections, self._keys, handler=handler, worker=self.name, ttl_s=0
                )


class _PartitionMail(Mailbox):
    """A mailbox that shares its partition's watch for arrivals with the other handlers'."""

    def __init__(
        self,
        connections: Connections,
        keys: Keys,
        arrivals: Arrivals,
        *,
        partition: int,
        handler: str,
        worker: str,
    ) -> None:
        super().__init__(connections, keys, partition=partition, handler=handler, worker=worker)
        self._arrivals = arrivals

    async def arrival(self) -> None:
        """Wait until there is something new to read."""
        await self._arrivals.after(self.last_read)


class _Tenure:
    """One lease held, and the work done under it."""

    def __init__(self, worker: Worker, mailbox: _PartitionMail) -> None:
        self.mailbox = mailbox
        self.stopping = False
        self._worker = worker
        self._dispatcher = worker.dispatcher(mailbox)
        self.task = asyncio.create_task(self._serve())

    def stop(self) -> None:
        """Finish what is started, then give the lease up."""
        self.stopping = True
        self._dispatcher.stop()

    def abandon(self) -> None:
        """Drop everything: the lease is somebody else's."""
        self.task.cancel()

    async def _serve(self) -> None:
        """Dispatch while the lease holds; after any error begin again from taking over."""
        try:
            while self.mailbox.is_ours() and not self.stopping:
                await self._dispatch_once()
        finally:
            with contextlib.suppress(RedisError, OSError):
                await self.mailbox.release()

    async def _dispatch_once(self) -> None:
        try:
            await self._dispatcher.run()
        except* LeaseLostError:
            self._note("lease_lost")
        except* (RedisError, OSError) as group:
            self._note(shortage(group.exceptions[0]))
        except* Exception:
            log.exception("dispatcher.failed", **self._where())
        else:
            return
        await asyncio.sleep(random.uniform(0, RESTART_PAUSE_S))  # noqa: S311 - jitter
        await self._reopen()

    async def _reopen(self) -> None:
        with contextlib.suppress(RedisError, OSError):
            await self._worker.open_groups()
        if not self.stopping:
            self._dispatcher = self._worker.dispatcher(self.mailbox)

    def _note(self, reason: str) -> None:
        log.warning("dispatcher.restarted", **self._where(), reason=reason)

    def _where(self) -> dict[str, object]:
        return {"handler": self.mailbox.handler, "partition": self.mailbox.partition}
