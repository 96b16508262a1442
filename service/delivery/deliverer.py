"""One entry: what a call of its handler means, attempts, dead letters. Knows no script, no queue.

In which order entries are delivered, and when one is tried again, is decided in `dispatch`; when
the queue is to blame, in `circuit`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from enum import StrEnum
from typing import NamedTuple, Protocol

import structlog
from redis.exceptions import RedisError, ResponseError

from ..errors import UNDELIVERABLE, Undeliverable, reason_word
from ..handlers import Handler, destination_of
from ..handlers.failures import class_name, place, unreachable_reason
from ..telemetry import metrics
from ..transitions.transition import StatusTransition, is_selftest
from .backlog import Letter, Session
from .calls import HandlerCalls
from .consumer import Attempts, Delivery, LeaseLostError, Missing
from .retries import CircuitBreaker, CircuitBreakers, RetryPolicy

# A handler that takes the whole process down is not given the same entry more often than this.
MAX_DELIVERIES_WITHOUT_OUTCOME = 5

_NOT_ALONE = contextlib.nullcontext()

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class DeadLetterReason(StrEnum):
    """Why a delivery became a dead letter, where the handler gave no word of its own."""

    EXHAUSTED = "exhausted"
    KILLED_WORKER = "killed_worker"
    UNREADABLE = "unreadable"
    INTERNAL_ERROR = "internal_error"


class StoppedError(Exception):
    """Told to stop before the next call of the handler."""


class Pause(NamedTuple):
    """An entry has to be tried again: after so many seconds, or when the circuit says so."""

    seconds: float | None


class PartitionConsumer(Protocol):
    """What is needed of a consumer."""

    def is_ours(self) -> bool:
        """Say whether the lease holds."""

    def claim_pending(self) -> AsyncIterator[list[Delivery]]:
        """Claim what was left pending, oldest first."""

    async def read(self, most: int) -> list[Delivery]:
        """Return new deliveries, oldest first; none when there is nothing new."""

    async def load(self, delivery: Delivery) -> StatusTransition | Missing:
        """Read again what an entry holds of which only the id was kept."""

    async def ack(self, delivery: Delivery) -> None:
        """Settle a delivery."""

    async def record_attempts(self, delivery: Delivery, attempts: Attempts) -> None:
        """Write down how often a delivery was tried."""

    async def dead_letter(
        self, delivery: Delivery, *, reason: str, error: str, attempts: int, place: str = ""
    ) -> int | None:
        """Move a delivery to the dead letters; None when there is no room for it."""

    async def wait_for_entries(self) -> None:
        """Wait until there is something new to read."""


class Deliverer:
    """Delivers one entry at a time of each session.

    Args:
        name: The handler's name.
        handler: Takes a transition; returning means it is safe.
        consumer: The consumer; its lease is held.
        policy: Concurrency, time limit and retries.
        circuits: Whether the handler reaches its destinations.
        quarantine: Held while a delivery that may have killed a worker is tried.

    Attributes:
        is_stopping: Set to start no further call.
    """

    def __init__(
        self,
        name: str,
        handler: Handler,
        consumer: PartitionConsumer,
        policy: RetryPolicy,
        *,
        circuits: CircuitBreakers,
        quarantine: asyncio.Lock,
    ) -> None:
        self.is_stopping = False
        self._name = name
        self._consumer = consumer
        self._policy = policy
        self._circuits = circuits
        self._destination = destination_of(handler)
        self._quarantine = quarantine
        self._calls = HandlerCalls(name, handler, policy.timeout_s)
        self._slots = asyncio.Semaphore(policy.concurrency)
        self._delivered, self._failed, self._retried, self._dead_lettered, self._selftest = (
            metrics.DELIVERIES.labels(name, outcome)
            for outcome in ("delivered", "failed", "retried", "dead_lettered", "selftest")
        )

    async def deliver(self, session: Session) -> Pause | None:
        """Deliver a session's first entry; return None when it is done with.

        Raises:
            StoppedError: It was not tried any more.
            LeaseLostError: Nor may it be.
            RedisError: Of the consumer.
        """
        try:
            return await self._deliver(session)
        except (StoppedError, LeaseLostError, RedisError, OSError):
            raise
        except Exception as error:
            # Our own, about this one entry. Raised, it would end the work on all others, and the
            # same entry would come again.
            log.exception("delivery.broken", **self._described(session))
            attempts = session.first.attempts.failed
            letter = Letter(
                DeadLetterReason.INTERNAL_ERROR, class_name(error), place(error), attempts
            )
            return await self._dead_letter(session, letter)

    async def end(self) -> None:
        """End every call of the handler."""
        await self._calls.cancel_all()

    async def _deliver(self, session: Session) -> Pause | None:
        delivery = session.first
        transition = delivery.transition
        if transition is None:
            found = await self._consumer.load(delivery)
            if found is Missing.GONE:
                log.warning("delivery.gone", **self._described(session))
                await self._consumer.ack(delivery)
                return None
            if isinstance(found, Missing):
                return await self._dead_letter(
                    session, Letter(DeadLetterReason.UNREADABLE, "", "", 0)
                )
            delivery.transition = transition = found
        if session.letter is not None:
            return await self._dead_letter(session, session.letter)
        if is_selftest(transition.session_id):
            self._selftest.inc()
            await self._consumer.ack(delivery)
            return None
        failed, deliveries = delivery.attempts
        if deliveries > MAX_DELIVERIES_WITHOUT_OUTCOME:
            return await self._dead_letter(
                session, Letter(DeadLetterReason.KILLED_WORKER, "", "", failed)
            )
        return await self._try(session, delivery, transition)

    async def _try(
        self, session: Session, delivery: Delivery, transition: StatusTransition
    ) -> Pause | None:
        """Call the handler once, in one of the slots; for a suspect alone among its kind."""
        try:
            circuit = session.circuit = session.circuit or self._circuit_for(transition)
        except Exception as raised:  # noqa: BLE001 - `destination` is the handler's, too
            self._failed.inc()
            return await self._count_failure(session, delivery, raised)
        async with (
            self._quarantine if delivery.attempts.is_quarantined else _NOT_ALONE,
            self._slots,
        ):
            if self.is_stopping:
                raise StoppedError
            if not self._consumer.is_ours():
                raise LeaseLostError
            if not circuit.begin_call(session):
                return Pause(None)
            if delivery.attempts.is_quarantined:
                failed, deliveries = delivery.attempts
                await self._consumer.record_attempts(delivery, Attempts(failed, deliveries + 1))
            successes_before = circuit.successes
            error = await self._calls.call(transition)
        if error is None:
            self._delivered.inc()
            circuit.record_success()
            await self._consumer.ack(delivery)
            return None
        self._failed.inc()
        if (word := unreachable_reason(error)) is not None:
            if circuit.record_unreachable(session, word, successes_before=successes_before):
                return Pause(None)
        else:
            session.successes_seen = circuit.successes
            if isinstance(error, TimeoutError):
                circuit.end_probe(session)
            else:
                circuit.record_response()
        return await self._count_failure(session, delivery, error)

    def _circuit_for(self, transition: StatusTransition) -> CircuitBreaker:
        return self._circuits.for_destination(
            self._destination(transition) if self._destination else ""
        )

    async def _count_failure(
        self, session: Session, delivery: Delivery, error: BaseException
    ) -> Pause | None:
        failed, word = delivery.attempts.failed + 1, class_name(error)
        where = place(error)
        if isinstance(error, Undeliverable):
            reason = reason_word(error.reason, UNDELIVERABLE)
            return await self._dead_letter(session, Letter(reason, word, where, failed))
        if failed >= self._policy.max_attempts:
            return await self._dead_letter(
                session, Letter(DeadLetterReason.EXHAUSTED, word, where, failed)
            )
        delivery.attempts = Attempts(failed, 1)
        await self._consumer.record_attempts(delivery, delivery.attempts)
        pause_s = self._policy.delay_s(failed)
        self._retried.inc()
        log.warning(
            "delivery.retried",
            **self._described(session),
            error=word,
            place=where,
            attempt=failed,
            pause_s=round(pause_s, 3),
        )
        return Pause(pause_s)

    async def _dead_letter(self, session: Session, letter: Letter) -> Pause | None:
        """Make a session's first entry a dead letter; where there is no room, later."""
        told = {
            **self._described(session),
            "reason": letter.reason,
            "error": letter.error,
            "place": letter.place,
            "attempt": letter.attempts,
        }
        try:
            held = await self._consumer.dead_letter(session.first, **letter._asdict())
        except ResponseError:
            held = None
        if held is None:
            # Nothing is dropped to make room: an operator has to.
            log.error("delivery.dead_letters_full", **told)
            session.letter = letter
            return Pause(self._policy.max_delay_s)
        self._dead_lettered.inc()
        log.error("delivery.dead_lettered", **told, dead_letters=held)
        return None

    def _described(self, session: Session) -> dict[str, object]:
        delivery = session.first
        transition = delivery.transition
        if transition is None:
            return {"handler": self._name, "entry_id": delivery.entry_id}
        return {
            "handler": self._name,
            "event_id": transition.event_id,
            "session_id": transition.session_id,
            "sequence": transition.sequence,
        }
