"""The work on one partition while its lease is held: a dispatcher, started again after errors."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable

import structlog
from redis.exceptions import RedisError

from ..errors import UnavailableReason
from ..storage.redis_errors import unavailable_reason
from .dispatcher import Dispatcher
from .failure_log import FailureLog
from .leases import Lease, LeaseLostError

MAX_RESTART_DELAY_S = 1.0

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class PartitionTask:
    """Runs dispatchers under one lease, which has just been taken.

    Args:
        lease: Released at the end.
        new_dispatcher: Returns a fresh dispatcher that works under the lease.
        create_groups: Creates consumer groups that have been deleted.
        failure_log: Logs why dispatchers ended.

    Attributes:
        task: Ends with the lease or after `stop`.
        dispatcher: The current dispatcher.
        is_abandoned: Whether `abandon` was called.
    """

    def __init__(
        self,
        lease: Lease,
        new_dispatcher: Callable[[Lease], Dispatcher],
        create_groups: Callable[[], Awaitable[None]],
        failure_log: FailureLog,
    ) -> None:
        self.lease = lease
        self.dispatcher = new_dispatcher(lease)
        self.is_abandoned = False
        self._new_dispatcher = new_dispatcher
        self._create_groups = create_groups
        self._failure_log = failure_log
        self._stopping = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    @property
    def is_stopping(self) -> bool:
        """Whether the task is about to end."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """Finish the calls that have begun, then release the lease."""
        self._stopping.set()
        self.dispatcher.stop()

    def abandon(self) -> None:
        """Cancel everything: another worker has the lease, or the grace time is over."""
        if not self.is_abandoned:
            self.is_abandoned = True
            self.stop()
            self.task.cancel()

    async def _run(self) -> None:
        """Dispatch while the lease is held; after an error start again from what is pending."""
        try:
            while self.lease.is_held() and not self.is_stopping:
                await self._dispatch_once()
        finally:
            with contextlib.suppress(RedisError, OSError):
                await self.lease.release()

    async def _dispatch_once(self) -> None:
        reason = ""
        try:
            # Its own task: before Python 3.13 a task group may leave its task half canceled.
            await asyncio.create_task(self.dispatcher.run())
        except* LeaseLostError:
            self.lease.lose()
            reason = "lease_lost"
        except* (RedisError, OSError) as group:
            reason = unavailable_reason(group.exceptions[0])
        except* Exception:
            reason = "unforeseen"
            handler, partition = self.lease.assignment
            log.exception("dispatcher.failed", handler=handler, partition=partition)
        if reason:
            self._failure_log.record(reason, self.lease.assignment)
            await self._prepare_restart(reason)

    async def _prepare_restart(self, reason: str) -> None:
        """Wait a random time, then replace the dispatcher; only if the lease is still held."""
        if not self.lease.is_held():
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(random.uniform(0, MAX_RESTART_DELAY_S)):  # noqa: S311 - jitter
                await self._stopping.wait()
        if reason == UnavailableReason.REDIS_REFUSED:
            with contextlib.suppress(RedisError, OSError):
                await self._create_groups()
        if not self.is_stopping:
            self.dispatcher = self._new_dispatcher(self.lease)
