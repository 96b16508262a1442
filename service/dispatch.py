"""The way out: one chain per session, retries, dead letters. Knows no Redis and no broker.

A `Dispatcher` works one handler's mail in one partition for as long as the lease holds. Which
partitions are ours is decided in `worker`; how a mailbox keeps its word, in `mailbox`. Time is
the event loop's alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import AsyncIterator
from enum import StrEnum
from typing import NamedTuple, Protocol

import structlog

from . import metrics
from .errors import Undeliverable
from .handlers import Handler
from .mailbox import Delivery, LeaseLostError, Tries

# Entries in hand per handler and partition: back-pressure, not memory, takes what comes above.
WINDOW = 512
MOST_PER_READ = 100
# A handler that takes the whole process down is not given the same entry more often than this.
STARTS_WITHOUT_OUTCOME = 5

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Burial(StrEnum):
    """Why a delivery became a dead letter, where the handler gave no word of its own."""

    EXHAUSTED = "exhausted"
    KILLED_WORKER = "killed_worker"


class RetryPolicy(NamedTuple):
    """How patient we are with a handler.

    Attributes:
        concurrency: Calls at the same time, each for another session.
        timeout_s: Seconds one call may take.
        first_s: The first retry comes within this many seconds, each later one within twice that.
        ceiling_s: The longest pause in seconds.
        attempts: Failed calls before the delivery is buried.
    """

    concurrency: int
    timeout_s: float
    first_s: float
    ceiling_s: float
    attempts: int

    def pause_s(self, failed: int) -> float:
        """Return a full-jitter pause in seconds after the *failed*-th failure, from 1."""
        doublings = min(failed - 1, 32)
        return random.uniform(0, min(self.ceiling_s, self.first_s * 2**doublings))  # noqa: S311 - jitter


class Mail(Protocol):
    """What a dispatcher needs of a mailbox."""

    def is_ours(self) -> bool:
        """Say whether the lease holds."""

    def take_over(self) -> AsyncIterator[list[Delivery]]:
        """Claim what was left pending, oldest first."""

    async def read(self, most: int) -> list[Delivery]:
        """Return new deliveries, oldest first; none when there is nothing new."""

    async def settle(self, delivery: Delivery) -> None:
        """Settle a delivery."""

    async def count(self, delivery: Delivery, tries: Tries) -> None:
        """Write down how often a delivery was tried."""

    async def bury(self, delivery: Delivery, *, reason: str, error: str, attempts: int) -> int:
        """Move a delivery to the dead letters."""

    async def arrival(self) -> None:
        """Wait until there is something new to read."""


class Dispatcher:
    """Hands one mailbox's deliveries to one handler, in order per session.

    Args:
        name: The handler's name.
        handler: Takes a transition; returning means it is safe.
        mail: The mailbox; its lease is held.
        policy: Concurrency, time limit and retries.
        suspects: Held while a delivery that may have killed a worker is tried, so that what
            else runs in the process is not counted together with it.
    """

    def __init__(
        self,
        name: str,
        handler: Handler,
        mail: Mail,
        policy: RetryPolicy,
        *,
        suspects: asyncio.Lock,
    ) -> None:
        self._name = name
        self._handler = handler
        self._mail = mail
        self._policy = policy
        self._suspects = suspects
        self._slots = asyncio.Semaphore(policy.concurrency)
        self._chains: dict[str, deque[Delivery]] = {}
        self._in_hand = 0
        self._room = asyncio.Event()
        self._stopping = asyncio.Event()
        self._feeding: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Work until stopped; then finish what has been started and leave the rest pending.

        Raises:
            BaseExceptionGroup: Of `LeaseLostError` and of whatever the mailbox raised.
        """
        async with asyncio.TaskGroup() as tasks:
            self._feeding = tasks.create_task(self._feed(tasks))
            if self._stopping.is_set():
                self._feeding.cancel()

    def stop(self) -> None:
        """Read no more and start no more."""
        self._stopping.set()
        if self._feeding is not None:
            self._feeding.cancel()

    async def _feed(self, tasks: asyncio.TaskGroup) -> None:
        """Take over what is pending, then read what is new, for as long as there is room."""
        async for deliveries in self._mail.take_over():
            self._accept(deliveries, tasks)
            await self._until_room()
        while True:
            deliveries = await self._mail.read(min(MOST_PER_READ, WINDOW - self._in_hand))
            self._accept(deliveries, tasks)
            if not deliveries:
                await self._mail.arrival()
            await self._until_room()

    async def _until_room(self) -> None:
        while self._in_hand >= WINDOW:
            self._room.clear()
            await self._room.wait()

    def _accept(self, deliveries: list[Delivery], tasks: asyncio.TaskGroup) -> None:
        """Append each delivery to its session's chain, and start the chains that are new."""
        self._in_hand += len(deliveries)
        for delivery in deliveries:
            session_id = delivery.transition.session_id
            if session_id in self._chains:
                self._chains[session_id].append(delivery)
            else:
                self._chains[session_id] = deque([delivery])
                tasks.create_task(self._work_off(session_id))

    async def _work_off(self, session_id: str) -> None:
        """Deliver one session's entries one after the other."""
        chain = self._chains[session_id]
        while chain and not self._stopping.is_set():
            await self._deliver(chain[0])
            chain.popleft()
            self._in_hand -= 1
            self._room.set()
        del self._chains[session_id]

    async def _deliver(self, delivery: Delivery) -> None:
        """Try one delivery until it is settled or buried, or until we are told to stop."""
        tries = delivery.tries
        if tries.started > STARTS_WITHOUT_OUTCOME:
            await self._bury(delivery, Burial.KILLED_WORKER, None, tries.failed)
            return
        while True:
            error = await self._attempt(delivery, suspect=tries.started > 1)
            if error is None:
                await self._mail.settle(delivery)
                return
            tries = Tries(tries.failed + 1, 1)
            if isinstance(error, Undeliverable):
                await self._bury(delivery, error.reason, error, tries.failed)
                return
            if tries.failed >= self._policy.attempts:
                await self._bury(delivery, Burial.EXHAUSTED, error, tries.failed)
                return
            await self._mail.count(delivery, tries)
            await self._pause(delivery, error, tries.failed)
            if self._stopping.is_set():
                return

    async def _attempt(self, delivery: Delivery, *, suspect: bool) -> Exception | None:
        """Call the handler once; return what it raised."""
        async with self._suspects if suspect else contextlib.nullcontext(), self._slots:
            if not self._mail.is_ours():
                raise LeaseLostError
            with metrics.DELIVERY_SECONDS.labels(self._name).time():
                error = await self._call(delivery)
        outcome = "delivered" if error is None else "failed"
        metrics.DELIVERIES.labels(self._name, outcome).inc()
        return error

    async def _call(self, delivery: Delivery) -> Exception | None:
        try:
            async with asyncio.timeout(self._policy.timeout_s):
                await self._handler(delivery.transition)
        except asyncio.CancelledError:
            ours = asyncio.current_task()
            if ours is not None and ours.cancelling():
                raise
            return RuntimeError("the handler canceled itself")
        except Exception as error:  # noqa: BLE001 - a handler may raise anything; it is counted
            return error
        return None

    async def _pause(self, delivery: Delivery, error: Exception, failed: int) -> None:
        pause_s = self._policy.pause_s(failed)
        log.warning(
            "delivery.retried",
            **self._described(delivery),
            error=type(error).__name__,
            attempt=failed,
            pause_s=round(pause_s, 3),
        )
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), pause_s)

    async def _bury(
        self, delivery: Delivery, reason: str, error: Exception | None, attempts: int
    ) -> None:
        error_class = "" if error is None else type(error).__name__
        held = await self._mail.bury(delivery, reason=reason, error=error_class, attempts=attempts)
        metrics.DELIVERIES.labels(self._name, "buried").inc()
        log.error(
            "delivery.buried",
            **self._described(delivery),
            reason=reason,
            error=error_class,
            attempt=attempts,
            dead_letters=held,
        )

    def _described(self, delivery: Delivery) -> dict[str, object]:
        transition = delivery.transition
        return {
            "handler": self._name,
            "event_id": transition.event_id,
            "session_id": transition.session_id,
            "sequence": transition.sequence,
        }
