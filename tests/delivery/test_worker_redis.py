"""Tests of workers whose Redis restarts, forgets, or changes its clock."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import structlog.testing

from service.config import Settings
from service.delivery.consumer_groups import create_groups
from service.errors import ConfigError
from service.runtime.embedded_redis import EmbeddedServer, find_server
from service.secret import Secret
from service.storage.connections import connect
from tests.support.waiting import until
from tests.support.workers import SETTINGS, TTL_S, CallLog, Deployment, check_order, held


@contextmanager
def _server(directory: Path) -> Iterator[EmbeddedServer]:
    chosen = {**os.environ, "REDIS_SERVER": os.environ.get("TEST_REDIS_SERVER", "")}
    with EmbeddedServer.start(find_server(chosen), directory=directory) as server:
        yield server


async def test_a_worker_survives_a_restart_of_redis(tmp_path: Path, intervals: list[float]) -> None:
    """Without Redis a worker tries once in each interval and logs each reason once."""
    link = tmp_path / "redis.sock"
    limits: dict[str, Any] = {**SETTINGS, "lease_ttl_s": TTL_S}
    settings = Settings(redis_url=Secret(f"unix://{link}"), **limits)
    log = CallLog()
    async with connect(settings.redis_url) as connections:
        with redis.Redis.from_url(settings.redis_url.reveal()) as client:
            deployment = Deployment(settings, client, connections)
            with _server(tmp_path / "data") as server:
                link.symlink_to(server.socket)
                await create_groups(connections, deployment.keys, settings.handlers)
                handlers = {"log": log.handler(lambda _: asyncio.sleep(0.01))}
                one = deployment.start(handlers)
                deployment.admit(100, 4)
                await until(lambda: len(log.returns) > 100)
            link.unlink()
            with structlog.testing.capture_logs() as lines:
                await until(lambda: held(one) == 0)
                idle = len(intervals)
                await until(lambda: len(intervals) > idle + 3)
            assert set(intervals[idle:]) == {one._interval_s}
            logged = [(line["event"], line["reason"]) for line in lines]
            assert sorted(logged) == sorted({*logged})
            assert {event for event, _ in logged} == {"worker.rebalance_failed", "dispatcher.ended"}
            assert max(line.get("dispatchers", 0) for line in lines) == 8
            with _server(tmp_path / "data") as server:
                with structlog.testing.capture_logs() as lines:
                    link.symlink_to(server.socket)
                    await deployment.hold_all(one)
                    await deployment.deliver_all(lambda: log.returns)
                assert [line["event"] for line in lines].count("worker.rebalance_recovered") == 1
                await deployment.stop(one)

    check_order(log.calls, deployment.admitted)


async def test_another_layout_ends_the_worker(deployment: Deployment) -> None:
    """If another layout has been claimed, the worker ends with an error that names it."""
    one = deployment.start({"log": CallLog().handler()})
    await deployment.hold_all(one)
    deployment.client.hset(deployment.keys.layout, "partitions", 16)
    with pytest.raises(ConfigError, match="PARTITIONS is 8"):
        await deployment.until_ended(one)
    assert deployment.leases() == 0


async def test_what_an_operator_deletes_is_created_again(deployment: Deployment) -> None:
    """The worker creates the groups of streams again, and claims the layout again."""
    log = CallLog()
    one = deployment.start({"log": log.handler()})
    await deployment.hold_all(one)
    deployment.admit(20)
    await until(lambda: len(log.returns) == 20)
    layout = deployment.keys.layout
    streams = [deployment.keys.transitions(n) for n in range(deployment.keys.partitions)]
    deployment.client.delete(layout, *streams)
    with structlog.testing.capture_logs() as lines:
        deployment.admit(20)
        await until(lambda: len(log.returns) == 40)
    check_order(log.calls, deployment.admitted)
    assert "group.created" in {line["event"] for line in lines}
    await until(lambda: deployment.client.exists(layout))
