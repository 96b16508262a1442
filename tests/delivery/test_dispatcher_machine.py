"""The law of dispatching, searched in virtual time: several workers, and everything goes wrong.

Hypothesis makes up transitions, failing handlers, lost and slow replies, lost leases, pauses,
kills and outages; a store in memory stands for Redis, fenced as its scripts are. `depth` says how
to search further, and how a failure is repeated.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn, TypeVar

import pytest
import structlog.testing
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from service.delivery.consumer import QUARANTINE_AFTER, Attempts, Delivery, Missing
from service.delivery.deliverer import MAX_DELIVERIES_WITHOUT_OUTCOME, DeadLetterReason
from service.delivery.dispatcher import Dispatcher
from service.delivery.leases import LeaseLostError
from service.delivery.retries import CircuitBreakers, RetryPolicy
from service.errors import Undeliverable
from service.transitions.transition import StatusTransition
from tests.support.depth import SEARCH_TIMEOUT_S, searching
from tests.support.dispatching import Entry, entry, transition
from tests.support.virtual_time import VirtualTimeLoop

Found = TypeVar("Found")

POLICY = RetryPolicy(concurrency=3, timeout_s=10, initial_delay_s=1, max_delay_s=8, max_attempts=3)
TTL_S = 10.0
BATCH = 2
LATENCY_S = 0.01
MAX_WORKERS = 3

SESSIONS = st.lists(st.sampled_from("abc"), min_size=1, max_size=6)
FATES = st.lists(
    st.sampled_from(
        ["well", "slow", "fails", "fails", "halves", "cancels", "disconnects", "hangs", "refuses"]
    ),
    max_size=8,
)
FAULTS = st.lists(st.sampled_from(["", "", "", "request", "reply", "slow", "twice"]), max_size=6)
PAUSES = st.sampled_from([0, 0.015, 0.1, 1, 4, 12, 60])


class World:
    """What a store, its workers and the outside world know of each other.

    Attributes:
        fates: What becomes of the next calls of the handler.
        faults: What becomes of the next calls of a consumer.
        outage: Whether the handler's queue is out of reach.
        interruptions: How often anything came between a worker and its entries.
        copies: How many entries were read once more.
        refusals: Those of the failures that were connection errors.
        violations: Laws that were broken, where no assertion would be heard.
    """

    def __init__(self, loop: VirtualTimeLoop) -> None:
        self.loop = loop
        self.fates: deque[str] = deque()
        self.faults: deque[str] = deque()
        self.outage = False
        self.interruptions = 0
        self.copies = 0
        self.violations: list[str] = []
        self.last: Counter[str] = Counter()
        self.calls: Counter[Entry] = Counter()
        self.failures: Counter[Entry] = Counter()
        self.refusals: Counter[Entry] = Counter()
        self.successes: set[tuple[Worker, Entry]] = set()

    def hold(self, law: str, *, holds: bool) -> None:
        """Remember that a law was broken."""
        if not holds:
            self.violations.append(law)


class Store:
    """Redis as one partition of one handler sees it: entries, pending ones, a lease that ends."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.stream: list[StatusTransition] = []
        self.pending: dict[int, Attempts] = {}
        self.consumers: dict[int, Worker] = {}
        self.settled: list[Entry] = []
        self.buried: list[Entry] = []
        self.read_to = 0
        self.owner: Box | None = None
        self.until = 0.0
        self.grown = asyncio.Event()

    def admit(self, one: Entry) -> None:
        """Append to the stream."""
        self.stream.append(transition(*one))
        self.grown.set()

    def lease(self, box: Box, *, renew: bool) -> bool:
        """Give the lease to *box*, or prolong it."""
        now = self.world.loop.time()
        if now >= self.until:
            self.owner = None
        if self.owner is not box and (renew or self.owner is not None):
            return False
        self.owner, self.until = box, now + TTL_S
        return True

    def owns(self, box: Box) -> bool:
        """Say whether the lease is still that box's."""
        return self.owner is box and self.world.loop.time() < self.until

    @property
    def is_done(self) -> bool:
        """Whether everything was settled or buried."""
        return not self.pending and self.read_to == len(self.stream)


class Box:
    """One worker's consumer: every call is fenced, and may be lost, late, or answered twice."""

    def __init__(self, store: Store, worker: Worker) -> None:
        self.store = store
        self.worker = worker
        self.deadline = 0.0

    def has_lease(self) -> bool:
        """Say whether the lease holds, by the worker's clock."""
        return self.store.world.loop.time() < self.deadline

    async def claim_pending(self) -> AsyncIterator[list[Delivery]]:
        """Claim what pends; what another worker had gains a start."""
        at = -1
        while True:
            found = await self._ask(lambda first=at: self._claimed(first))  # type: ignore[misc]
            if not found:
                return
            at = int(found[-1].entry_id)
            yield found

    def _claimed(self, after: int) -> list[Delivery]:
        store = self.store
        for i in sorted(i for i in store.pending if i > after)[:BATCH]:
            failed, deliveries = store.pending[i]
            strange = store.consumers[i] is not self.worker and deliveries < QUARANTINE_AFTER
            store.pending[i] = Attempts(failed, deliveries + strange)
            store.consumers[i] = self.worker
        return [self._delivery(i) for i in sorted(i for i in store.pending if i > after)[:BATCH]]

    async def read(self, most: int) -> list[Delivery]:
        """Return what is new, and perhaps, once more, what was read before."""
        store = self.store

        def act() -> list[Delivery]:
            new = range(store.read_to, min(store.read_to + most, len(store.stream)))
            store.read_to = new.stop
            store.pending |= dict.fromkeys(new, Attempts(0, 1))
            store.consumers |= dict.fromkeys(new, self.worker)
            return [self._delivery(i) for i in new]

        twice = "twice" in list(store.world.faults)[:1]
        found = await self._ask(act)
        again = [self._delivery(i) for i in [*store.pending][:1] if twice]
        store.world.copies += len(again)
        return found + again

    async def load(self, delivery: Delivery) -> StatusTransition | Missing:
        """Return what an entry holds."""
        return await self._ask(lambda: self.store.stream[int(delivery.entry_id)])

    async def ack(self, delivery: Delivery) -> None:
        """Settle what the handler has taken."""
        one = self._entry(delivery)

        def act() -> None:
            self.store.world.hold(
                "only what was handed over is settled",
                holds=(self.worker, one) in self.store.world.successes,
            )
            if self.store.pending.pop(int(delivery.entry_id), None) is not None:
                self.store.settled.append(one)

        await self._ask(act)

    async def record_attempts(self, delivery: Delivery, attempts: Attempts) -> None:
        """Write attempts down."""
        one, store = self._entry(delivery), self.store

        def act() -> None:
            made = store.world.failures[one]
            store.world.hold("no failure is counted that was none", holds=attempts.failed <= made)
            if int(delivery.entry_id) in store.pending:
                store.pending[int(delivery.entry_id)] = attempts

        await self._ask(act)

    async def dead_letter(
        self, delivery: Delivery, *, reason: str, error: str, attempts: int, place: str = ""
    ) -> int:
        """Bury what nobody can deliver."""
        one, store, world = self._entry(delivery), self.store, self.store.world

        def act() -> int:
            world.hold("only what was tried is buried", holds=world.calls[one] > 0)
            if reason == DeadLetterReason.EXHAUSTED:
                enough = attempts == POLICY.max_attempts <= world.failures[one]
                world.hold("exhausted means that all attempts were made", holds=enough)
            if reason == DeadLetterReason.KILLED_WORKER:
                enough = world.interruptions >= MAX_DELIVERIES_WITHOUT_OUTCOME
                world.hold("a killer has killed", holds=enough)
            if store.pending.pop(int(delivery.entry_id), None) is not None:
                store.buried.append(one)
            return len(store.buried) + 1

        return await self._ask(act)

    async def wait_for_entries(self) -> None:
        """Wait until the stream has grown past what was read."""
        self.store.grown.clear()
        if self.store.read_to >= len(self.store.stream):
            await self.store.grown.wait()

    def _delivery(self, i: int) -> Delivery:
        return Delivery(str(i), self.store.stream[i], self.store.pending[i])

    def _entry(self, delivery: Delivery) -> Entry:
        return entry(self.store.stream[int(delivery.entry_id)])

    async def _ask(self, act: Callable[[], Found]) -> Found:
        """Do *act* if the lease is ours, unless the weather is against it."""
        world = self.store.world
        fault = world.faults.popleft() if world.faults else ""
        world.interruptions += fault in {"request", "reply"}
        await asyncio.sleep(LATENCY_S)
        if fault == "request":
            raise RedisConnectionError
        if not self.store.owns(self):
            self.deadline = 0.0
            world.interruptions += 1
            raise LeaseLostError
        answer = act()
        await asyncio.sleep(TTL_S / 2 if fault == "slow" else LATENCY_S)
        if fault == "reply":
            raise RedisConnectionError
        return answer


class Worker:
    """Takes the lease when it is free, keeps it, and dispatches, as the real one does."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.world = store.world
        self.is_stopping = False
        self._running = 0
        self._circuits = CircuitBreakers("journal", initial_delay_s=POLICY.initial_delay_s)
        self._quarantine = asyncio.Lock()
        self._dispatching: asyncio.Task[None] | None = None
        self._dispatcher: Dispatcher | None = None
        self.task = self.world.loop.create_task(self._live())

    def stop(self) -> None:
        """Finish what is started, then leave."""
        self.is_stopping = True
        if self._dispatcher is not None:
            self._dispatcher.stop()

    def kill(self) -> None:
        """End at once; the lease stays where it is until it runs out."""
        self.world.interruptions += 1
        self.is_stopping = True
        for task in (self.task, self._dispatching):
            if task is not None:
                task.cancel()

    async def _live(self) -> None:
        while not self.is_stopping:
            box, before = Box(self.store, self), self.world.loop.time()
            if self.store.lease(box, renew=False):
                box.deadline = before + TTL_S
                await self._tenure(box)
            else:
                await asyncio.sleep(0.7)

    async def _tenure(self, box: Box) -> None:
        keeping = asyncio.create_task(self._keep(box))
        try:
            while box.has_lease() and not self.is_stopping:
                await self._dispatch(box)
        finally:
            keeping.cancel()
        if self.store.owner is box:
            self.store.owner = None

    async def _dispatch(self, box: Box) -> None:
        """Dispatch until stopped or until an error, which has to be one that is meant."""
        self._dispatcher = Dispatcher(
            "journal",
            self._handle,
            box,
            POLICY,
            circuits=self._circuits,
            quarantine=self._quarantine,
        )
        self._dispatching = asyncio.create_task(self._dispatcher.run())
        await asyncio.wait([self._dispatching])
        if not self._dispatching.cancelled() and (error := self._dispatching.exception()):
            meant = (LeaseLostError, RedisConnectionError)
            group = BaseExceptionGroup("alone, or in a group", [error])
            rest = group.split(meant)[1]
            self.world.hold(f"no error but those of the consumer: {rest!r}", holds=rest is None)
            await asyncio.sleep(0.3)

    async def _keep(self, box: Box) -> None:
        while True:
            await asyncio.sleep(TTL_S / 3)
            before = self.world.loop.time()
            if not self.store.lease(box, renew=True):
                self.world.interruptions += 1
                box.deadline = 0.0
                if self._dispatching is not None:
                    self._dispatching.cancel()
                return
            box.deadline = before + TTL_S

    async def _handle(self, taken: StatusTransition) -> None:
        one, world = entry(taken), self.world
        session, sequence = one
        done = {*self.store.settled, *self.store.buried}
        before = {(session, n) for n in range(1, sequence)}
        world.hold(f"what came before is done: {one}", holds=before <= done)
        world.hold(
            f"first deliveries are in order: {one}", holds=sequence <= world.last[session] + 1
        )
        world.last[session] = max(world.last[session], sequence)
        world.calls[one] += 1
        self._running += 1
        world.hold("concurrency is bounded", holds=self._running <= POLICY.concurrency)
        try:
            await self._meet_its_fate()
        except BaseException as error:
            world.failures[one] += 1
            world.refusals[one] += isinstance(error, ConnectionError)
            raise
        finally:
            self._running -= 1
        world.successes.add((self, one))

    async def _meet_its_fate(self) -> None:
        fate = self.world.fates.popleft() if self.world.fates else "well"
        if self.world.outage:
            await asyncio.sleep(LATENCY_S)
            raise ConnectionRefusedError
        errors = {
            "fails": ValueError,
            "cancels": asyncio.CancelledError,
            "disconnects": ConnectionResetError,
            "refuses": Undeliverable,
        }
        await asyncio.sleep({"slow": 3.0, "hangs": 60.0}.get(fate, LATENCY_S))
        if fate == "halves":
            # Before Python 3.13 this leaves its task half canceled.
            async with asyncio.TaskGroup() as group:
                group.create_task(_fail())
        if fate in errors:
            raise errors[fate]


async def _fail() -> NoReturn:
    raise ValueError


class Dispatching(RuleBasedStateMachine):
    """Lets workers work in bad weather, and at the end in good."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=VirtualTimeLoop)
        loop: Any = self.runner.get_loop()
        self.world = World(loop)
        self.store = Store(self.world)
        self.workers: list[Worker] = []
        self.told: Counter[str] = Counter()

    def pass_time(self, seconds: float) -> None:
        """Let the loop run for so long."""
        self.runner.run(asyncio.sleep(seconds))
        self.workers = [worker for worker in self.workers if not worker.task.done()]

    @initialize(sessions=SESSIONS)
    def begin(self, sessions: list[str]) -> None:
        """A worker starts, and has something to do."""
        self.admit(sessions)
        self.workers.append(Worker(self.store))

    @rule(sessions=SESSIONS, fates=FATES, faults=FAULTS, seconds=PAUSES)
    def live(
        self, sessions: list[str], fates: list[str], faults: list[str], seconds: float
    ) -> None:
        """Sessions move on, calls end as they have to, and time passes."""
        self.admit(sessions)
        self.world.fates.extend(fates)
        self.world.faults.extend(faults)
        self.pass_time(seconds)

    @rule(fates=FATES, seconds=PAUSES)
    def suffer(self, fates: list[str], seconds: float) -> None:
        """The next calls end as they have to, and time passes."""
        self.world.fates.extend(fates)
        self.pass_time(seconds)

    @rule(seconds=PAUSES)
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.pass_time(seconds)

    def admit(self, sessions: list[str]) -> None:
        """Append to the stream what comes next of each session."""
        for session in sessions:
            self.told[session] += 1
            self.store.admit((session, self.told[session]))

    @precondition(lambda self: len(self.workers) < MAX_WORKERS)
    @rule()
    def start(self) -> None:
        """One more worker starts."""
        self.workers.append(Worker(self.store))
        self.pass_time(0)

    @precondition(lambda self: self.workers)
    @rule(which=st.integers(0, MAX_WORKERS))
    def stop(self, which: int) -> None:
        """A worker is told to stop."""
        self.workers[which % len(self.workers)].stop()

    @precondition(lambda self: self.workers)
    @rule(which=st.integers(0, MAX_WORKERS))
    def kill(self, which: int) -> None:
        """A worker is killed."""
        self.workers[which % len(self.workers)].kill()
        self.pass_time(0)

    @rule(seconds=st.sampled_from([1.0, TTL_S - 0.5, TTL_S + 1, 5 * TTL_S]))
    def pause(self, seconds: float) -> None:
        """The process stands still, perhaps past its leases."""
        self.world.interruptions += 1
        self.world.loop.advance(seconds)

    @rule()
    def forget_lease(self) -> None:
        """Redis loses the lease; whoever had it goes on until it is told."""
        self.world.interruptions += 1
        self.store.owner = None
        self.pass_time(0.8)

    @precondition(lambda self: not self.world.faults)
    @rule(minutes=st.integers(1, 30))
    def lose_the_queue(self, minutes: int) -> None:
        """The queue is out of reach for long: that costs an entry one attempt at the most."""
        self.world.outage = True
        store, interrupted = self.store, self.world.interruptions
        before = {entry(store.stream[i]): attempts.failed for i, attempts in store.pending.items()}
        buried = len(store.buried)
        self.pass_time(minutes * 60)
        self.world.outage = False
        after = {entry(store.stream[i]): attempts.failed for i, attempts in store.pending.items()}
        after |= dict.fromkeys(store.buried[buried:], POLICY.max_attempts)
        most = len(self.workers) + self.world.interruptions - interrupted
        assert all(failed - before.get(one, 0) <= most for one, failed in after.items())

    @invariant()
    def no_law_is_broken(self) -> None:
        """Order, fencing, honest counts, and no more attempts than the policy has."""
        assert not self.world.violations
        world = self.world
        most = POLICY.max_attempts * (1 + world.copies) + world.interruptions
        for one, failures in world.failures.items():
            assert failures - world.refusals[one] <= most

    def teardown(self) -> None:
        """Hold that in calm weather everything is settled or buried, once, and soon."""
        self.world.fates.clear()
        self.world.faults.clear()
        self.workers.append(Worker(self.store))
        for _ in range(60):
            if self.store.is_done:
                break
            self.pass_time(30)
        for worker in self.workers:
            worker.stop()
        self.pass_time(30)
        assert not self.workers
        self.runner.close()
        everything = {(name, n) for name, most in self.told.items() for n in range(1, most + 1)}
        assert sorted(self.store.settled + self.store.buried) == sorted(everything)
        assert everything == self.world.calls.keys()
        assert not self.world.violations


@pytest.mark.timeout(SEARCH_TIMEOUT_S)
def test_in_any_weather_nothing_is_lost_or_out_of_order() -> None:
    """Order per session, at least once, honest and bounded attempts, whoever fails whenever."""
    with structlog.testing.capture_logs():
        run_state_machine_as_test(Dispatching, settings=searching(60, steps=40))
