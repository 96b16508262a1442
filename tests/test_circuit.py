"""Laws of the circuit: an outage pauses and probes, is visible, and burns no attempts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
import structlog.testing
from harness import eventually
from servers import until

from service import checks, metrics
from service import circuit as circuit_module
from service.circuit import PROBE_CEILING_S, Circuit
from service.config import Settings
from service.connections import Connections
from service.findings import Severity
from service.layout import Keys
from service.transitions import StatusTransition
from service.worker import Worker

CHANGE = (
    '{"event_id":"evt_%d","event_type":"t","occurred_at":"2026-01-01T00:00:00Z",'
    '"session_id":"vs_%d","current":"processing"}'
)


@pytest.fixture
def circuit() -> Circuit:
    """Return a closed circuit."""
    return Circuit("one", first_s=1)


@pytest.fixture
def lines() -> Iterator[list[structlog.typing.EventDict]]:
    """Yield what is logged."""
    with structlog.testing.capture_logs() as captured:
        yield captured


def gauge(handler: str = "one") -> float:
    """Return what the metric says of a handler."""
    return float(metrics.CIRCUIT_OPEN.labels(handler)._value.get())


def test_an_outage_opens_and_any_answer_closes(
    circuit: Circuit, lines: list[structlog.typing.EventDict]
) -> None:
    """The first connection error opens, any answer closes; metric and log say each once."""
    assert (circuit.is_open, gauge()) == (False, 0)
    for _ in range(3):
        assert circuit.failed(reached_before=circuit.reached)
    assert (circuit.is_open, gauge()) == (True, 1)
    for _ in range(3):
        circuit.answered()

    assert (circuit.is_open, gauge()) == (False, 0)
    assert [line["event"] for line in lines] == ["circuit.opened", "circuit.closed"]


def test_while_others_get_through_it_is_one_calls_own_failure(circuit: Circuit) -> None:
    """A connection error is no outage when another call reached the queue meanwhile."""
    before = circuit.reached
    circuit.answered()

    assert not circuit.failed(reached_before=before)
    assert not circuit.is_open


def test_once_it_is_an_outage_no_call_fails_by_itself(circuit: Circuit) -> None:
    """Who began before the last that got through, and fails after the first that did not."""
    before = circuit.reached
    circuit.answered()
    circuit.failed(reached_before=circuit.reached)

    assert circuit.failed(reached_before=before)


def test_pauses_grow_to_a_ceiling(circuit: Circuit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes come after pauses that double at the longest, and never beyond the ceiling."""
    monkeypatch.setattr("random.uniform", lambda _, most: most)
    circuit.failed(reached_before=circuit.reached)

    assert [circuit.pause_s() for _ in range(7)] == [1, 2, 4, 8, 16, PROBE_CEILING_S, 30]
    assert max(circuit.pause_s() for _ in range(2000)) == PROBE_CEILING_S


async def test_an_outage_is_seen_and_ends(
    make_settings: Callable[..., Settings],
    connections: Connections,
    lines: list[structlog.typing.EventDict],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While every call fails to connect nothing is buried, `check` warns, and then all is taken."""
    monkeypatch.setattr(circuit_module, "PROBE_CEILING_S", 0.02)
    settings = make_settings(
        lease_ttl_s=1.0, retry_first_s=0.01, retry_ceiling_s=0.02, retry_attempts=1
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
    found = {finding.name: finding for finding in await checks.findings(settings, {})}
    assert found["group log"].severity is Severity.WARNING
    assert "cannot reach its queue" in found["group log"].meaning

    away = False
    await eventually(lambda: len(taken) == 50)
    assert gauge("log") == 0
    stopping.set()
    await work
    assert not [line for line in lines if line["event"] in ("delivery.buried", "delivery.retried")]
