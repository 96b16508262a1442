"""For tests of dispatching: a consumer in memory, handlers, and a dispatcher in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from service.delivery.consumer import Attempts, Consumer, Delivery, Missing
from service.delivery.dispatcher import MAX_PER_READ, Dispatcher
from service.delivery.leases import LeaseLostError
from service.delivery.retries import CircuitBreakers, RetryPolicy
from service.transitions.transition import StatusTransition
from tests.support.waiting import until

# Of virtual time: retries and outages last hours.
VIRTUAL_DEADLINE_S = 10_000.0
# A transition as these tests write it: its session without prefix, and its sequence.
Entry = tuple[str, int]
Handle = Callable[[StatusTransition], Coroutine[Any, Any, None]]

HANDLER = "recording"
POLICY = RetryPolicy(concurrency=4, timeout_s=10, initial_delay_s=1, max_delay_s=8, max_attempts=4)
# With these delays no retry comes within any test.
LONG_DELAYS = POLICY._replace(initial_delay_s=10**6, max_delay_s=10**6)


def transition(session: str, sequence: int) -> StatusTransition:
    """Return the *sequence*-th transition of a session."""
    return StatusTransition(
        event_id=f"evt_{session}_{sequence}",
        event_type="identity.verification_session.processing",
        occurred_at=datetime(2026, 1, 1, tzinfo=UTC),
        session_id=f"vs_{session}",
        current="processing",
        sequence=sequence,
        epoch=1,
        expected=True,
    )


def entry(taken: StatusTransition) -> Entry:
    """Return a transition as these tests write it."""
    return taken.session_id.removeprefix("vs_"), taken.sequence


class FakeConsumer(Consumer):
    """A consumer in memory that remembers everything, and fails on request.

    Attributes:
        pending: The recorded attempts of each entry that was read and is not done with.
        missing: Why entries have no transition, by their index in the stream.
        max_dead_letters: How many dead letters there is room for.
        places: Where the errors of the dead letters were raised.
        failures: The error and the place of each failed attempt that was recorded.
        fail: Called with the name of each method before it does anything; may raise.
    """

    def __init__(
        self, entries: Iterable[Entry] = (), *, pending: dict[int, Attempts] | None = None
    ) -> None:
        self.stream = [transition(*one) for one in entries]
        self.pending: dict[int, Attempts] = dict(pending or {})
        self.read_to = max(self.pending, default=-1) + 1
        self.is_lease_held = True
        self.acked: list[Entry] = []
        self.dead_letters: list[tuple[Entry, str, str, int]] = []
        self.places: list[str] = []
        self.failures: list[tuple[str, str]] = []
        self.recorded: list[tuple[Entry, Attempts]] = []
        self.reads: list[int] = []
        self.latency_s = 0.0
        self.missing: dict[int, Missing] = {}
        self.max_dead_letters = 10**9
        self.fail: Callable[[str], None] = lambda _: None
        self._has_grown = asyncio.Event()

    @property
    def is_done(self) -> bool:
        """Whether every entry is acknowledged or a dead letter."""
        return len(self.acked) + len(self.dead_letters) == len(self.stream)

    def add(self, *entries: Entry) -> None:
        """Append to the stream."""
        self.stream += [transition(*one) for one in entries]
        self._has_grown.set()

    def has_lease(self) -> bool:
        """Return what the test has chosen."""
        return self.is_lease_held

    async def claim_pending(self) -> AsyncIterator[list[Delivery]]:
        """Yield what is pending, in batches."""
        await self._call("claim_pending")
        found = [self.delivery(i) for i in sorted(self.pending)]
        for i in range(0, len(found), MAX_PER_READ):
            yield found[i : i + MAX_PER_READ]

    async def read(self, max_entries: int) -> list[Delivery]:
        """Return what is new."""
        await self._call("read")
        assert max_entries > 0
        new = range(self.read_to, min(self.read_to + max_entries, len(self.stream)))
        self.read_to = new.stop
        self.pending |= dict.fromkeys(new, Attempts(0, 1))
        self.reads.append(len(new))
        return [self.delivery(i) for i in new]

    async def load(self, delivery: Delivery) -> StatusTransition | Missing:
        """Return an entry's transition."""
        await self._call("load")
        i = int(delivery.entry_id)
        return self.missing.get(i) or self.stream[i]

    async def ack(self, delivery: Delivery) -> None:
        """Acknowledge an entry."""
        await self._call("ack")
        if self._remove(delivery):
            self.acked.append(self.entry(delivery))

    async def record_attempts(
        self, delivery: Delivery, attempts: Attempts, *, error: str = "", place: str = ""
    ) -> None:
        """Record attempts."""
        await self._call("record_attempts")
        if int(delivery.entry_id) in self.pending:
            self.pending[int(delivery.entry_id)] = attempts
        self.recorded.append((self.entry(delivery), attempts))
        self.failures += [(error, place)] if error else []

    async def dead_letter(
        self, delivery: Delivery, *, reason: str, error: str, attempts: int, place: str = ""
    ) -> int | None:
        """Make an entry a dead letter, if there is room."""
        await self._call("dead_letter")
        if len(self.dead_letters) >= self.max_dead_letters:
            return None
        if self._remove(delivery):
            self.dead_letters.append((self.entry(delivery), reason, error, attempts))
            self.places.append(place)
        return len(self.dead_letters)

    async def wait_for_entries(self) -> None:
        """Wait until the stream is longer than what was read."""
        self._has_grown.clear()
        if self.read_to >= len(self.stream):
            await self._has_grown.wait()

    def entry(self, delivery: Delivery) -> Entry:
        """Return a delivery as these tests write it."""
        return entry(self.stream[int(delivery.entry_id)])

    def delivery(self, i: int) -> Delivery:
        """Return a pending entry, by its index in the stream."""
        item = None if i in self.missing else self.stream[i]
        return Delivery(str(i), item, self.pending[i])

    def _remove(self, delivery: Delivery) -> bool:
        assert int(delivery.entry_id) in self.pending, "acknowledged or dead-lettered twice"
        del self.pending[int(delivery.entry_id)]
        return True

    async def _call(self, name: str) -> None:
        await asyncio.sleep(self.latency_s)
        if not self.is_lease_held:
            raise LeaseLostError
        self.fail(name)


class RecordingHandler:
    """A handler that records its calls, and then does what another one does.

    Attributes:
        calls: The time and entry of every call.
        running: The entries of the calls that are running.
        max_running: The most calls that ever ran at the same time.
    """

    def __init__(self, act: Handle | None = None) -> None:
        self.calls: list[tuple[float, Entry]] = []
        self.running: list[Entry] = []
        self.max_running = 0
        self._act = act

    @property
    def entries(self) -> list[Entry]:
        """The entries of all calls, in order."""
        return [one for _, one in self.calls]

    def times(self, wanted: Entry) -> list[float]:
        """Return the times of an entry's calls."""
        return [at for at, one in self.calls if one == wanted]

    async def __call__(self, taken: StatusTransition, /) -> None:
        """Take a transition."""
        one = entry(taken)
        self.calls.append((asyncio.get_running_loop().time(), one))
        self.running.append(one)
        self.max_running = max(self.max_running, len(self.running))
        try:
            if self._act is not None:
                await self._act(taken)
        finally:
            self.running.remove(one)


def failing(error: BaseException, times: int = 10**9, *, only: str = "") -> Handle:
    """Return a handler that raises *error* so often, for all sessions or those with a prefix."""
    left = times

    async def act(taken: StatusTransition) -> None:
        nonlocal left
        if left and entry(taken)[0].startswith(only):
            left -= 1
            raise error

    return act


def sleeping(seconds: float) -> Handle:
    """Return a handler that takes some time."""

    async def act(_: StatusTransition) -> None:
        await asyncio.sleep(seconds)

    return act


def new_dispatcher(
    consumer: FakeConsumer,
    handler: Handle,
    policy: RetryPolicy = POLICY,
    *,
    circuits: CircuitBreakers | None = None,
) -> Dispatcher:
    """Return a dispatcher with its own quarantine, and with its own circuits unless given."""
    circuits = circuits or CircuitBreakers(HANDLER, initial_delay_s=policy.initial_delay_s)
    return Dispatcher(
        HANDLER, handler, consumer, policy, circuits=circuits, quarantine=asyncio.Lock()
    )


@asynccontextmanager
async def dispatching(
    consumer: FakeConsumer, handler: Handle, policy: RetryPolicy = POLICY
) -> AsyncIterator[Dispatcher]:
    """Run a dispatcher, and stop it at the end."""
    dispatcher = new_dispatcher(consumer, handler, policy)
    running = asyncio.create_task(dispatcher.run())
    yield dispatcher
    dispatcher.stop()
    async with asyncio.timeout(1000):
        await running


async def deliver_all(
    consumer: FakeConsumer, handler: Handle, policy: RetryPolicy = POLICY
) -> None:
    """Dispatch until every entry is acknowledged or a dead letter."""
    async with dispatching(consumer, handler, policy):
        await until(lambda: consumer.is_done, VIRTUAL_DEADLINE_S)
