"""Tests of workers whose Redis restarts, forgets, or changes its clock."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
import structlog.testing

from service.config import Settings
from service.delivery.consumer_groups import create_groups
from service.errors import ConfigError
from service.runtime.embedded_redis import EmbeddedServer, find_server
from service.secret import Secret
from service.storage.connections import Connections, connect
from tests.support.clocks import clocked_server, needs_libfaketime
from tests.support.waiting import until
from tests.support.workers import SETTINGS, TTL_S, CallLog, Deployment, check_order, held


@contextmanager
def _server(directory: Path) -> Iterator[EmbeddedServer]:
    chosen = {**os.environ, "REDIS_SERVER": os.environ.get("TEST_REDIS_SERVER", "")}
    with EmbeddedServer.start(find_server(chosen), directory=directory) as server:
        yield server


def _settings(url: str) -> Settings:
    return Settings(redis_url=Secret(url), **{**SETTINGS, "lease_ttl_s": TTL_S})  # type: ignore[arg-type]


async def test_a_worker_survives_a_restart_of_redis(tmp_path: Path, intervals: list[float]) -> None:
    """Without Redis a worker tries once in each interval and logs little; then it goes on."""
    link = tmp_path / "redis.sock"
    settings = _settings(f"unix://{link}")
    log = CallLog()
    async with connect(settings.redis_url) as connections:
        with redis.Redis.from_url(settings.redis_url.reveal()) as client:
            deployment = Deployment(settings, client)
            with _server(tmp_path / "data") as server:
                link.symlink_to(server.socket)
                await create_groups(connections, deployment.keys, settings.handlers)
                handlers = {"log": log.handler(lambda _: asyncio.sleep(0.01))}
                one = deployment.start(connections, handlers)
                deployment.admit(100, 4)
                await until(lambda: len(log.returns) > 100)
            link.unlink()
            with structlog.testing.capture_logs() as lines:
                before = len(intervals)
                await until(lambda: held(one) == 0)
                idle = len(intervals)
                await until(lambda: len(intervals) > idle + 3)
            # Each of the three periodic tasks, and each reason, may have logged before its wait.
            assert len(lines) <= len(intervals) - before + 3 + 2
            assert set(intervals[idle:]) == {one._interval_s}
            ended = [line for line in lines if line["event"] == "dispatcher.ended"]
            assert len(ended) == len({line["reason"] for line in ended})
            assert max(line["dispatchers"] for line in ended) == 8
            with _server(tmp_path / "data") as server:
                link.symlink_to(server.socket)
                await deployment.hold_all(one)
                await deployment.deliver_all(lambda: log.returns)
                await deployment.stop(one)

    check_order(log.calls, deployment.admitted)


async def test_an_emptied_redis_is_used_again(
    deployment: Deployment, connections: Connections
) -> None:
    """After Redis has lost everything, the worker restores layout, groups and leases."""
    log = CallLog()
    one = deployment.start(connections, {"log": log.handler()})
    await deployment.hold_all(one)
    deployment.client.flushall()
    deployment.admit(30)
    await until(lambda: len(log.returns) == 30)
    check_order(log.calls, deployment.admitted)
    layout = deployment.keys.layout
    await until(lambda: deployment.client.hget(layout, "partitions") == b"8")


async def test_another_layout_ends_the_worker(
    deployment: Deployment, connections: Connections
) -> None:
    """If another layout has been claimed, the worker ends with an error that names it."""
    one = deployment.start(connections, {"log": CallLog().handler()})
    await deployment.hold_all(one)
    deployment.client.hset(deployment.keys.layout, "partitions", 16)
    with pytest.raises(ConfigError, match="PARTITIONS is 8"):
        await deployment.until_ended(one)
    assert deployment.leases() == 0


async def test_a_deleted_stream_is_created_again(
    deployment: Deployment, connections: Connections
) -> None:
    """If an operator deletes a stream, the worker creates its groups again."""
    log = CallLog()
    one = deployment.start(connections, {"log": log.handler()})
    await deployment.hold_all(one)
    deployment.admit(20)
    await until(lambda: len(log.returns) == 20)
    for partition in range(deployment.keys.partitions):
        deployment.client.delete(deployment.keys.transitions(partition))
    with structlog.testing.capture_logs() as lines:
        deployment.admit(20)
        await until(lambda: len(log.returns) == 40)
    check_order(log.calls, deployment.admitted)
    assert "group.created" in {line["event"] for line in lines}


@needs_libfaketime
async def test_leases_of_a_dead_worker_are_taken_though_the_clock_steps_back(
    tmp_path: Path,
) -> None:
    """If Redis's clock steps back, the leases of a dead worker expire no later."""
    with clocked_server(tmp_path) as clocked, clocked.server.client() as client:
        settings = _settings(clocked.server.url)
        deployment = Deployment(settings, client)
        half = deployment.keys.partitions / 2
        log = CallLog()
        never = asyncio.Event()
        async with connect(settings.redis_url) as connections:
            await create_groups(connections, deployment.keys, settings.handlers)
            handlers = {"log": CallLog().handler(lambda _: never.wait())}
            first = deployment.start(connections, handlers)
            second = deployment.start(connections, {"log": log.handler()})
            await until(lambda: held(first) == held(second) == half)
            deployment.admit(30, 2)
            await until(lambda: len(log.returns) + deployment.pending() == 60)
            clocked.step(-600)
            with structlog.testing.capture_logs() as lines:
                deployment.kill(first)
                await deployment.hold_all(second)
                await until(lambda: deployment.pending() == 0)
            await deployment.close()

    check_order(log.calls, deployment.admitted)
    taken = [line for line in lines if line["event"] == "partitions.taken_over"]
    assert sum(line["partitions"] for line in taken if line["worker"] == first.name) == half
