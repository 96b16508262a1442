"""The way out: one chain per session, retries, dead letters. Knows no Redis and no broker.

A `Dispatcher` works one handler's mail in one partition for as long as the lease holds. Which
partitions are ours is decided in `worker`; how a mailbox keeps its word, in `mailbox`. Time is
the event loop's alone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from enum import StrEnum
from typing import Protocol

import structlog

from . import metrics
from .circuit import Circuit
from .errors import Undeliverable
from .handlers import Handler
from .mailbox import Delivery, LeaseLostError, Tries
from .retries import RetryPolicy
from .transitions import is_selftest

# Entries in hand per handler and partition: back-pressure, not memory, takes what comes above.
# Only what is taken over may exceed it, by one batch.
WINDOW = 512
MOST_PER_READ = 100
# A handler that takes the whole process down is not given the same entry more often than this.
STARTS_WITHOUT_OUTCOME = 5

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Burial(StrEnum):
    """Why a delivery became a dead letter, where the handler gave no word of its own."""

    EXHAUSTED = "exhausted"
    KILLED_WORKER = "killed_worker"


class _StoppedError(Exception):
    """Told to stop before the next call of the handler."""


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

    async def bury(
        self, delivery: Delivery, *, reason: str, error: str, attempts: int
    ) -> int | None:
        """Move a delivery to the dead letters; None when there is no room for it."""

    async def arrival(self) -> None:
        """Wait until there is something new to read."""


class Dispatcher:
    """Hands one mailbox's deliveries to one handler, in order per session.

    Args:
        name: The handler's name.
        handler: Takes a transition; returning means it is safe.
        mail: The mailbox; its lease is held.
        policy: Concurrency, time limit and retries.
        circuit: Whether the handler reaches its queue; one for all its dispatchers.
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
        circuit: Circuit,
        suspects: asyncio.Lock,
    ) -> None:
        self._name = name
        self._circuit = circuit
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
        self._seconds = metrics.DELIVERY_SECONDS.labels(name)
        self._delivered, self._failed, self._retried, self._buried, self._withheld = (
            metrics.DELIVERIES.labels(name, outcome)
            for outcome in ("delivered", "failed", "retried", "buried", "withheld")
        )

    async def run(self) -> None:
        """Work until stopped; then finish what has been started and leave the rest pending.

        Raises:
            Exception: `LeaseLostError`, or whatever the mailbox raised, alone or in a group.
        """
        async with asyncio.TaskGroup() as tasks:
            self._feeding = tasks.create_task(self._feed(tasks))
            if self._stopping.is_set():
                self._feeding.cancel()
        await self._give_back()

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
        while not self._stopping.is_set():
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
        if _is_canceled():
            # Said again, should it have been lost below: nothing may start in what is ending.
            raise asyncio.CancelledError
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
        try:
            while chain:
                await self._deliver(chain)
                chain.popleft()
                self._in_hand -= 1
                self._room.set()
        except _StoppedError:
            return
        except asyncio.CancelledError:
            if _is_canceled():
                raise
            # A chain that ended in silence would hold its session back for ever.
            raise RuntimeError("the mailbox canceled itself") from None
        del self._chains[session_id]

    async def _deliver(self, chain: deque[Delivery]) -> None:
        """Try the first of a chain until it is settled or buried."""
        if is_selftest(chain[0].transition.session_id):
            self._withheld.inc()
            await self._mail.settle(chain[0])
            return
        if chain[0].tries.started > STARTS_WITHOUT_OUTCOME:
            await self._bury(chain[0], Burial.KILLED_WORKER, None, chain[0].tries.failed)
            return
        reached = self._circuit.reached
        while (error := await self._attempt(chain[0])) is not None:
            if isinstance(error, ConnectionError) and self._circuit.failed(reached_before=reached):
                continue
            reached = self._circuit.reached
            failed = chain[0].tries.failed + 1
            if isinstance(error, Undeliverable):
                await self._bury(chain[0], error.reason, error, failed)
                return
            if failed >= self._policy.attempts:
                await self._bury(chain[0], Burial.EXHAUSTED, error, failed)
                return
            chain[0] = chain[0]._replace(tries=Tries(failed, 1))
            await self._mail.count(chain[0], chain[0].tries)
            await self._pause(chain[0], error)
        await self._mail.settle(chain[0])

    async def _attempt(self, delivery: Delivery) -> BaseException | None:
        """Call the handler once; return what it raised.

        While its queue cannot be reached, one call after the other probes and the rest wait.
        """
        while True:
            async with self._permit(delivery):
                if not self._circuit.is_open:
                    return await self._start(delivery)
            async with self._turn_to_probe():
                if self._circuit.is_open:
                    await self._sleep(self._circuit.pause_s())
                    async with self._permit(delivery):
                        return await self._start(delivery)

    @contextlib.asynccontextmanager
    async def _permit(self, delivery: Delivery) -> AsyncIterator[None]:
        """Hold one of the slots, and, for a suspect, everything else of the kind."""
        async with (
            self._suspects if delivery.tries.is_suspect else contextlib.nullcontext(),
            self._slots,
        ):
            if self._stopping.is_set():
                raise _StoppedError
            if not self._mail.is_ours():
                raise LeaseLostError
            yield

    @contextlib.asynccontextmanager
    async def _turn_to_probe(self) -> AsyncIterator[None]:
        """Hold the one turn there is for all that wait, unless told to stop before."""
        turn = asyncio.ensure_future(self._circuit.probing.acquire())
        stopped = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({turn, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not turn.done():
                raise _StoppedError
            yield
        finally:
            stopped.cancel()
            if turn.done() and not turn.cancelled():
                self._circuit.probing.release()
            else:
                turn.cancel()

    async def _start(self, delivery: Delivery) -> BaseException | None:
        failed, started = delivery.tries
        if delivery.tries.is_suspect:
            await self._mail.count(delivery, Tries(failed, started + 1))
        with self._seconds.time():
            error = await self._call(delivery)
        (self._delivered if error is None else self._failed).inc()
        if not isinstance(error, ConnectionError | TimeoutError):
            self._circuit.answered()
        return error

    async def _call(self, delivery: Delivery) -> BaseException | None:
        error: BaseException | None = None
        try:
            async with asyncio.timeout(self._policy.timeout_s):
                await self._handler(delivery.transition)
        except (SystemExit, KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as raised:  # noqa: BLE001 - a handler may raise anything; it is counted
            error = raised
        if _is_canceled():
            # Said again, should the handler have kept it to itself.
            raise asyncio.CancelledError
        return error

    async def _pause(self, delivery: Delivery, error: BaseException) -> None:
        pause_s = self._policy.pause_s(delivery.tries.failed)
        self._retried.inc()
        log.warning(
            "delivery.retried",
            **self._described(delivery),
            error=type(error).__name__,
            attempt=delivery.tries.failed,
            pause_s=round(pause_s, 3),
        )
        await self._sleep(pause_s)

    async def _sleep(self, pause_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._stopping.wait()
                raise _StoppedError

    async def _give_back(self) -> None:
        """Write down that what is left in hand was not started, so that nobody suspects it."""
        left = [delivery for chain in self._chains.values() for delivery in chain]
        await asyncio.gather(
            *(
                self._mail.count(delivery, tries._replace(started=tries.started - 1))
                for delivery in left
                if not (tries := delivery.tries).is_suspect
            )
        )

    async def _bury(
        self, delivery: Delivery, reason: str, error: BaseException | None, attempts: int
    ) -> None:
        word = "" if error is None else type(error).__name__
        described = {**self._described(delivery), "reason": reason, "error": word}
        while True:
            held = await self._mail.bury(delivery, reason=reason, error=word, attempts=attempts)
            if held is not None:
                break
            # Nothing is dropped to make room: an operator has to.
            log.error("delivery.unburied", **described, attempt=attempts)
            await self._sleep(self._policy.ceiling_s)
        self._buried.inc()
        log.error("delivery.buried", **described, attempt=attempts, dead_letters=held)

    def _described(self, delivery: Delivery) -> dict[str, object]:
        transition = delivery.transition
        return {
            "handler": self._name,
            "event_id": transition.event_id,
            "session_id": transition.session_id,
            "sequence": transition.sequence,
        }


def _is_canceled() -> bool:
    """Say whether the current task is being canceled, rather than something it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
