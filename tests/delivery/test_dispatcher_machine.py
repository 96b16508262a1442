"""A random search in virtual time: several workers dispatch, and everything goes wrong.

Hypothesis generates transitions, failing handlers, lost and slow replies, lost leases, pauses,
kills and outages. A store in memory stands for Redis, with the same fencing. `depth` says how
to search further, and how a failure is repeated.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
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

from service.delivery.consumer import QUARANTINE_AFTER, Attempts, Consumer, Delivery, Missing
from service.delivery.deliverer import MAX_DELIVERIES_WITHOUT_OUTCOME, DeadLetterReason
from service.delivery.dispatcher import Dispatcher
from service.delivery.failure_log import FailureLog
from service.delivery.leases import Lease, LeaseLostError
from service.delivery.partition_task import PartitionTask
from service.delivery.retries import CircuitBreakers, RetryPolicy
from service.errors import Undeliverable
from service.transitions.transition import StatusTransition
from tests.support.depth import SEARCH_TIMEOUT_S, searching
from tests.support.dispatching import HANDLER, Entry, FakeConsumer, entry
from tests.support.virtual_time import VirtualTimeLoop

Found = TypeVar("Found")

POLICY = RetryPolicy(concurrency=3, timeout_s=10, initial_delay_s=1, max_delay_s=8, max_attempts=3)
TTL_S = 10.0
BATCH = 2
LATENCY_S = 0.01
MAX_WORKERS = 3

SESSIONS = st.lists(st.sampled_from("abc"), min_size=1, max_size=6)
OUTCOMES = st.lists(
    st.sampled_from(
        [
            *("succeeds", "slow", "fails", "fails", "halves", "cancels", "disconnects"),
            *("hangs", "undeliverable"),
        ]
    ),
    max_size=8,
)
FAULTS = st.lists(st.sampled_from(["", "", "", "request", "reply", "slow", "twice"]), max_size=6)
PAUSES = st.sampled_from([0, 0.015, 0.1, 1, 4, 12, 60])


class World:
    """What the store, the workers and the destination share, and the rules that were broken.

    Attributes:
        outcomes: How the next calls of the handler end.
        faults: What happens to the next calls of a consumer.
        outage: Whether the handler's destination is unreachable.
        interruptions: How often a worker lost a reply, its lease or its life.
        copies: How many entries were read twice.
        unreachables: The failures that were connection errors.
        violations: Rules that were broken, where nothing would see an assertion.
    """

    def __init__(self, loop: VirtualTimeLoop) -> None:
        self.loop = loop
        self.outcomes: deque[str] = deque()
        self.faults: deque[str] = deque()
        self.outage = False
        self.interruptions = 0
        self.copies = 0
        self.violations: list[str] = []
        self.last: Counter[str] = Counter()
        self.calls: Counter[Entry] = Counter()
        self.failures: Counter[Entry] = Counter()
        self.unreachables: Counter[Entry] = Counter()
        self.successes: set[tuple[Worker, Entry]] = set()

    def check(self, rule: str, *, holds: bool) -> None:
        """Record a rule that is broken."""
        if not holds:
            self.violations.append(rule)


class Store(FakeConsumer):
    """One partition of one handler in Redis, as all consumers see it, and a lease that expires."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.consumers: dict[int, Worker] = {}
        self.owner: MachineLease | None = None
        self.until = 0.0

    @property
    def dead(self) -> list[Entry]:
        """Which entries are dead letters."""
        return [one for one, *_ in self.dead_letters]

    def owns(self, lease: Lease) -> bool:
        """Return whether *lease* is held."""
        return self.owner is lease and self.world.loop.time() < self.until

    async def claim(self, worker: Worker, after: int) -> list[Delivery]:
        """Claim a batch of pending entries; those of another worker count one delivery more."""
        batch = sorted(i for i in self.pending if i > after)[:BATCH]
        for i in batch:
            failed, deliveries = self.pending[i]
            is_other_worker = self.consumers[i] is not worker and deliveries < QUARANTINE_AFTER
            self.pending[i] = Attempts(failed, deliveries + is_other_worker)
            self.consumers[i] = worker
        return [self.delivery(i) for i in batch]

    async def read_as(self, worker: Worker, max_entries: int) -> list[Delivery]:
        """Return new entries."""
        found = await self.read(max_entries)
        self.consumers |= {int(one.entry_id): worker for one in found}
        return found

    def _remove(self, delivery: Delivery) -> bool:
        return self.pending.pop(int(delivery.entry_id), None) is not None

    async def _call(self, name: str) -> None:
        """Do nothing: what goes wrong on the way here does so in `MachineConsumer`."""


class MachineLease(Lease):
    """The lease of one worker in the store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.handler, self.partition = HANDLER, 0
        self.lose()

    def is_granted(self, *, renew: bool) -> bool:
        """Take or renew the lease."""
        store, now = self.store, self.store.world.loop.time()
        if now >= store.until:
            store.owner = None
        if store.owner is not self and (renew or store.owner is not None):
            self.lose()
            return False
        store.owner, store.until = self, now + TTL_S
        self.extend(store.until)
        return True

    async def release(self) -> None:
        """Let another worker take the lease."""
        self.lose()
        if self.store.owner is self:
            self.store.owner = None


class MachineConsumer(Consumer):
    """A worker's consumer: every call is fenced, and may be lost, late, or answered twice."""

    def __init__(self, lease: MachineLease, worker: Worker) -> None:
        self.lease = lease
        self.store = lease.store
        self.world = lease.store.world
        self.worker = worker

    async def claim_pending(self) -> AsyncIterator[list[Delivery]]:
        """Claim pending entries."""
        at = -1
        while found := await self._ask(self.store.claim, self.worker, at):
            at = int(found[-1].entry_id)
            yield found

    async def read(self, max_entries: int) -> list[Delivery]:
        """Return new entries, and perhaps one that was read before."""
        twice = "twice" in list(self.world.faults)[:1]
        found = await self._ask(self.store.read_as, self.worker, max_entries)
        again = [self.store.delivery(i) for i in [*self.store.pending][:1] if twice]
        self.world.copies += len(again)
        return found + again

    async def load(self, delivery: Delivery) -> StatusTransition | Missing:
        """Return an entry's transition."""
        return await self._ask(self.store.load, delivery)

    async def ack(self, delivery: Delivery) -> None:
        """Acknowledge an entry that the handler has taken."""
        taken = (self.worker, self.store.entry(delivery)) in self.world.successes
        self.world.check("only what the handler took is acknowledged", holds=taken)
        await self._ask(self.store.ack, delivery)

    async def record_attempts(
        self, delivery: Delivery, attempts: Attempts, *, error: str = "", place: str = ""
    ) -> None:
        """Record attempts."""
        made = self.world.failures[self.store.entry(delivery)]
        self.world.check("only failures are recorded as such", holds=attempts.failed <= made)
        await self._ask(self.store.record_attempts, delivery, attempts)

    async def dead_letter(
        self, delivery: Delivery, *, reason: str, error: str, attempts: int, place: str = ""
    ) -> int | None:
        """Make an entry a dead letter."""
        one, world = self.store.entry(delivery), self.world
        world.check("only entries that were tried are dead letters", holds=world.calls[one] > 0)
        if reason == DeadLetterReason.EXHAUSTED:
            enough = attempts == POLICY.max_attempts <= world.failures[one]
            world.check("all attempts were made", holds=enough)
        if reason == DeadLetterReason.KILLED_WORKER:
            enough = world.interruptions >= MAX_DELIVERIES_WITHOUT_OUTCOME
            world.check("workers died before", holds=enough)
        return await self._ask(
            partial(self.store.dead_letter, reason=reason, error=error, attempts=attempts), delivery
        )

    async def wait_for_entries(self) -> None:
        """Wait until the stream is longer than what was read."""
        await self.store.wait_for_entries()

    async def _ask(self, act: Callable[..., Awaitable[Found]], *arguments: Any) -> Found:
        """Let the store *act* if the lease is held, unless the next fault prevents it."""
        world = self.world
        fault = world.faults.popleft() if world.faults else ""
        world.interruptions += fault in {"request", "reply"}
        await asyncio.sleep(LATENCY_S)
        if fault == "request":
            raise RedisConnectionError
        if not self.store.owns(self.lease):
            self.lease.lose()
            world.interruptions += 1
            raise LeaseLostError
        answer = await act(*arguments)
        await asyncio.sleep(TTL_S / 2 if fault == "slow" else LATENCY_S)
        if fault == "reply":
            raise RedisConnectionError
        return answer


class Worker:
    """Takes the lease when it is free and renews it while a task works under it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.world = store.world
        self.is_stopping = False
        self._running = 0
        self._circuits = CircuitBreakers(HANDLER, initial_delay_s=POLICY.initial_delay_s)
        self._quarantine = asyncio.Lock()
        self._work: PartitionTask | None = None
        self.task = self.world.loop.create_task(self._live())

    def stop(self) -> None:
        """Finish the calls that have begun, then end."""
        self.is_stopping = True
        if self._work is not None:
            self._work.stop()

    def kill(self) -> None:
        """End at once; the lease remains until it expires."""
        self.world.interruptions += 1
        self.is_stopping = True
        self.task.cancel()
        if self._work is not None:
            self._work.lease.release = _do_nothing  # type: ignore[method-assign]
            self._work.abandon()

    async def _live(self) -> None:
        while not self.is_stopping:
            lease = MachineLease(self.store)
            if lease.is_granted(renew=False):
                self._work = PartitionTask(lease, self._new_dispatcher, _do_nothing, FailureLog())
                await self._renew_while_working(lease, self._work)
            else:
                await asyncio.sleep(0.7)

    async def _renew_while_working(self, lease: MachineLease, work: PartitionTask) -> None:
        while not (await asyncio.wait([work.task], timeout=TTL_S / 3))[0]:
            if not lease.is_granted(renew=True):
                self.world.interruptions += 1
                work.abandon()

    def _new_dispatcher(self, lease: Lease) -> Dispatcher:
        assert isinstance(lease, MachineLease)
        return Dispatcher(
            HANDLER,
            self._handle,
            MachineConsumer(lease, self),
            POLICY,
            circuits=self._circuits,
            quarantine=self._quarantine,
        )

    async def _handle(self, taken: StatusTransition) -> None:
        one, world = entry(taken), self.world
        session, sequence = one
        done = {*self.store.acked, *self.store.dead}
        before = {(session, n) for n in range(1, sequence)}
        world.check(f"earlier entries are done with: {one}", holds=before <= done)
        world.check(
            f"first deliveries are in order: {one}", holds=sequence <= world.last[session] + 1
        )
        world.last[session] = max(world.last[session], sequence)
        world.calls[one] += 1
        self._running += 1
        world.check("concurrency is bounded", holds=self._running <= POLICY.concurrency)
        try:
            await self._end_as_drawn()
        except BaseException as error:
            world.failures[one] += 1
            world.unreachables[one] += isinstance(error, ConnectionError)
            raise
        finally:
            self._running -= 1
        world.successes.add((self, one))

    async def _end_as_drawn(self) -> None:
        outcome = self.world.outcomes.popleft() if self.world.outcomes else "succeeds"
        if self.world.outage:
            await asyncio.sleep(LATENCY_S)
            raise ConnectionRefusedError
        errors = {
            "fails": ValueError,
            "cancels": asyncio.CancelledError,
            "disconnects": ConnectionResetError,
            "undeliverable": Undeliverable,
        }
        await asyncio.sleep({"slow": 3.0, "hangs": 60.0}.get(outcome, LATENCY_S))
        if outcome == "halves":
            # Before Python 3.13 this leaves its task half canceled.
            async with asyncio.TaskGroup() as group:
                group.create_task(_fail())
        if outcome in errors:
            raise errors[outcome]


async def _fail() -> NoReturn:
    raise ValueError


async def _do_nothing() -> None:
    pass


class Dispatching(RuleBasedStateMachine):
    """Workers with faults, and at the end without."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=VirtualTimeLoop)
        loop: Any = self.runner.get_loop()
        self.world = World(loop)
        self.store = Store(self.world)
        self.workers: list[Worker] = []
        self.admitted: Counter[str] = Counter()

    def pass_time(self, seconds: float) -> None:
        """Run the loop."""
        self.runner.run(asyncio.sleep(seconds))
        self.workers = [worker for worker in self.workers if not worker.task.done()]

    @initialize(sessions=SESSIONS)
    def begin(self, sessions: list[str]) -> None:
        """A worker starts, with entries to deliver."""
        self.admit(sessions)
        self.workers.append(Worker(self.store))

    @rule(sessions=SESSIONS, outcomes=OUTCOMES, faults=FAULTS, seconds=PAUSES)
    def live(
        self, sessions: list[str], outcomes: list[str], faults: list[str], seconds: float
    ) -> None:
        """Transitions arrive, calls and requests end as drawn, and time passes."""
        self.admit(sessions)
        self.world.outcomes.extend(outcomes)
        self.world.faults.extend(faults)
        self.pass_time(seconds)

    @rule(outcomes=OUTCOMES, seconds=PAUSES)
    def end_calls(self, outcomes: list[str], seconds: float) -> None:
        """Calls end as drawn, and time passes."""
        self.world.outcomes.extend(outcomes)
        self.pass_time(seconds)

    def admit(self, sessions: list[str]) -> None:
        """Append the next transition of each session."""
        for session in sessions:
            self.admitted[session] += 1
            self.store.add((session, self.admitted[session]))

    @precondition(lambda self: len(self.workers) < MAX_WORKERS)
    @rule()
    def start(self) -> None:
        """Another worker starts."""
        self.workers.append(Worker(self.store))
        self.pass_time(0)

    @precondition(lambda self: self.workers)
    @rule(which=st.integers(0, MAX_WORKERS))
    def stop(self, which: int) -> None:
        """A worker is stopped."""
        self.workers[which % len(self.workers)].stop()

    @precondition(lambda self: self.workers)
    @rule(which=st.integers(0, MAX_WORKERS))
    def kill(self, which: int) -> None:
        """A worker is killed."""
        self.workers[which % len(self.workers)].kill()
        self.pass_time(0)

    @rule(seconds=st.sampled_from([1.0, TTL_S - 0.5, TTL_S + 1, 5 * TTL_S]))
    def pause(self, seconds: float) -> None:
        """The process is suspended, perhaps for longer than its leases."""
        self.world.interruptions += 1
        self.world.loop.advance(seconds)

    @rule()
    def forget_lease(self) -> None:
        """Redis loses the lease; its holder goes on until it notices."""
        self.world.interruptions += 1
        self.store.owner = None
        self.pass_time(0.8)

    @precondition(lambda self: not self.world.faults)
    @rule(minutes=st.integers(1, 30))
    def lose_the_destination(self, minutes: int) -> None:
        """The destination is unreachable for long; an entry loses one attempt at most."""
        self.world.outage = True
        store, interrupted = self.store, self.world.interruptions
        before = {entry(store.stream[i]): attempts.failed for i, attempts in store.pending.items()}
        dead_letters = len(store.dead_letters)
        self.pass_time(minutes * 60)
        self.world.outage = False
        after = {entry(store.stream[i]): attempts.failed for i, attempts in store.pending.items()}
        after |= dict.fromkeys(store.dead[dead_letters:], POLICY.max_attempts)
        most = len(self.workers) + self.world.interruptions - interrupted
        assert all(failed - before.get(one, 0) <= most for one, failed in after.items())

    @invariant()
    def no_rule_is_broken(self) -> None:
        """No rule is broken, and no entry had more attempts than the policy allows."""
        assert not self.world.violations
        world = self.world
        most = POLICY.max_attempts * (1 + world.copies) + world.interruptions
        for one, failures in world.failures.items():
            assert failures - world.unreachables[one] <= most

    def teardown(self) -> None:
        """Without faults, every entry is soon acknowledged or a dead letter, once."""
        self.world.outcomes.clear()
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
        everything = {(name, n) for name, most in self.admitted.items() for n in range(1, most + 1)}
        assert sorted(self.store.acked + self.store.dead) == sorted(everything)
        assert everything == self.world.calls.keys()
        assert not self.world.violations


@pytest.mark.timeout(SEARCH_TIMEOUT_S)
def test_nothing_is_lost_or_out_of_order() -> None:
    """Order per session, delivery at least once, and bounded attempts, whatever fails."""
    with structlog.testing.capture_logs() as lines:
        run_state_machine_as_test(Dispatching, settings=searching(60, steps=40))
    assert "dispatcher.failed" not in {line["event"] for line in lines}
