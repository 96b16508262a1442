"""The way out: which session is worked when, in order, within bounds. Knows no Redis and no queue.

A `Dispatcher` works one handler's entries of one partition for as long as the lease holds. Which
partitions are ours is decided in `worker`; how a consumer keeps its word, in `consumer`; what
becomes of one entry, in `delivery`. Time is the event loop's alone. A session is in one of three
states:

    working   a task delivers its entries, one after the other
    resting   its first entry has failed, and is tried again after a pause
    waiting   the queue cannot be reached: until the circuit closes, or for its turn to probe

A session that rests is parked (`backlog`) and takes no place of those that can go on. One that
waits is parked too, but keeps a place: while the queue is away, reading on gains nothing. Where
the handler has several destinations, it gains those of the others, and no place is kept.
"""

from __future__ import annotations

import asyncio

import structlog

from .. import cancellation
from ..handlers import Handler, destination_of
from .backlog import Backlog, Session
from .consumer import Delivery
from .deliverer import Deliverer, PartitionConsumer, Pause, StoppedError
from .retries import CircuitBreakers, CircuitSession, RetryPolicy

# Transitions in memory per handler and partition: back-pressure takes what comes above. What is
# claimed may exceed it by one batch, and sessions that go on after a rest by one entry each.
WINDOW = 512
MAX_PER_READ = 100
# Entries of which only the id is kept. Above it reading stops, healthy sessions or not.
MAX_PARKED = 20_000
READ_AGAIN_BELOW = 0.9
MAX_GIVEN_BACK_AT_ONCE = 1000

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Dispatcher:
    """Hands one consumer's deliveries to one handler, in order per session.

    Args:
        name: The handler's name.
        handler: Takes a transition; returning means it is safe.
        consumer: The consumer; its lease is held.
        policy: Concurrency, time limit and retries.
        circuits: Whether the handler reaches its destinations; one for all its dispatchers.
        quarantine: Held while a delivery that may have killed a worker is tried, so that what
            else runs in the process is not counted together with it.

    Attributes:
        is_full: Whether reading has stopped because too many entries are parked.
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
        self.is_full = False
        self._name = name
        self._consumer = consumer
        self._circuits = circuits
        self._deliverer = Deliverer(
            name, handler, consumer, policy, circuits=circuits, quarantine=quarantine
        )
        self._backlog = Backlog()
        self._waiting = 0
        self._place_of_one_waiting = 0 if destination_of(handler) else 1
        # Sessions that go on after a rest have half of the slots at most.
        self._resumed, self._max_resumed = 0, max(1, policy.concurrency // 2)
        self._alarm: asyncio.TimerHandle | None = None
        self._room = asyncio.Event()
        self._tasks = cancellation.TaskGroup()
        self._feeding: asyncio.Task[None] | None = None

    @property
    def parked(self) -> int:
        """How many entries are in hand by their id only."""
        return self._backlog.parked

    @property
    def in_hand(self) -> int:
        """How many entries are in hand, parked or not."""
        return self._backlog.loaded + self._backlog.parked

    async def run(self) -> None:
        """Work until stopped; then finish what has been started and leave the rest pending.

        Raises:
            BaseExceptionGroup: With `LeaseLostError`, or whatever the consumer raised.
        """
        if self._deliverer.is_stopping:
            return
        self._feeding = self._tasks.start(self._feed())
        try:
            await self._tasks.wait()
        finally:
            self._circuits.remove_waiting(self)
            if self._alarm is not None:
                self._alarm.cancel()
            await self._deliverer.end()
        await self._give_back()

    def stop(self) -> None:
        """Read no more and start no more."""
        self._deliverer.is_stopping = True
        if self._feeding is not None:
            self._tasks.cancel(self._feeding)
        self._circuits.remove_waiting(self)

    def resume(self, caller: CircuitSession) -> None:
        """Let a session go on that waited at the circuit."""
        self._waiting -= self._place_of_one_waiting
        self._rest(self._backlog.sessions[caller.key], 0.0)

    @property
    def _is_ending(self) -> bool:
        return self._deliverer.is_stopping or self._tasks.is_ending

    async def _feed(self) -> None:
        """Claim what is pending, then read what is new, for as long as there is room."""
        async for deliveries in self._consumer.claim_pending():
            self._accept(deliveries)
            await self._until_room()
        while True:
            deliveries = await self._consumer.read(min(MAX_PER_READ, self._places()))
            self._accept(deliveries)
            if not deliveries:
                await self._consumer.wait_for_entries()
            await self._until_room()

    def _places(self) -> int:
        """Return how many more transitions may be read."""
        bound = MAX_PARKED * READ_AGAIN_BELOW if self.is_full else MAX_PARKED
        was_full, self.is_full = self.is_full, self.parked >= bound
        if self.is_full and not was_full:
            log.error("reading.paused", handler=self._name, parked=self.parked)
        return 0 if self.is_full else WINDOW - self._backlog.loaded - self._waiting

    async def _until_room(self) -> None:
        while self._places() <= 0:
            self._room.clear()
            await self._room.wait()

    def _accept(self, deliveries: list[Delivery]) -> None:
        """Put each delivery behind those of its session, and start the sessions that are new."""
        for delivery in deliveries:
            session = self._backlog.add(delivery)
            if session is not None:
                self._begin(session)
        if self._is_ending:
            # Said again, should a client of Redis have kept the cancellation to itself.
            raise asyncio.CancelledError

    def _begin(self, session: Session) -> None:
        """Start a session. What failed before or is suspected goes with those that have rested."""
        attempts = session.first.attempts
        if not session.loaded or attempts.failed or attempts.is_quarantined:
            self._rest(session, 0.0)
        elif not self._is_ending:
            self._tasks.start(self._work(session))

    def _rest(self, session: Session, pause_s: float) -> None:
        self._backlog.rest(session, asyncio.get_running_loop().time() + pause_s)
        self._room.set()
        self._start_due()

    def _start_due(self) -> None:
        """Let sessions go on whose rest is over, and set the alarm for the next."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        loop = asyncio.get_running_loop()
        while self._resumed < self._max_resumed and not self._is_ending:
            session = self._backlog.pop_due(loop.time())
            if session is None:
                if (due := self._backlog.next_due) is not None:
                    self._alarm = loop.call_at(due, self._start_due)
                break
            self._resumed += 1
            self._tasks.start(self._work_again(session))

    async def _work_again(self, session: Session) -> None:
        try:
            await self._work(session)
        finally:
            self._resumed -= 1
            self._start_due()

    async def _work(self, session: Session) -> None:
        """Deliver a session's entries one after the other, until one has to be tried again."""
        try:
            while session.deliveries:
                pause = await self._deliverer.deliver(session)
                if pause is not None:
                    self._park(session, pause)
                    break
                self._backlog.remove_first(session)
                self._room.set()
        except StoppedError:
            pass
        finally:
            if session.circuit is not None:
                session.circuit.end_probe(session)

    def _park(self, session: Session, pause: Pause) -> None:
        if pause.seconds is not None or session.circuit is None:
            self._rest(session, pause.seconds or 0.0)
            return
        self._backlog.park(session)
        self._waiting += self._place_of_one_waiting
        self._room.set()
        session.circuit.add_waiting(session, self)

    async def _give_back(self) -> None:
        """Write down that what is left in hand was not started, so that it is not quarantined."""
        left = [
            delivery
            for session in self._backlog.sessions.values()
            for delivery in session.deliveries
            if delivery.attempts.deliveries > 0 and not delivery.attempts.is_quarantined
        ]
        for i in range(0, len(left), MAX_GIVEN_BACK_AT_ONCE):
            await asyncio.gather(
                *(
                    self._consumer.record_attempts(
                        one, one.attempts._replace(deliveries=one.attempts.deliveries - 1)
                    )
                    for one in left[i : i + MAX_GIVEN_BACK_AT_ONCE]
                )
            )
