"""Tests of workers with a real Redis: shares, leases, shutting down, metrics."""

from __future__ import annotations

import asyncio
import contextlib
import operator
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import redis
import structlog.testing

from service.config import Settings
from service.delivery import maintenance, retention, stream_watcher, worker
from service.delivery.consumer_groups import create_groups
from service.parsers import FETCH
from service.runtime.embedded_redis import EmbeddedServer
from service.secret import Secret
from service.storage import clients
from service.storage.connections import connect
from service.transitions.transition import StatusTransition
from tests.support.proxy import Proxy, proxy_to
from tests.support.virtual_time import push
from tests.support.waiting import PATIENCE_S, until
from tests.support.workers import (
    INTERVAL_S,
    SETTINGS,
    TTL_S,
    CallLog,
    Deployment,
    Entry,
    check_order,
    held,
)

# Log lines that say that work or leases were lost.
LOSSES = {
    "dispatcher.ended",
    "dispatcher.failed",
    "partitions.taken_over",
    "worker.rebalance_failed",
}


async def test_handlers_do_not_affect_each_other(deployment: Deployment) -> None:
    """A handler that hangs and fails delays no other, and its dead letters are its own."""
    settings = replace(deployment.settings, handlers=("log", "other"))
    await create_groups(deployment.connections, deployment.keys, settings.handlers)
    deployment.admit(20, 2)
    log = CallLog()
    gate = asyncio.Event()

    async def fail(_: StatusTransition) -> None:
        await gate.wait()
        raise ValueError

    handlers = {"log": log.handler(), "other": fail}
    deployment.start(handlers, retry_max_attempts=2)
    await until(lambda: len(log.returns) == 40)
    gate.set()
    await until(lambda: len(deployment.dead_letters("other")) == 40)

    check_order(log.calls, deployment.admitted)
    assert not deployment.dead_letters("log")


async def test_shares_are_fair_and_move_in_order(deployment: Deployment) -> None:
    """New workers take their share, the shares of stopped ones move at once, in order."""
    log = CallLog()
    handlers = {"log": log.handler(lambda _: asyncio.sleep(0.01))}
    workers = [deployment.start(handlers)]
    deployment.admit(40, 10)
    await deployment.hold_all(workers[0])
    workers += [deployment.start(handlers) for _ in range(2)]
    await until(lambda: sorted(map(held, workers)) == [2, 3, 3])
    deployment.admit(40, 10)
    for stopped in workers[:2]:
        await deployment.stop(stopped)
    await deployment.hold_all(workers[2])
    await deployment.deliver_all(lambda: log.returns)

    check_order(log.calls, deployment.admitted)
    assert len(log.calls) == len(deployment.admitted), "no delivery is repeated"
    assert not deployment.dead_letters()


async def test_a_lease_of_another_worker_is_waited_for(
    deployment: Deployment, intervals: list[float]
) -> None:
    """A lease that another worker holds is tried once in each interval."""
    for key in deployment.lease_keys():
        deployment.client.set(key, "another worker")
    one = deployment.start({"log": CallLog().handler()})
    await until(lambda: len(intervals) > 5)
    assert held(one) == 0
    assert set(intervals) == {INTERVAL_S}
    deployment.client.delete(*deployment.lease_keys())
    await deployment.hold_all(one)


async def test_a_blocked_loop_loses_its_leases_and_nothing_else(deployment: Deployment) -> None:
    """If a handler blocks the loop for longer than the lease, the work starts again."""
    log = CallLog()
    has_blocked = False

    async def block_once(_: Entry) -> None:
        nonlocal has_blocked
        if not has_blocked:
            has_blocked = True
            time.sleep(TTL_S * 1.3)  # noqa: ASYNC251 - the point of the test

    deployment.admit(40, 2)
    deployment.start({"log": log.handler(block_once)}, lease_ttl_s=TTL_S)
    await deployment.deliver_all(lambda: log.returns)
    check_order(log.calls, deployment.admitted)


@asynccontextmanager
async def behind_proxy(
    server: EmbeddedServer, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Deployment, Proxy]]:
    """Yield a deployment of 256 partitions behind a proxy, in which all periodic work is due."""
    monkeypatch.setattr(retention, "TRIM_EVERY_S", 0.0)
    monkeypatch.setattr(maintenance, "MEASURE_EVERY_S", 0.0)
    async with proxy_to(server.url) as proxy:
        settings = replace(settings, redis_url=Secret(proxy.url), partitions=256)
        async with connect(settings.redis_url) as connections:
            with redis.Redis.from_url(server.url) as client:
                deployment = Deployment(settings, client, connections)
                await create_groups(connections, deployment.keys, settings.all_handlers)
                yield deployment, proxy


def blocked_clients(deployment: Deployment) -> int:
    """Return how many blocking reads are under way."""
    return int(deployment.client.info("clients")["blocked_clients"])


async def test_a_distant_redis_and_many_partitions(
    make_settings: Callable[..., Settings],
    redis_server: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """256 partitions, three handlers, Redis 20 ms away: no lease is lost, no delivery repeated.

    With as few connections and as little patience as in service.
    """
    monkeypatch.setattr(clients, "POOL_WAIT_S", 0.25)
    settings = make_settings(
        **SETTINGS, handlers=("log", "other"), stripe_api_key=(Secret("rk_test_1"),)
    )
    async with behind_proxy(redis_server, settings, monkeypatch) as (deployment, proxy):
        proxy.delay_s = 0.04
        logs = {name: CallLog() for name in settings.handlers}
        handlers = {name: log.handler() for name, log in logs.items()}
        handlers[FETCH] = CallLog().handler()
        with structlog.testing.capture_logs() as lines:
            one = deployment.start(handlers)
            for _ in range(10):
                deployment.admit(200)
                await asyncio.sleep(0.2)
            for log in logs.values():
                await until(lambda: len(log.returns) >= len(deployment.admitted))  # noqa: B023
            assert [held(one, name) for name in handlers] == [256, 256, 256]
            # A read of transitions and one of notifications in each partition.
            await until(lambda: blocked_clients(deployment) == 512)
            await deployment.stop(one)
        assert not deployment.pending()
    assert not [line for line in lines if line["event"] in LOSSES]
    for log in logs.values():
        assert sorted(log.calls) == sorted(deployment.admitted)


async def test_periodic_work_takes_few_round_trips(
    make_settings: Callable[..., Settings],
    redis_server: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Renewing, rebalancing, measuring and trimming send no request per partition."""
    monkeypatch.setattr(worker, "MAX_INTERVAL_S", 10 * PATIENCE_S)
    monkeypatch.setattr(stream_watcher, "BLOCK_S", 10 * PATIENCE_S)
    settings = make_settings(**{**SETTINGS, "lease_ttl_s": 3600})
    async with behind_proxy(redis_server, settings, monkeypatch) as (deployment, proxy):
        one = deployment.start({"log": CallLog().handler()})
        await until(lambda: blocked_clients(deployment) == 256)
        before = proxy.requests
        for step in (one._renew_leases, one._rebalance, one._maintain):
            await step()
        assert proxy.requests - before < 20
        await deployment.stop(one)


@pytest.mark.parametrize("hanging", ["rebalance", "maintain"])
async def test_leases_are_renewed_while_other_work_hangs(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, hanging: str
) -> None:
    """A worker whose rebalancing or maintenance hangs keeps its leases and delivers."""
    log = CallLog()
    one = deployment.start({"log": log.handler()})
    await deployment.hold_all(one)
    hangs, is_over = asyncio.Event(), asyncio.Event()

    async def hang(_: object) -> None:
        hangs.set()
        await is_over.wait()
        raise redis.TimeoutError

    if hanging == "rebalance":
        monkeypatch.setattr(one._heartbeats, "send", hang)
    else:
        monkeypatch.setattr(one._maintenance, "run_due", hang)
    before = set(one._partition_tasks.values())
    await hangs.wait()

    def expiries() -> list[int]:
        return [deployment.client.pexpiretime(key) for key in deployment.lease_keys()]

    with structlog.testing.capture_logs() as lines:
        for _ in range(3):
            earlier = expiries()
            await until(lambda: all(map(operator.lt, earlier, expiries())))  # noqa: B023
        deployment.admit(20)
        await until(lambda: len(log.returns) == 20)
    assert set(one._partition_tasks.values()) == before
    assert not [line for line in lines if line["event"] in LOSSES]
    is_over.set()


async def test_calls_are_finished_while_shutting_down(deployment: Deployment) -> None:
    """While a worker shuts down, calls are finished and acknowledged, and leases renewed."""
    log = CallLog()
    gate = asyncio.Event()
    deployment.admit(8, 2)
    one = deployment.start({"log": log.handler(lambda _: gate.wait())})
    await until(lambda: len(log.calls) == 8)
    stopping = asyncio.create_task(deployment.stop(one))
    await deployment.renew_while_stopping(one)
    gate.set()
    await stopping

    assert len(log.returns) == len(log.calls) == 8
    assert deployment.pending() == 8
    assert deployment.leases() == 0


async def test_calls_are_canceled_after_the_grace_time(deployment: Deployment) -> None:
    """A call that does not end in time is canceled; its entry stays, its lease is released."""
    never = asyncio.Event()
    log = CallLog()
    deployment.admit(8)
    handlers = {"log": log.handler(lambda _: never.wait())}
    one = deployment.start(handlers, shutdown_grace_s=600, lease_ttl_s=3600)
    await until(lambda: len(log.calls) == 8)
    stopping = asyncio.create_task(deployment.stop(one))
    await deployment.renew_while_stopping(one)
    assert not stopping.done()
    push(600)
    await stopping

    assert not log.returns
    assert deployment.pending() == 8
    assert deployment.leases() == 0
    assert deployment.live_workers() == 0


async def test_a_handler_that_ignores_cancellation_does_not_hold_the_worker(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker ends although a handler ignores its cancellation, and logs its name."""
    monkeypatch.setattr(worker, "CANCEL_GRACE_S", 0.2)
    is_ignoring = True

    async def ignore(_: Entry) -> None:
        while is_ignoring:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.05)

    deployment.admit(1)
    log = CallLog()
    one = deployment.start({"log": log.handler(ignore)}, shutdown_grace_s=0.2)
    await until(lambda: len(log.calls) == 1)
    with structlog.testing.capture_logs() as lines:
        await deployment.stop(one)
    assert [line["handler"] for line in lines if line["event"] == "handler.stuck"] == ["log"]
    is_ignoring = False
    await until(lambda: not one._partition_tasks)


async def test_shutting_down_without_redis(deployment: Deployment, tmp_path: Path) -> None:
    """A worker whose Redis is gone stops within its grace time."""
    settings = replace(deployment.settings, redis_url=Secret(f"unix://{tmp_path}/nothing"))
    async with connect(settings.redis_url) as deployment.connections:
        one = deployment.start({"log": CallLog().handler()})
        await asyncio.sleep(0.1)
        await deployment.stop(one)
