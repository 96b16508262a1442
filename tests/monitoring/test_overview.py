"""The state of a whole deployment, collected from a real one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from service.config import Settings
from service.delivery.consumer import FAILURE_WEIGHT
from service.delivery.consumer_groups import create_groups
from service.errors import Unavailable, UnavailableReason
from service.findings import Finding, Severity
from service.monitoring.overview import collect, unavailable
from service.parsers import FETCH
from service.storage import health
from service.storage.connections import Connections
from service.storage.keys import Keys
from service.stripe_api import watch_report
from service.stripe_api.watch_report import AccountPass, DestinationState, WatchReport
from tests.monitoring.conftest import MakePublisher
from tests.support.transitions import stored_notification

FIELDS: dict[Any, Any] = {"change": "{}", "previous": "", "sequence": 1, "epoch": 1}


async def test_a_deployment_without_processes(
    connections: Connections, keys: Keys, settings: Settings
) -> None:
    """Where only the groups exist, both kinds of processes are missed."""
    found = await collect(connections, keys, settings)
    assert found.verdict == "failing"
    assert [one.subject for one in found.reasons[:2]] == ["receivers", "handler log"]
    assert {"clock", "writes"} <= {one.name for one in found.redis_findings}
    assert (found.is_available, found.reconciliation, found.destinations) == (True, None, ())


async def test_handlers(connections: Connections, keys: Keys, settings: Settings) -> None:
    """All that a handler has to do, and who does it, is summed up over its partitions."""
    await create_groups(connections, keys, ["gone", "own:open"])
    now_ms, client = int(time.time() * 1000), connections.client
    await client.xadd(keys.transitions(1), FIELDS, id=f"{now_ms - 90_000}-0")
    await client.xadd(keys.transitions(2), FIELDS)
    await client.xreadgroup("log", "w", {keys.transitions(1): ">"})
    await client.execute_command(
        *("XCLAIM", keys.transitions(1), "log", "w", 0, f"{now_ms - 90_000}-0"),
        *("RETRYCOUNT", FAILURE_WEIGHT + 1),
    )
    await client.xadd(keys.dead_letters(3, "own:open"), FIELDS)
    await client.xadd(keys.replays(3, "own:open"), FIELDS)
    await client.set(keys.lease(1, "log"), "host-1-abc123:token")
    await client.zadd(keys.workers("log"), {"host-1-abc123": now_ms})
    await client.set(keys.circuit("own:open"), "host-1-abc123")
    await client.xadd(keys.notifications(3), stored_notification("vs_1", 1))
    states = (await collect(connections, keys, settings)).handlers
    log, fetch, gone, own = states
    assert [one.name for one in states] == ["log", FETCH, "gone", "own:open"]
    assert [one.is_configured for one in states] == [True, True, False, False]
    assert (log.kind, log.lag, log.replays, log.failing, log.workers) == ("transitions", 2, 0, 1, 1)
    assert 90 <= log.oldest_s < 200
    assert log.leases == (None, "host-1", *[None] * 6)
    assert (own.dead_letters, own.replays, own.is_circuit_open) == (1, 1, True)
    assert (fetch.kind, fetch.lag, fetch.workers) == ("notifications", 1, 0)
    assert not gone.is_circuit_open


async def test_a_worker_knows_its_handlers_better(
    connections: Connections, keys: Keys, settings: Settings
) -> None:
    """A handler that a worker calls is configured, whatever the settings of who looks."""
    await create_groups(connections, keys, ["own:open"])
    await connections.client.zadd(keys.workers("own:open"), {"w": time.time() * 1000})
    [own] = [
        one
        for one in (await collect(connections, keys, settings)).handlers
        if one.name == "own:open"
    ]
    assert own.is_configured


async def test_what_is_known_of_stripe(
    connections: Connections, keys: Keys, settings: Settings, make_publisher: MakePublisher
) -> None:
    """The report of the reconciling worker is judged, and shown with its age."""
    await make_publisher("dev", "log")._publish()
    report = WatchReport(
        time.time() - 100,
        (Finding("endpoint_missing", Severity.WARNING, [], "test mode: …"),),
        (DestinationState("we_1", "live", "/webhooks/stripe", False, True, False, 6),),
        (
            AccountPass("live", int(time.time()) - 1000, "api_unreachable"),
            AccountPass("test", None, ""),
        ),
    )
    await watch_report.publish(connections, keys, report)
    found = await collect(connections, keys, settings)
    assert found.destinations == report.destinations
    assert found.endpoint_findings == report.findings
    assert found.reconciliation is not None
    assert found.reconciliation.seen_s == pytest.approx(100, abs=60)
    assert found.reconciliation.lag_s == pytest.approx(1000, abs=60)
    assert {"reconciler", "Stripe's endpoints"} <= {one.subject for one in found.reasons}
    await connections.client.set(keys.endpoints, "another version's")
    assert (await collect(connections, keys, settings)).reconciliation is None


async def test_redis_does_not_answer(
    connections: Connections, keys: Keys, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever call fails, it is one error, which the page and the terminal show."""

    async def refuse(*_: Any) -> Sequence[Finding]:
        raise RedisConnectionError

    monkeypatch.setattr(health, "inspect", refuse)
    with pytest.raises(Unavailable) as raised:
        await collect(connections, keys, settings)
    shown = unavailable(raised.value.reason)
    assert (shown.verdict, shown.is_available) == ("failing", False)
    assert "(redis_unreachable)" in shown.reasons[0].meaning
    # Who looks without the right to may be the only one who has none.
    assert unavailable(UnavailableReason.REDIS_UNAUTHORIZED).verdict == "attention"


async def test_collecting_has_a_deadline(
    connections: Connections, keys: Keys, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that answers too slowly does not answer."""
    monkeypatch.setattr("service.monitoring.overview.COLLECT_TIMEOUT_S", 0.05)

    # The first thing that is read: on Python 3.11 redis-py can swallow a deadline within its calls.
    async def hang(*_: Any) -> None:
        await asyncio.sleep(300)

    monkeypatch.setattr("service.monitoring.overview.read_activity", hang)
    with pytest.raises(Unavailable) as raised:
        await collect(connections, keys, settings)
    assert raised.value.reason is UnavailableReason.REDIS_SLOW
