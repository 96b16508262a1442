"""Which session of a partition runs when: in order, within bounds. Knows no Redis and no queue.

A `Dispatcher` handles one handler's entries of one partition while the lease is held. `deliverer`
lists who decides what on the way of an attempt. A session is in one of three states:

    running                  a task delivers its entries, one after the other
    waiting for a retry      its first entry has failed; it runs again after a delay
    waiting for a circuit    its destination is unreachable; it runs again when the circuit closes,
                             or when it is its turn to probe

What bounds the memory:

    WINDOW        loaded entries. Sessions that wait are parked (`backlog`), so failing ones take no
                  slots of the others. If the handler has only one destination, a session that
                  waits for its circuit keeps one slot: reading on would not deliver anything.
    MAX_PARKED    parked entries. At this number reading pauses until enough of them are delivered.
"""

from __future__ import annotations

import asyncio

import structlog

from .. import cancellation
from ..handlers import AnyHandler, destination_of
from .backlog import Backlog, Session
from .consumer import Consumer, Delivery
from .deliverer import Deliverer, RetryAfter, StoppedError
from .retries import CircuitBreaker, CircuitBreakers, CircuitSession, RetryPolicy

# Claiming pending entries may exceed it by one batch, sessions that are retried by an entry each.
WINDOW = 512
MAX_PER_READ = 100
MAX_PARKED = 20_000
# Reading goes on below this part of `MAX_PARKED`, so that it does not stop and start all the time.
READ_AGAIN_BELOW = 0.9
MAX_RECORDED_AT_ONCE = 1000

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Dispatcher:
    """Passes a consumer's entries to its handler, in order for each session.

    Args:
        name: The handler's name.
        handler: Takes an item; returning means that it is done with it for good.
        consumer: Its lease is held.
        policy: Concurrency, time limit and retries.
        circuits: The circuit breakers of the handler's destinations, shared by its dispatchers.
        quarantine: Held during the attempt of an entry in quarantine, shared by all dispatchers of
            the process.

    Attributes:
        is_reading_paused: Whether nothing is read because too many entries are parked.
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
        self.is_reading_paused = False
        self._name = name
        self._consumer = consumer
        self._circuits = circuits
        self._deliverer = Deliverer(
            name, handler, consumer, policy, circuits=circuits, quarantine=quarantine
        )
        self._backlog = Backlog()
        self._window_freed = asyncio.Event()
        self._slots_of_waiting = 0
        self._slots_per_waiting = 0 if destination_of(handler) else 1
        # Retries use at most half of the concurrency, so that new entries do not wait for them.
        self._running_retries, self._max_running_retries = 0, max(1, policy.concurrency // 2)
        self._retry_timer: asyncio.TimerHandle | None = None
        self._tasks = cancellation.TaskGroup()
        self._reading: asyncio.Task[None] | None = None

    @property
    def parked(self) -> int:
        """How many entries are parked."""
        return self._backlog.parked

    async def run(self) -> None:
        """Deliver until stopped; then finish the calls that have begun, and leave the rest pending.

        Raises:
            BaseExceptionGroup: With `LeaseLostError`, or what else the consumer raised.
        """
        if self._deliverer.is_stopping:
            return
        self._reading = self._tasks.start(self._read())
        try:
            await self._tasks.wait()
        finally:
            self._circuits.remove_waiting(self)
            if self._retry_timer is not None:
                self._retry_timer.cancel()
            await self._deliverer.cancel_calls()
        await self._record_unstarted()

    def stop(self) -> None:
        """Read no more, and begin no more calls."""
        self._deliverer.is_stopping = True
        if self._reading is not None:
            self._tasks.cancel(self._reading)
        self._circuits.remove_waiting(self)

    @property
    def _is_ending(self) -> bool:
        return self._deliverer.is_stopping or self._tasks.is_ending

    # Reading, within the window.

    async def _read(self) -> None:
        """Claim pending entries, then read new ones, while there are free slots in the window."""
        async for deliveries in self._consumer.claim_pending():
            self._add(deliveries)
            await self._wait_for_window()
        while True:
            deliveries = await self._consumer.read(min(MAX_PER_READ, self._free_slots()))
            self._add(deliveries)
            if not deliveries:
                await self._consumer.wait_for_entries()
            await self._wait_for_window()

    def _free_slots(self) -> int:
        """Return how many more entries may be read."""
        was_paused = self.is_reading_paused
        max_parked = MAX_PARKED * READ_AGAIN_BELOW if was_paused else MAX_PARKED
        self.is_reading_paused = self.parked >= max_parked
        if self.is_reading_paused and not was_paused:
            log.error("reading.paused", handler=self._name, parked=self.parked)
        return 0 if self.is_reading_paused else self._free_window()

    def _free_window(self) -> int:
        return WINDOW - self._backlog.loaded - self._slots_of_waiting

    async def _wait_for_window(self) -> None:
        while self._free_slots() <= 0:
            self._window_freed.clear()
            await self._window_freed.wait()

    def _add(self, deliveries: list[Delivery]) -> None:
        """Put each entry behind those of its session, and start the sessions that are new."""
        for delivery in deliveries:
            session = self._backlog.add(delivery)
            if session is not None:
                self._start(session)
        if self._is_ending:
            # Raised again, since the client of Redis may have swallowed the cancellation.
            raise asyncio.CancelledError

    # Running sessions.

    def _start(self, session: Session) -> None:
        """Start a new session: among the retries, if its first entry is parked or has a history."""
        attempts = session.first.attempts
        if not session.loaded or attempts.failed or attempts.is_quarantined:
            self._schedule_retry(session, 0.0)
        elif not self._is_ending:
            self._tasks.start(self._run_session(session))

    async def _run_session(self, session: Session) -> None:
        """Deliver a session's entries one after the other, until one has to be tried again."""
        try:
            while session.deliveries:
                postponed = await self._deliverer.deliver(session)
                if isinstance(postponed, RetryAfter):
                    self._schedule_retry(session, postponed.delay_s)
                    return
                if postponed is not None:
                    self._wait_for_circuit(session, postponed.circuit)
                    return
                self._backlog.remove_first(session)
                self._window_freed.set()
        except StoppedError:
            pass
        finally:
            if session.circuit is not None:
                session.circuit.end_probe(session)

    def _wait_for_circuit(self, session: Session, circuit: CircuitBreaker) -> None:
        self._backlog.park(session)
        self._slots_of_waiting += self._slots_per_waiting
        self._window_freed.set()
        circuit.add_waiting(session, self)

    def resume(self, session: CircuitSession) -> None:
        """Run a session again that was waiting for a circuit."""
        self._slots_of_waiting -= self._slots_per_waiting
        self._schedule_retry(self._backlog.sessions[session.key], 0.0)

    def _schedule_retry(self, session: Session, delay_s: float) -> None:
        self._backlog.schedule_retry(session, asyncio.get_running_loop().time() + delay_s)
        self._window_freed.set()
        self._start_due_retries()

    def _start_due_retries(self) -> None:
        """Run the sessions whose retry is due, and set the timer for the next one."""
        if self._retry_timer is not None:
            self._retry_timer.cancel()
            self._retry_timer = None
        loop = asyncio.get_running_loop()
        while self._running_retries < self._max_running_retries and not self._is_ending:
            session = self._backlog.pop_due_retry(loop.time())
            if session is None:
                if (next_at := self._backlog.next_retry_at) is not None:
                    self._retry_timer = loop.call_at(next_at, self._start_due_retries)
                break
            self._running_retries += 1
            self._tasks.start(self._run_retry(session))

    async def _run_retry(self, session: Session) -> None:
        try:
            await self._run_session(session)
        finally:
            self._running_retries -= 1
            self._start_due_retries()

    # Stopping.

    async def _record_unstarted(self) -> None:
        """Record that the entries left were not started: their deliveries do not count.

        An entry in quarantine stays there: each of its deliveries was recorded before its call.
        """
        unstarted = [
            delivery
            for session in self._backlog.sessions.values()
            for delivery in session.deliveries
            if delivery.attempts.unresolved > 0 and not delivery.attempts.is_quarantined
        ]
        for i in range(0, len(unstarted), MAX_RECORDED_AT_ONCE):
            await asyncio.gather(
                *(
                    self._consumer.record_attempts(
                        one, one.attempts._replace(unresolved=one.attempts.unresolved - 1)
                    )
                    for one in unstarted[i : i + MAX_RECORDED_AT_ONCE]
                )
            )
