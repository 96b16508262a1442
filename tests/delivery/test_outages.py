"""Tests of outages of a handler's destination, in virtual time: nothing counts, few calls probe."""

from __future__ import annotations

import asyncio

import pytest
import structlog.testing

from service.delivery.consumer import QUARANTINE_AFTER, Attempts, Missing
from service.delivery.deliverer import DeadLetterReason
from service.delivery.retries import MAX_PROBE_DELAY_S, CircuitBreakers
from service.errors import Unreachable
from service.transitions.transition import StatusTransition
from tests.support.dispatching import (
    HANDLER,
    POLICY,
    VIRTUAL_DEADLINE_S,
    FakeConsumer,
    RecordingHandler,
    deliver_all,
    dispatching,
    entry,
    failing,
    new_dispatcher,
)
from tests.support.virtual_time import in_virtual_time
from tests.support.waiting import until


@in_virtual_time
async def test_an_outage_costs_no_attempts_and_is_probed_by_few_calls() -> None:
    """While no call reaches the destination, no failure is recorded; then all is delivered."""
    consumer = FakeConsumer([(str(n), sequence) for sequence in (1, 2) for n in range(100)])
    loop = asyncio.get_running_loop()

    async def act(_: StatusTransition) -> None:
        if loop.time() < 3600:
            raise ConnectionRefusedError

    handler = RecordingHandler(act)
    await deliver_all(consumer, handler, POLICY._replace(max_delay_s=300))

    assert not consumer.dead_letters
    assert not consumer.recorded
    assert len(consumer.acked) == 200
    calls = sum(1 for at, _ in handler.calls if at < 3600)
    # Each session's probes grow rarer, so their number grows with the logarithm of the time.
    assert 3600 / 30 < calls < 100 * 8
    assert loop.time() < 3600 + 31


class Routing(RecordingHandler):
    """A handler with a destination for each letter that sessions begin with."""

    def destination(self, taken: StatusTransition) -> str:
        """Return the first letter of the session."""
        return entry(taken)[0][0]


@in_virtual_time
async def test_an_unreachable_destination_does_not_affect_others() -> None:
    """More sessions than the window holds wait for one destination; others are delivered."""
    loop = asyncio.get_running_loop()
    consumer = FakeConsumer((f"x{n}", sequence) for sequence in (1, 2) for n in range(700))

    async def act(taken: StatusTransition) -> None:
        if entry(taken)[0].startswith("x") and loop.time() < 600:
            raise Unreachable("no_such_queue")

    handler = Routing(act)
    async with dispatching(consumer, handler):
        for n in range(50):
            await asyncio.sleep(10)
            consumer.add((f"y{n}", 1))
            await until(lambda: (f"y{n}", 1) in consumer.acked, deadline_s=1)  # noqa: B023
        await until(lambda: len(consumer.acked) == len(consumer.stream), VIRTUAL_DEADLINE_S)

    assert not consumer.recorded
    sessions = [one for one in consumer.acked if one[0].startswith("x")]
    for n in range(700):
        assert [one for one in sessions if one[0] == f"x{n}"] == [(f"x{n}", 1), (f"x{n}", 2)]


@in_virtual_time
async def test_a_timeout_closes_no_circuit() -> None:
    """A probe that times out is a failure of its session, and proves nothing else."""
    consumer = FakeConsumer((str(n), 1) for n in range(20))
    loop = asyncio.get_running_loop()

    async def act(taken: StatusTransition) -> None:
        if loop.time() < 600:
            if entry(taken) == ("7", 1) and loop.time() > 0:
                await asyncio.sleep(100)
            raise ConnectionRefusedError

    handler = RecordingHandler(act)
    with structlog.testing.capture_logs() as lines:
        await deliver_all(consumer, handler)

    assert [one["event"] for one in lines if one["event"].startswith("circuit")] == [
        "circuit.opened",
        "circuit.closed",
    ]
    # The other sessions went on probing in turn: no timeout was followed by calls of all.
    assert sum(1 for at, _ in handler.calls if 0 < at < 600) < 200
    assert len(consumer.acked) == 19
    assert consumer.dead_letters == [(("7", 1), DeadLetterReason.EXHAUSTED, "TimeoutError", 4)]


class Rival:
    """A second dispatcher with the same circuit, and one session that waits for it."""

    def __init__(self, circuits: CircuitBreakers) -> None:
        self.consumer = FakeConsumer([("rival", 1)])
        self.handler = RecordingHandler(self._act)
        self.is_unreachable = True
        self.dispatcher = new_dispatcher(self.consumer, self.handler, circuits=circuits)
        self.running = asyncio.create_task(self.dispatcher.run())

    async def _act(self, _: StatusTransition) -> None:
        if self.is_unreachable:
            raise ConnectionRefusedError

    async def is_delivered(self) -> None:
        """Assert that it soon has its turn to probe, and closes the circuit."""
        self.is_unreachable = False
        await until(lambda: bool(self.consumer.acked), deadline_s=2 * MAX_PROBE_DELAY_S)
        self.dispatcher.stop()
        await self.running


@pytest.mark.parametrize("end", ["stop", "cancel", "lose"])
@pytest.mark.parametrize("moment", ["waits for its turn", "probes"])
@in_virtual_time
async def test_a_dispatcher_that_ends_gives_up_its_turn_to_probe(moment: str, end: str) -> None:
    """However a dispatcher ends, another one's session probes next."""
    circuits = CircuitBreakers(HANDLER, initial_delay_s=1)
    circuit = circuits.for_destination("")
    is_slow = False

    async def act(_: StatusTransition) -> None:
        if is_slow:
            await asyncio.sleep(9)
        raise ConnectionRefusedError

    consumer = FakeConsumer([("a", 1)])
    handler = RecordingHandler(act)
    one = new_dispatcher(consumer, handler, circuits=circuits)
    running = asyncio.create_task(one.run())
    await until(lambda: circuit.is_open)
    rival = Rival(circuits)
    await until(lambda: circuit.probes > 3)
    if moment == "probes":
        is_slow = True
        await until(lambda: bool(handler.running))
    match end:
        case "stop":
            one.stop()
        case "cancel":
            running.cancel()
        case "lose":
            consumer.is_lease_held = False
            consumer.add(("b", 1))
    await rival.is_delivered()
    one.stop()
    await asyncio.wait([running])


@in_virtual_time
async def test_a_poison_pill_that_looks_like_an_outage_becomes_a_dead_letter() -> None:
    """A session that never reaches the destination uses up its attempts if others succeed."""
    consumer = FakeConsumer([("poison", 1), ("poison", 2)])

    async def act(taken: StatusTransition) -> None:
        if entry(taken) == ("poison", 1):
            raise ConnectionResetError

    async with dispatching(consumer, act):
        for n in range(20):
            await asyncio.sleep(300)
            consumer.add((f"good{n}", 1))
            soon_s = POLICY.initial_delay_s + 0.2
            await until(lambda: (f"good{n}", 1) in consumer.acked, soon_s)  # noqa: B023

    assert consumer.dead_letters == [
        (("poison", 1), DeadLetterReason.EXHAUSTED, "ConnectionResetError", 4)
    ]
    assert ("poison", 2) in consumer.acked


@in_virtual_time
async def test_stop_during_an_outage_ends_at_once() -> None:
    """Sessions that wait for a circuit do not delay a stop. What each call found out is recorded.

    A worker that stops has survived an entry in quarantine: in a long outage many workers stop.
    """
    suspect = Attempts(2, QUARANTINE_AFTER)
    consumer = FakeConsumer([(str(n), 1) for n in range(30)], pending={0: suspect})
    handler = RecordingHandler(failing(ConnectionError()))
    async with dispatching(consumer, handler, POLICY._replace(initial_delay_s=1000)):
        await asyncio.sleep(100)

    assert asyncio.get_running_loop().time() == 100
    assert len(consumer.pending) == 30
    assert ("0", 1) in handler.entries
    assert consumer.pending[0] == suspect


@in_virtual_time
async def test_an_entry_that_is_gone_gives_up_its_turn_to_probe() -> None:
    """Where an operator has deleted the entry that is to probe, another session probes."""
    consumer = FakeConsumer([("a", 1), ("b", 1)])
    async with dispatching(consumer, failing(ConnectionError(), 20)):
        await asyncio.sleep(10)
        consumer.missing = {0: Missing.GONE}
        await until(lambda: consumer.is_done, VIRTUAL_DEADLINE_S)
