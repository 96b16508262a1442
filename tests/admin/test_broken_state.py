"""Pages of a deployment in whose Redis something is not ours, or another version's, or broken."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import pytest

from service.config import DAY_S, Settings
from service.delivery.consumer_groups import create_groups
from service.inbox.admission import Inbox
from service.storage.connections import Connections
from service.storage.keys import Keys
from service.transitions.transition import make_change
from tests.support.admissions import CREATED, SESSION_ID
from tests.support.shown import Shown

HUGE = "18446744073709551610-1"
ACTION = "20260731T140500-abcd"
ATTEMPT = {"event": CREATED.id, "outcome": "delivered", "attempt": "1"}
LETTER: Any = {"reason": b"\xff", "error": b"\xff", "place": b"\xff", "attempts": "many"}
REVERSAL = {"session_id": "vs_1", "previous": "verified", "current": "canceled", "event_id": "e"}
LIFE = (
    b'{"kind":"worker","version":"9","started_at":%b,"reason":null,"works":[],"last_event_at":%b}'
)


def _process(started_at: bytes = b"1", last_event_at: bytes = b"0", life: bytes = LIFE) -> bytes:
    described = life % (started_at, last_event_at) if b"%b" in life else life
    return b"%d batch %b" % (time.time() * 1000, described)


def _minute(keys: Keys) -> str:
    return keys.minute(int(time.time() // 60))


def _day(keys: Keys) -> str:
    return keys.day(int(time.time() // DAY_S))


async def _spoil_record(redis: Any, key: str, field: str, number: int, value: bytes) -> None:
    parts = (await redis.hget(key, field)).split(b" ")
    parts[number] = value
    await redis.hset(key, field, b" ".join(parts))


# Each with a client of Redis, the layout, and the partition of the session.
Spoil = Callable[[Any, Keys, int], Awaitable[Any]]
SPOILED: dict[str, Spoil] = {
    "a foreign attempt": lambda r, k, p: r.xadd(k.finished_attempts(p, "log"), {"x": "y"}),
    "half an attempt": lambda r, k, p: r.xadd(k.finished_attempts(p, "log"), {"event": CREATED.id}),
    "an attempt that is no text": lambda r, k, p: r.xadd(
        k.finished_attempts(p, "log"), ATTEMPT | {"outcome": b"\xff"}
    ),
    "an attempt without a number": lambda r, k, p: r.xadd(
        k.finished_attempts(p, "log"), ATTEMPT | {"attempt": "x"}
    ),
    "an attempt of no time": lambda r, k, p: r.xadd(
        k.finished_attempts(p, "log"), ATTEMPT, id=HUGE
    ),
    "a foreign letter": lambda r, k, p: r.xadd(k.dead_letters(p, "log"), {"x": "y"}, id="5-1"),
    "a letter that is no text": lambda r, k, p: r.xadd(k.dead_letters(p, "log"), LETTER, id="5-1"),
    "a letter of no time": lambda r, k, p: r.xadd(k.dead_letters(p, "log"), LETTER, id=HUGE),
    "other counts": lambda r, k, _: r.hset(
        _minute(k), mapping={"x": "y", "received:late": "z", "received:a:b": 1, "new:a:log": 7}
    ),
    "other counts of a day": lambda r, k, _: r.hset(_day(k), "reversals", "many"),
    "no time of the last event": lambda r, k, _: r.hset(_day(k), "last_event_ms", "soon"),
    "a last event of no time": lambda r, k, _: r.hset(_day(k), "last_event_ms", "9" * 30),
    "foreign processes": lambda r, k, _: r.hset(
        k.processes, mapping={"a": "x", "b": "", "c": "1 2", "d": "x x {}", "e": b"\xff 1 {}"}
    ),
    "other processes": lambda r, k, _: r.hset(
        k.processes, mapping={"a": _process(b"1e300"), "b": _process(b"-1e15"), "d": _process(
            life=b"[1]"), "e": _process(last_event_at=b"1e20")}
    ),
    "a foreign reversal": lambda r, k, _: r.xadd(k.reversals, {"x": "y"}),
    "a reversal of no time": lambda r, k, _: r.xadd(k.reversals, REVERSAL | {"at": "1e300"}),
    "a reversal without a time": lambda r, k, _: r.xadd(k.reversals, REVERSAL | {"at": "x"}),
    "another report": lambda r, k, _: r.set(k.endpoints, '{"at":1,"findings":[{"name":"x"}]}'),
    "no report": lambda r, k, _: r.set(k.endpoints, b"\xff"),
    "another action": lambda r, k, _: r.set(k.action(ACTION), '{"id":"x","state":"new"}'),
    "an operator's lease": lambda r, k, p: r.set(k.lease(p, "log"), b"\xff"),
    "an operator's group": lambda r, k, p: r.xgroup_create(k.transitions(p), b"\xff/?#"),
    "a foreign replay": lambda r, k, p: r.xadd(k.replays(p, "log"), {"change": SESSION_ID}),
    "a record without an epoch": lambda r, k, _: _spoil_record(
        r, k.session(SESSION_ID), "state", 1, b"9" * 25
    ),
    **{
        f"a record with an event {arrived!r}": lambda r, k, _, arrived=arrived: r.hset(  # type: ignore[misc]
            k.session(SESSION_ID), "evt_odd", arrived
        )
        for arrived in ("a 1 1 n " + HUGE, "a 1 1 n 1-x", "a 1 1 n 1", "l 1 9999999999999 n 1", "")
    },
}  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
async def test_pages_leave_out_what_cannot_be_read(
    client: httpx2.AsyncClient,
    connections: Connections,
    keys: Keys,
    settings: Settings,
    spoil: Spoil,
) -> None:
    """No page fails, and the overview still shows what can be read."""
    redis, partition = connections.client, keys.partition(SESSION_ID)
    await create_groups(connections, keys, ["log"])
    await Inbox(connections, keys, settings).admit(CREATED, make_change(CREATED))
    await redis.hset(keys.processes, "good-1", _process())
    await redis.hset(_minute(keys), "received:admitted", 4711)

    await spoil(redis, keys, partition)

    paths = ["handlers", "handlers/log", "dead-letters", "dead-letters/log", "sessions"]
    letters = [f"dead-letters/log/{partition}-{one}" for one in ("5-1", HUGE)]
    for path in (*paths, *letters, f"sessions/{SESSION_ID}", "endpoints", f"actions/{ACTION}"):
        assert (await client.get(f"/{path}")).status_code in {200, 404}, path
    shown = Shown((await client.get("/")).text).text
    assert "good-1" in shown
    assert "admitted 4,711" in shown
