"""Laws of dead letters' age: the old ones go, after a warning, and by no wrong clock."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
from redis.exceptions import ConnectionError as RedisConnectionError

from service.config import DAY_S, Settings
from service.delivery import dead_letter_expiry as module
from service.delivery.consumer_groups import create_groups
from service.delivery.dead_letter_expiry import (
    LOOK_EVERY_S,
    WARN_BEFORE_S,
    WARN_EVERY_S,
    DeadLetterExpiry,
)
from service.delivery.worker import Worker
from service.secret import Secret
from service.storage.connections import Connections, connect
from service.storage.layout import Keys
from service.telemetry import metrics
from tests.support.clocks import clocked_server, needs_libfaketime
from tests.support.servers import until
from tests.support.virtual_time import push

RETENTION_S = 90 * DAY_S
PLACES = [("log", 0), ("log", 1), ("other", 0)]
FIELDS: dict[Any, Any] = {"change": "{}", "reason": "exhausted"}


class Post:
    """Dead letters of an empty server, and who looks at their age."""

    def __init__(
        self, connections: Connections, keys: Keys, retention_s: int = RETENTION_S
    ) -> None:
        self.client: Any = connections.client
        self.keys = keys
        self.expiry = DeadLetterExpiry(connections, keys, retention_s=retention_s)

    async def dead_letter(self, age_s: float, handler: str = "log", partition: int = 0) -> str:
        """Make a dead letter of some age; return its id."""
        entry_id = f"{(time.time() - age_s) * 1000:.0f}-0"
        await self.client.xadd(self.keys.dead_letters(partition, handler), FIELDS, id=entry_id)
        return entry_id

    async def letters(self, handler: str = "log", partition: int = 0) -> list[str]:
        """Return the ids of the dead letters there are."""
        found = await self.client.xrange(self.keys.dead_letters(partition, handler))
        return [entry_id.decode() for entry_id, _ in found]

    async def turn(self) -> list[tuple[str, str]]:
        """Look once; return event and handler of each line that is logged."""
        push(LOOK_EVERY_S)
        with structlog.testing.capture_logs() as lines:
            await self.expiry.turn(PLACES)
        return [(line["event"], line["handler"]) for line in lines]


@pytest.fixture
def post(connections: Connections, keys: Keys) -> Post:
    """Return an empty server."""
    return Post(connections, keys)


def expires_s(handler: str) -> float:
    """Return what the gauge says."""
    return float(metrics.DEAD_LETTERS_EXPIRE.labels(handler)._value.get())


async def test_what_is_too_old_goes_and_nothing_else(post: Post) -> None:
    """A dead letter is kept for as long as was asked for, in every partition, and no longer."""
    await post.dead_letter(RETENTION_S + DAY_S)
    await post.dead_letter(RETENTION_S + 1)
    young = await post.dead_letter(RETENTION_S - 60)
    await post.dead_letter(RETENTION_S + 1, partition=1)
    others = await post.dead_letter(WARN_BEFORE_S + 60, "other")
    not_ours = await post.dead_letter(RETENTION_S + 1, "other", partition=1)

    assert await post.turn() == [("dead_letters.expired", "log"), ("dead_letters.expiring", "log")]
    assert await post.letters() == [young]
    assert await post.letters(partition=1) == []
    assert await post.letters("other") == [others]
    assert await post.letters("other", partition=1) == [not_ours]
    assert 0 < expires_s("log") <= 60
    assert expires_s("other") == pytest.approx(RETENTION_S - WARN_BEFORE_S - 60, abs=60)


@pytest.mark.parametrize(("before_s", "warns"), [(60, True), (-60, False)])
async def test_a_week_before_it_is_said_once_a_day(
    post: Post, before_s: float, *, warns: bool
) -> None:
    """The warning comes in the last week, not before, and again on each day of it."""
    await post.dead_letter(RETENTION_S - WARN_BEFORE_S + before_s)
    warning = [("dead_letters.expiring", "log")] * warns
    assert await post.turn() == warning
    assert await post.turn() == []
    push(WARN_EVERY_S)
    assert await post.turn() == warning
    assert (expires_s("log") < WARN_BEFORE_S) is warns


async def test_without_letters_nothing_is_said(post: Post) -> None:
    """Where there is nothing, nothing will ever go."""
    assert await post.turn() == []
    assert expires_s("log") == expires_s("other") == math.inf


async def test_a_limit_of_zero_keeps_all(connections: Connections, keys: Keys) -> None:
    """Whoever sets no limit keeps everything."""
    post = Post(connections, keys, retention_s=0)
    old = await post.dead_letter(3650 * DAY_S)
    assert await post.turn() == []
    assert await post.letters() == [old]


async def test_many_go_bit_by_bit(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backlog of old letters is no long call: each look deletes so many, the oldest first."""
    monkeypatch.setattr(module, "MAX_DELETED_PER_CALL", 2)
    entry_ids = [await post.dead_letter(RETENTION_S + 10 - n) for n in range(5)]
    for left in (3, 1, 0):
        await post.turn()
        assert await post.letters() == entry_ids[5 - left :]


async def test_looks_are_now_and_then(post: Post) -> None:
    """What was looked at is left alone for a while."""
    await post.turn()
    old = await post.dead_letter(RETENTION_S + 1)
    await post.expiry.turn(PLACES)
    assert await post.letters() == [old]


async def test_an_error_of_redis_is_told(
    post: Post, connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be asked is no end of a warning."""

    async def run(calls: list[Any]) -> list[Exception]:
        return [RedisConnectionError()] * len(calls)

    monkeypatch.setattr(connections, "run", run)
    with pytest.raises(RedisConnectionError):
        await post.turn()


@needs_libfaketime
@pytest.mark.parametrize("step_s", [100 * DAY_S, -100 * DAY_S])
async def test_a_wrong_clock_deletes_nothing(tmp_path: Path, keys: Keys, step_s: float) -> None:
    """Where Redis's clock and ours differ, what looks too old may be new."""
    with clocked_server(tmp_path) as clocked:
        async with connect(Secret(clocked.server.url)) as connections:
            post = Post(connections, keys)
            letter = await post.dead_letter(0 if step_s > 0 else RETENTION_S + 1)
            clocked.step(step_s)
            await post.turn()
            assert await post.letters() == [letter]
            clocked.step(0)
            await post.turn()
            assert await post.letters() == ([letter] if step_s > 0 else [])


async def test_a_worker_deletes_what_is_too_old(
    make_settings: Callable[..., Settings], connections: Connections, keys: Keys
) -> None:
    """The limit that is set is the one that a handler's worker keeps."""
    settings = make_settings(dead_letter_retention_days=1)
    await create_groups(connections, keys, settings.handlers)
    post = Post(connections, keys)
    await post.dead_letter(DAY_S + 60)
    young = await post.dead_letter(DAY_S - 600)

    async def handle(_: object) -> None:
        """Take it."""

    stopping = asyncio.Event()
    work = asyncio.create_task(Worker(connections, keys, settings, {"log": handle}).run(stopping))

    async def is_gone() -> bool:
        return await post.letters() == [young]

    await until(is_gone)
    stopping.set()
    await work
