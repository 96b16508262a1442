"""One attempt to deliver one entry: what becomes of it. Knows no script and no queue.

The way of an attempt, and who decides what:

    worker        which partitions this process works on
    dispatcher    which session runs, and when
    deliverer     what becomes of a session's first entry
    retries       after which delay it is tried again, or that its destination is unreachable
    calls         how long the handler may run

What becomes of an entry; the first line that fits decides:

    it is gone from its stream            acknowledged
    it cannot be read                     dead letter
    it had a final failure before         dead letter, if there is room by now
    it belongs to a self-test             acknowledged; the handler is not called
    it was delivered too often            dead letter: the workers that called with it died
    its circuit is open                   waits for the circuit
    the handler returned                  acknowledged
    the handler raised `Undeliverable`    dead letter
    its destination is unreachable        waits for the circuit, if that is to blame (`retries`)
    the handler raised, or timed out      retried after a delay; at last dead letter
    an error of ours about this entry     dead letter

Quarantine: two workers died while they held an entry (`QUARANTINE_AFTER`). It may be a poison pill,
or only have been held together with one. From then on one entry in quarantine runs at a time in the
process, and its delivery is recorded before the call and taken back after it. So if the worker dies
again, the delivery counts for the entry that was running, and for no other in quarantine.
"""

from __future__ import annotations

import asyncio
import contextlib
from enum import StrEnum
from typing import NamedTuple

import structlog
from redis.exceptions import RedisError, ResponseError

from ..errors import UNDELIVERABLE, Undeliverable, reason_word
from ..handlers import BUILT_IN, AnyHandler, destination_of
from ..handlers.failures import error_word, place, unreachable_reason
from ..parsers import FETCH
from ..telemetry import logs, metrics
from ..transitions.transition import is_selftest
from .backlog import FinalFailure, Session
from .calls import HandlerCalls
from .consumer import Attempts, Consumer, Delivery, Missing
from .leases import LeaseLostError
from .retries import CircuitBreaker, CircuitBreakers, RetryPolicy
from .sources import Item, log_fields

# Deliveries whose outcome no worker recorded: each of those workers may have died of the entry.
MAX_DELIVERIES_WITHOUT_OUTCOME = 5

_NO_QUARANTINE = contextlib.nullcontext()

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class DeadLetterReason(StrEnum):
    """Why an entry became a dead letter, unless the handler gave its own word."""

    EXHAUSTED = "exhausted"
    KILLED_WORKER = "killed_worker"
    UNREADABLE = "unreadable"
    INTERNAL_ERROR = "internal_error"


class StoppedError(Exception):
    """The deliverer was stopped before the attempt began."""


class RetryAfter(NamedTuple):
    """The entry is to be tried again after a delay."""

    delay_s: float


class WaitForCircuit(NamedTuple):
    """The entry is to be tried again when its circuit breaker resumes the session."""

    circuit: CircuitBreaker


Postponed = RetryAfter | WaitForCircuit


class Deliverer:
    """Makes attempts, one at a time for each session.

    Args:
        name: The handler's name.
        handler: Takes an item; returning means that it is done with it for good.
        consumer: Its lease is held.
        policy: Concurrency, time limit and retries.
        circuits: The circuit breakers of the handler's destinations.
        quarantine: Held during the attempt of an entry in quarantine.

    Attributes:
        is_stopping: Set to begin no further attempt.
    """

    def __init__(
        self,
        name: str,
        handler: AnyHandler,
        consumer: Consumer,
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

    async def deliver(self, session: Session) -> Postponed | None:
        """Try to deliver a session's first entry; return None if it is done with.

        Raises:
            StoppedError: `is_stopping` was set before the attempt began.
            LeaseLostError: The lease ended.
            RedisError: Raised by the consumer.
        """
        try:
            return await self._deliver(session)
        except (StoppedError, LeaseLostError, RedisError, OSError):
            raise
        except Exception as error:
            # An error of ours about this one entry. Raised, it would end the work on all others,
            # and the same entry would come again.
            log.exception("delivery.broken", **self._described(session))
            attempts = session.first.attempts.failed
            reason = DeadLetterReason.INTERNAL_ERROR
            failure = FinalFailure(reason, error_word(error), place(error), attempts)
            return await self._dead_letter(session, failure)

    async def cancel_calls(self) -> None:
        """Cancel every call of the handler and wait until all have ended."""
        await self._calls.cancel_all()

    async def _deliver(self, session: Session) -> Postponed | None:
        """Deal with an entry that the handler must not see; make an attempt with any other."""
        delivery = session.first
        found = delivery.item or await self._consumer.load(delivery)
        if found is Missing.GONE:
            log.warning("delivery.gone", **self._described(session))
            await self._consumer.ack(delivery)
            return None
        if isinstance(found, Missing):
            return await self._dead_letter(session, FinalFailure(DeadLetterReason.UNREADABLE))
        delivery.item = found
        if session.final_failure is not None:
            return await self._dead_letter(session, session.final_failure)
        if is_selftest(found.session_id):
            self._selftest.inc()
            await self._consumer.ack(delivery)
            return None
        failed, unresolved = delivery.attempts
        if unresolved > MAX_DELIVERIES_WITHOUT_OUTCOME:
            failure = FinalFailure(DeadLetterReason.KILLED_WORKER, attempts=failed)
            return await self._dead_letter(session, failure)
        return await self._attempt(session, delivery, found)

    async def _attempt(self, session: Session, delivery: Delivery, item: Item) -> Postponed | None:
        """Call the handler once."""
        try:
            circuit = session.circuit = session.circuit or self._circuit_for(item)
        except Exception as raised:  # noqa: BLE001 - `destination` is the handler's code, too
            self._failed.inc()
            return await self._record_failure(session, delivery, raised)
        is_quarantined = delivery.attempts.is_quarantined
        async with self._quarantine if is_quarantined else _NO_QUARANTINE, self._slots:
            # Only now: all of this may have changed while the session waited for its slot.
            if self.is_stopping:
                raise StoppedError
            if not self._consumer.has_lease():
                raise LeaseLostError
            if not circuit.begin_call(session):
                return WaitForCircuit(circuit)
            successes_before = circuit.successes
            if is_quarantined:
                error = await self._call_in_quarantine(delivery, item)
            else:
                error = await self._calls.call(item)
        if error is None:
            self._delivered.inc()
            circuit.record_success()
            await self._consumer.ack(delivery)
            return None
        self._failed.inc()
        was_open = circuit.is_open
        if (reason := unreachable_reason(error)) is None:
            circuit.record_failure(session, is_timeout=isinstance(error, TimeoutError))
        elif circuit.record_unreachable(
            session, reason, successes_before=successes_before
        ) and not isinstance(error, Undeliverable):
            if not was_open:
                self._show_traceback(error)
            return WaitForCircuit(circuit)
        postponed = await self._record_failure(session, delivery, error)
        self._show_traceback(error)
        return postponed

    async def _call_in_quarantine(self, delivery: Delivery, item: Item) -> BaseException | None:
        """Call the handler; if the worker dies of it, this delivery counts."""
        failed, unresolved = delivery.attempts
        await self._consumer.record_attempts(delivery, Attempts(failed, unresolved + 1))
        error = await self._calls.call(item)
        if error is not None:
            await self._consumer.record_attempts(delivery, delivery.attempts)
        return error

    def _show_traceback(self, error: BaseException) -> None:
        """Show it below the line that was logged; of our own handlers, that says everything."""
        if self._name not in {*BUILT_IN, FETCH}:
            logs.show_traceback(error)

    def _circuit_for(self, item: Item) -> CircuitBreaker:
        destination = self._destination(item) if self._destination else ""
        return self._circuits.for_destination(destination)

    async def _record_failure(
        self, session: Session, delivery: Delivery, error: BaseException
    ) -> RetryAfter | None:
        """Count an attempt as failed; retry the entry, or make it a dead letter."""
        failed, word, where = delivery.attempts.failed + 1, error_word(error), place(error)
        if isinstance(error, Undeliverable):
            reason = reason_word(error.reason, UNDELIVERABLE)
            return await self._dead_letter(session, FinalFailure(reason, word, where, failed))
        delay_s = self._policy.delay_s(failed)
        if delay_s is None:
            reason = DeadLetterReason.EXHAUSTED
            return await self._dead_letter(session, FinalFailure(reason, word, where, failed))
        # Recorded before the delay, so that a worker that takes over counts on from here.
        delivery.attempts = Attempts(failed, 1)
        await self._consumer.record_attempts(delivery, delivery.attempts, error=word, place=where)
        self._retried.inc()
        log.warning(
            "delivery.retried",
            **self._described(session),
            error=word,
            place=where,
            attempt=failed,
            delay_s=round(delay_s, 3),
        )
        return RetryAfter(delay_s)

    async def _dead_letter(self, session: Session, failure: FinalFailure) -> RetryAfter | None:
        """Make a session's first entry a dead letter; later, if there is no room."""
        described = {
            **self._described(session),
            "reason": failure.reason,
            "error": failure.error,
            "place": failure.place,
            "attempt": failure.attempts,
        }
        try:
            count = await self._consumer.dead_letter(session.first, **failure._asdict())
        except ResponseError:
            count = None
        if count is None:
            # No dead letter is dropped to make room: that is for an operator to decide.
            log.error("delivery.dead_letters_full", **described)
            session.final_failure = failure
            return RetryAfter(self._policy.max_delay_s)
        self._dead_lettered.inc()
        log.error("delivery.dead_lettered", **described, dead_letters=count)
        return None

    def _described(self, session: Session) -> dict[str, object]:
        """Return what log lines may say about a session's first entry."""
        delivery = session.first
        item = delivery.item
        described = {"entry_id": delivery.entry_id} if item is None else log_fields(item)
        return {"handler": self._name, **described}
