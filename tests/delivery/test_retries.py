"""Tests of the circuit breaker: an outage costs no attempts, is probed, and is visible."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise

import pytest
import structlog.testing

from service.delivery import retries
from service.delivery.retries import (
    MAX_DESTINATIONS,
    MAX_PROBE_DELAY_S,
    CircuitBreaker,
    CircuitBreakers,
    CircuitSession,
)
from service.findings import Severity
from service.operations import check
from service.telemetry import metrics
from tests.support.virtual_time import in_virtual_time
from tests.support.waiting import until
from tests.support.workers import CallLog, Deployment, Entry


class RecordingScheduler:
    """A scheduler that records when it was asked to resume which session."""

    def __init__(self, circuit: CircuitBreaker | None = None) -> None:
        self.circuit = circuit or CircuitBreakers("one", initial_delay_s=1).for_destination("")
        self.resumed: list[tuple[float, str]] = []

    def resume(self, session: CircuitSession) -> None:
        """Record."""
        self.resumed.append((asyncio.get_running_loop().time(), session.key))

    def fail(self, session: CircuitSession, reason: str = "away") -> bool:
        """Let a call not reach the destination; return whether its session waits for that."""
        successes = self.circuit.successes
        is_outage = self.circuit.record_unreachable(session, reason, successes_before=successes)
        if is_outage:
            self.circuit.add_waiting(session, self)
        return is_outage

    async def next_resumed(self) -> str:
        """Wait for the next session to be resumed."""
        before = len(self.resumed)
        await until(lambda: len(self.resumed) > before, 10 * MAX_PROBE_DELAY_S)
        return self.resumed[-1][1]


@pytest.fixture
def lines() -> Iterator[list[structlog.typing.EventDict]]:
    """Yield what is logged."""
    with structlog.testing.capture_logs() as captured:
        yield captured


def gauge(handler: str = "one") -> float:
    """Return the metric of open circuits."""
    return float(metrics.CIRCUIT_OPEN.labels(handler)._value.get())


@in_virtual_time
async def test_a_circuit_opens_and_closes(lines: list[structlog.typing.EventDict]) -> None:
    """An unreachable destination opens the circuit, any response closes it, each logged once.

    Another reason has one line of its own.
    """
    circuit = CircuitBreakers("one", initial_delay_s=1).for_destination("there")
    scheduler = RecordingScheduler(circuit)
    assert (circuit.is_open, gauge()) == (False, 0)
    for name, reason in zip("abcd", ["refused"] * 2 + ["unroutable"] * 2, strict=True):
        assert scheduler.fail(CircuitSession(name), reason)
    assert (circuit.is_open, gauge()) == (True, 1)
    assert not circuit.begin_call(CircuitSession("e"))
    for _ in range(3):
        circuit.record_response()
    assert (circuit.is_open, gauge()) == (False, 0)
    assert circuit.begin_call(CircuitSession("e"))
    assert [name for _, name in scheduler.resumed] == ["a", "b", "c", "d"]
    assert [(line["event"], line["log_level"], line.get("reason")) for line in lines] == [
        ("circuit.opened", "error", "refused"),
        ("circuit.still_open", "error", "unroutable"),
        ("circuit.closed", "info", "reached"),
    ]
    assert {line["destination"] for line in lines} == {"there"}


@in_virtual_time
async def test_a_failure_of_the_session_is_told_from_an_outage() -> None:
    """If another session has succeeded since this one's last call, the failure is its own."""
    scheduler = RecordingScheduler()
    circuit, poison = scheduler.circuit, CircuitSession("poison")
    circuit.record_success()
    assert not circuit.record_unreachable(poison, "away", successes_before=0)
    assert not circuit.is_open
    assert scheduler.fail(poison)
    circuit.record_success()
    assert scheduler.fail(CircuitSession("other"))
    # The circuit is open because of another session; but this one failed before and after a
    # success.
    assert not circuit.record_unreachable(poison, "away", successes_before=circuit.successes)
    poison.reset()
    assert circuit.record_unreachable(poison, "away", successes_before=circuit.successes)


@in_virtual_time
async def test_a_first_call_that_meets_an_outage_does_not_count() -> None:
    """A call that began before the last success, and failed in the outage, is not to blame."""
    scheduler = RecordingScheduler()
    circuit = scheduler.circuit
    circuit.record_success()
    scheduler.fail(CircuitSession("first"))
    assert circuit.record_unreachable(CircuitSession("second"), "away", successes_before=0)


@in_virtual_time
async def test_each_destination_has_its_own_circuit() -> None:
    """An unreachable destination stops no other; the metric counts them; they are bounded."""
    circuits = CircuitBreakers("one", initial_delay_s=1)
    for name in ("a", "b"):
        circuit = circuits.for_destination(name)
        circuit.record_unreachable(CircuitSession(name), "away", successes_before=0)
    assert (circuits.is_open, gauge()) == (True, 2)
    assert not circuits.for_destination("a").begin_call(CircuitSession("x"))
    assert circuits.for_destination("c").begin_call(CircuitSession("x"))
    for name in ("a", "b"):
        assert circuits.is_open
        circuits.for_destination(name).record_response()
    assert (circuits.is_open, gauge()) == (False, 0)
    many = {circuits.for_destination(f"d{n}") for n in range(2 * MAX_DESTINATIONS)}
    assert len(many) <= MAX_DESTINATIONS


@in_virtual_time
async def test_the_least_probed_is_next() -> None:
    """One session probes at a time, the one that has probed least; a new one does so soon."""
    scheduler = RecordingScheduler()
    loop = asyncio.get_running_loop()
    known = {name: CircuitSession(name) for name in "abc"}
    for session in known.values():
        scheduler.fail(session)
    turns = []
    for _ in range(30):
        turns.append(await scheduler.next_resumed())
        assert sum(map(scheduler.circuit.begin_call, known.values())) == 1
        assert scheduler.circuit.begin_call(known[turns[-1]])
        scheduler.fail(known[turns[-1]])
    assert [sorted(turns[n : n + 3]) for n in range(0, 30, 3)] == [["a", "b", "c"]] * 10

    begun = loop.time()
    scheduler.circuit.add_waiting(CircuitSession("new"), scheduler)
    assert await scheduler.next_resumed() == "new"
    assert loop.time() <= begun + 1.1


@in_virtual_time
async def test_delays_of_probes_double_up_to_a_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound of the delay before a session's next probe doubles up to a maximum."""
    monkeypatch.setattr("random.uniform", lambda _, bound: bound)
    scheduler = RecordingScheduler()
    session = CircuitSession("alone")
    scheduler.fail(session)
    for _ in range(40):
        await scheduler.next_resumed()
        scheduler.fail(session)
    times = [0.0, *(at for at, _ in scheduler.resumed)]
    delays = [round(after - before) for before, after in pairwise(times)]
    assert delays[:7] == [1, 2, 4, 8, 16, MAX_PROBE_DELAY_S, 30]
    assert max(delays) == MAX_PROBE_DELAY_S


@in_virtual_time
async def test_a_scheduler_that_stops_gives_up_its_turn() -> None:
    """Sessions of a scheduler that stops are removed; another one's session probes instead.

    The circuit closes with the last one: this process will not find out when the outage ends.
    """
    stopping = RecordingScheduler()
    circuit = stopping.circuit
    staying = RecordingScheduler(circuit)
    stopping.fail(CircuitSession("has its turn"))
    assert await stopping.next_resumed() == "has its turn"
    circuit.add_waiting(CircuitSession("waits"), stopping)
    circuit.add_waiting(CircuitSession("stays"), staying)
    await asyncio.sleep(2 * MAX_PROBE_DELAY_S)
    assert not staying.resumed
    circuit.remove_waiting(stopping)
    assert await staying.next_resumed() == "stays"
    assert [name for _, name in stopping.resumed] == ["has its turn"]
    assert circuit.is_open
    circuit.remove_waiting(staying)
    assert (circuit.is_open, gauge()) == (False, 0)


async def test_an_outage_is_seen_by_check_and_ends(
    deployment: Deployment, lines: list[structlog.typing.EventDict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Redis: during an outage `check` warns and nothing is a dead letter; then all follows."""
    monkeypatch.setattr(retries, "MAX_PROBE_DELAY_S", 0.02)
    is_unreachable = True

    async def act(_: Entry) -> None:
        if is_unreachable:
            raise ConnectionError

    log = CallLog()
    deployment.admit(50)
    deployment.start(
        {"log": log.handler(act)},
        retry_initial_delay_s=0.01,
        retry_max_delay_s=0.02,
        retry_max_attempts=1,
    )
    await until(lambda: deployment.connections.client.exists(deployment.keys.circuit("log")))
    # If calls counted as attempts, each session's only one would be used up by now.
    await until(lambda: len(log.calls) > 60)
    assert gauge("log") == 1
    parked = metrics.PARKED_ENTRIES.labels("log")._value
    await until(lambda: parked.get() >= 40)
    found = {one.name: one for one in await check.collect_findings(deployment.settings, {})}
    assert found["group log"].severity is Severity.WARNING
    assert "its queue is unreachable" in found["group log"].meaning

    is_unreachable = False
    await deployment.deliver_all(lambda: log.returns)
    assert gauge("log") == 0
    await until(lambda: parked.get() == 0)
    assert not {line["event"] for line in lines} & {"delivery.dead_lettered", "delivery.retried"}
