"""Laws of the circuit: an outage pauses and probes, is visible, and burns no attempts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import structlog.testing

from service.config import Settings
from service.delivery import retries
from service.delivery.retries import (
    MAX_DESTINATIONS,
    MAX_PROBE_DELAY_S,
    CircuitBreakers,
    CircuitSession,
)
from service.delivery.worker import Worker
from service.operations import check
from service.storage.assessment import Severity
from service.storage.connections import Connections
from service.storage.layout import Keys
from service.telemetry import metrics
from service.transitions.transition import StatusTransition
from tests.support import virtual_time
from tests.support.harness import eventually
from tests.support.servers import until

CHANGE = (
    '{"event_id":"evt_%d","event_type":"t","occurred_at":"2026-01-01T00:00:00Z",'
    '"session_id":"vs_%d","current":"processing"}'
)


class Callers:
    """An owner of callers that remembers whom it was told to resume, and when."""

    def __init__(self) -> None:
        self.circuit = CircuitBreakers("one", initial_delay_s=1).for_destination("")
        self.resumed: list[tuple[float, str]] = []

    def resume(self, caller: CircuitSession) -> None:
        """Remember."""
        self.resumed.append((asyncio.get_running_loop().time(), caller.key))

    def lose(self, caller: CircuitSession) -> bool:
        """Let a call fail to reach the queue, and its caller wait if the queue is to blame."""
        is_queues = self.circuit.record_unreachable(
            caller, "away", successes_before=self.circuit.successes
        )
        if is_queues:
            self.circuit.add_waiting(caller, self)
        return is_queues

    async def probing(self) -> str:
        """Return whose turn to probe comes next."""
        before = len(self.resumed)
        while len(self.resumed) == before:  # noqa: ASYNC110 - it knows no event
            await asyncio.sleep(0.01)
        return self.resumed[-1][1]


@pytest.fixture
def lines() -> Iterator[list[structlog.typing.EventDict]]:
    """Yield what is logged."""
    with structlog.testing.capture_logs() as captured:
        yield captured


def gauge(handler: str = "one") -> float:
    """Return what the metric says of a handler."""
    return float(metrics.CIRCUIT_OPEN.labels(handler)._value.get())


def test_an_outage_opens_and_any_answer_closes(lines: list[structlog.typing.EventDict]) -> None:
    """The first lost call opens, any answer closes; metric and log say each once."""

    async def law() -> None:
        callers = Callers()
        circuit = callers.circuit
        assert (circuit.is_open, gauge()) == (False, 0)
        for name in "abc":
            assert callers.lose(CircuitSession(name))
        assert (circuit.is_open, gauge()) == (True, 1)
        assert not circuit.begin_call(CircuitSession("d"))
        for _ in range(3):
            circuit.record_response()
        assert (circuit.is_open, gauge()) == (False, 0)
        assert circuit.begin_call(CircuitSession("d"))
        assert [name for _, name in callers.resumed] == ["a", "b", "c"]
        assert [line["event"] for line in lines] == ["circuit.opened", "circuit.closed"]

    virtual_time.run(law())


def test_a_success_of_another_makes_it_an_attempt() -> None:
    """A lost call counts whenever another session has succeeded since this one's last try."""

    async def law() -> None:
        callers = Callers()
        circuit, poison, other = callers.circuit, CircuitSession("poison"), CircuitSession("other")
        before = circuit.successes
        circuit.record_success()
        assert not circuit.record_unreachable(poison, "away", successes_before=before)
        assert not circuit.is_open
        assert callers.lose(poison)
        circuit.record_success()
        assert callers.lose(other)
        # Open now by another's word; but this one has failed before and after a success.
        assert not circuit.record_unreachable(poison, "away", successes_before=circuit.successes)
        poison.reset()
        assert circuit.record_unreachable(poison, "away", successes_before=circuit.successes)

    virtual_time.run(law())


def test_a_first_try_that_meets_an_outage_does_not_count() -> None:
    """Who began before the last success, and fails after the first lost call, is not to blame."""

    async def law() -> None:
        callers = Callers()
        before = callers.circuit.successes
        callers.circuit.record_success()
        callers.lose(CircuitSession("first"))
        assert callers.circuit.record_unreachable(
            CircuitSession("second"), "away", successes_before=before
        )

    virtual_time.run(law())


def test_what_an_outage_is_called_is_told(lines: list[structlog.typing.EventDict]) -> None:
    """The word is in the line that opens; another word while open has a line, and no more."""

    async def law() -> None:
        circuit = CircuitBreakers("one", initial_delay_s=1).for_destination("there")
        for reason in ("refused", "refused", "unroutable", "unroutable"):
            circuit.record_unreachable(CircuitSession(reason), reason, successes_before=0)
        circuit.record_response()
        told = [(one["event"], one["log_level"], one.get("reason")) for one in lines]
        assert told == [
            ("circuit.opened", "error", "refused"),
            ("circuit.still_open", "error", "unroutable"),
            ("circuit.closed", "info", None),
        ]
        assert {one["destination"] for one in lines} == {"there"}

    virtual_time.run(law())


def test_each_destination_has_a_circuit_of_its_own() -> None:
    """One that is away does not stop the others; the metric counts the open ones; bounded."""

    async def law() -> None:
        circuits = CircuitBreakers("one", initial_delay_s=1)
        for name in ("a", "b"):
            circuits.for_destination(name).record_unreachable(
                CircuitSession(name), "away", successes_before=0
            )
        assert (circuits.is_open, gauge()) == (True, 2)
        assert not circuits.for_destination("a").begin_call(CircuitSession("x"))
        assert circuits.for_destination("c").begin_call(CircuitSession("x"))
        circuits.for_destination("a").record_response()
        assert (circuits.is_open, gauge()) == (True, 1)
        circuits.for_destination("b").record_response()
        assert (circuits.is_open, gauge()) == (False, 0)
        many = {circuits.for_destination(f"d{n}") for n in range(2 * MAX_DESTINATIONS)}
        assert len(many) <= MAX_DESTINATIONS

    virtual_time.run(law())


def test_the_least_probed_is_next() -> None:
    """Probes come one at a time, to whoever had the fewest; a newcomer has its turn soon."""

    async def law() -> None:
        callers = Callers()
        loop = asyncio.get_running_loop()
        known = {name: CircuitSession(name) for name in "abc"}
        for caller in known.values():
            callers.lose(caller)
        turns = []
        for _ in range(30):
            turns.append(await callers.probing())
            assert callers.circuit.begin_call(known[turns[-1]])
            assert sum(map(callers.circuit.begin_call, known.values())) == 1
            callers.lose(known[turns[-1]])
        assert [sorted(turns[n : n + 3]) for n in range(0, 30, 3)] == [["a", "b", "c"]] * 10

        begun = loop.time()
        newcomer = CircuitSession("newcomer")
        callers.circuit.add_waiting(newcomer, callers)
        assert await callers.probing() == "newcomer"
        assert loop.time() <= begun + 1.1

    virtual_time.run(law())


def test_pauses_grow_to_a_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session's probes come after pauses that double at the longest, never beyond the ceiling."""
    monkeypatch.setattr("random.uniform", lambda _, most: most)

    async def law() -> None:
        callers = Callers()
        alone = CircuitSession("alone")
        callers.lose(alone)
        for _ in range(40):
            await callers.probing()
            callers.lose(alone)
        times = [0.0, *(at for at, _ in callers.resumed)]
        pauses = [round(after - before) for before, after in pairwise(times)]
        assert pauses[:7] == [1, 2, 4, 8, 16, MAX_PROBE_DELAY_S, 30]
        assert max(pauses) == MAX_PROBE_DELAY_S

    virtual_time.run(law())


def test_who_leaves_takes_no_turn_along() -> None:
    """Callers of an owner that stops are forgotten; a turn that was theirs goes to another."""

    async def law() -> None:
        leaving, staying = Callers(), Callers()
        staying.circuit = leaving.circuit
        circuit = leaving.circuit
        leaver = CircuitSession("leaver")
        leaving.lose(leaver)
        assert await leaving.probing() == "leaver"
        circuit.add_waiting(CircuitSession("waits"), leaving)
        circuit.add_waiting(CircuitSession("stays"), staying)
        await asyncio.sleep(2 * MAX_PROBE_DELAY_S)
        assert not staying.resumed
        circuit.remove_waiting(leaving)
        assert await staying.probing() == "stays"
        assert [name for _, name in leaving.resumed] == ["leaver"]

    virtual_time.run(law())


async def test_an_outage_is_seen_and_ends(
    make_settings: Callable[..., Settings],
    connections: Connections,
    lines: list[structlog.typing.EventDict],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While every call fails to connect nothing is buried, `check` warns, and then all is taken."""
    monkeypatch.setattr(retries, "MAX_PROBE_DELAY_S", 0.02)
    settings = make_settings(
        lease_ttl_s=1.0, retry_initial_delay_s=0.01, retry_max_delay_s=0.02, retry_max_attempts=1
    )
    keys = Keys(settings.redis_prefix, settings.partitions)
    away, calls, taken = True, 0, list[str]()

    async def handle(transition: StatusTransition) -> None:
        nonlocal calls
        calls += 1
        if away:
            raise ConnectionError
        taken.append(transition.session_id)

    for n in range(50):
        stream = keys.transitions(keys.partition(f"vs_{n}"))
        fields = {"change": CHANGE % (n, n), "previous": "", "sequence": 1, "epoch": 1}
        await connections.client.xadd(stream, fields)
    stopping = asyncio.Event()
    work = asyncio.create_task(Worker(connections, keys, settings, {"log": handle}).run(stopping))
    await until(lambda: connections.client.exists(keys.circuit("log")))
    # Every attempt counted, each session's only one would be gone long before the last probe.
    await eventually(lambda: calls > 60)
    assert gauge("log") == 1
    found = {finding.name: finding for finding in await check.collect_findings(settings, {})}
    assert found["group log"].severity is Severity.WARNING
    assert "cannot reach its queue" in found["group log"].meaning

    away = False
    await eventually(lambda: len(taken) == 50)
    assert gauge("log") == 0
    stopping.set()
    await work
    assert not [
        line for line in lines if line["event"] in ("delivery.dead_lettered", "delivery.retried")
    ]
