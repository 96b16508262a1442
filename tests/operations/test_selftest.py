"""The self-test: all rows green where promises are kept, else red in the right row."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import httpx2
import orjson
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from service.config import DAY_S, Livemode, Settings
from service.errors import Rejected, RejectionReason
from service.operations import selftest_redis
from service.operations.selftest import Row, Selftest, SentSession
from service.secret import MASK, Secret
from service.storage.connections import Connections
from service.storage.keys import Keys
from service.stripe.events import Event, parse
from service.stripe.signatures import VerifiedPayload, verify
from service.transitions.ordering import order_key
from service.transitions.transition import SELFTEST_PREFIX, is_selftest, make_change
from tests.support.depth import takes_long
from tests.support.harness import SECRET, WEBHOOK, listening
from tests.support.processes import Process, Sandbox, open_sandbox
from tests.support.waiting import wait_until

MAX_BYTES = Settings().max_body_bytes

HANDLER = """
from contextlib import asynccontextmanager

@asynccontextmanager
async def open(environ):
    async def handle(transition):
        with __builtins__["open"]("shown", "a") as shown:
            shown.write(transition.session_id + "\\n")
    yield handle
"""


class Endpoint:
    """A receiver in memory that keeps every promise except those it is made to break."""

    def __init__(self, *flaws: str) -> None:
        self._flaws = flaws
        self._known: set[str] = set()
        self._keys_of: dict[str, int] = {}

    async def answer(self, request: Request) -> Response:
        """Answer one request."""
        try:
            if "breaks down" in self._flaws:
                return Response(status_code=500)
            return JSONResponse({"outcome": await self._outcome(request)})
        except Rejected as error:
            if error.reason in self._flaws:
                return JSONResponse({"outcome": "admitted"})
            status = 413 if error.reason is RejectionReason.BODY_TOO_LARGE else 400
            return JSONResponse({"error": error.reason}, status_code=status)

    async def _outcome(self, request: Request) -> str:
        body = await request.body()
        if len(body) > MAX_BYTES:
            raise Rejected(RejectionReason.BODY_TOO_LARGE)
        header = request.headers.get("stripe-signature")
        event = parse(self._verified(body, header.encode() if header else None))
        return self._outcome_of(event) if isinstance(event, Event) else "ignored"

    def _verified(self, body: bytes, header: bytes | None) -> VerifiedPayload:
        return verify(body, header, [SECRET], now=time.time(), tolerance_s=300)

    def _outcome_of(self, event: Event) -> str:
        if event.created < time.time() - 35 * DAY_S and "admits the old" not in self._flaws:
            return "expired"
        if event.id in self._known and "admits twice" not in self._flaws:
            return "duplicate"
        self._known.add(event.id)
        at = order_key(make_change(event), event.created)
        if at < self._keys_of.get(event.session.id, 0) and "sets back" not in self._flaws:
            return "late"
        self._keys_of[event.session.id] = at
        return "admitted"


@asynccontextmanager
async def serving(*flaws: str) -> AsyncIterator[str]:
    """Serve an endpoint with flaws, and yield its address."""
    app = Starlette(routes=[Route(WEBHOOK, Endpoint(*flaws).answer, methods=["POST"])])
    async with listening(app) as listener:
        yield f"http://127.0.0.1:{listener.port}{WEBHOOK}"


def selftest(*urls: str, settings: Settings | None = None, deliver: bool = False) -> Selftest:
    """Return a self-test of what answers at *urls*."""
    return Selftest(
        urls=urls,
        secret=SECRET,
        settings=settings or Settings(),
        deliver=deliver,
        random=Random(5),
        now=int(time.time()),
    )


async def tried(*urls: str, settings: Settings | None = None) -> list[Row]:
    """Return the rows of a self-test of what answers at *urls*."""
    rows, _ = await selftest(*urls, settings=settings).run()
    return rows


def broken(rows: list[Row]) -> set[str]:
    """Return the promises that were seen broken."""
    return {row.promise for row in rows if row.kept is False}


async def test_an_endpoint_that_keeps_every_promise_is_green() -> None:
    """No row is red, with one receiver or with two."""
    async with serving() as url:
        rows = await tried(url)
    async with serving() as url:
        twice = await tried(url, url)
    assert broken([*rows, *twice]) == set()
    assert len(rows) == len(twice) == 18


@pytest.mark.parametrize(
    ("flaw", "promises"),
    [
        ("signature_mismatch", {"a forged signature is refused", "an altered body is refused",
                                "a changed timestamp is refused"}),
        ("signature_missing", {"no signature is refused"}),
        ("signature_malformed", {"what is no signature is refused", "a v0 signature is refused"}),
        ("timestamp_too_old", {"a stale signature is refused"}),
        ("timestamp_too_new", {"a signature from the future is refused"}),
        ("body_not_json", {"a body that is no JSON is refused"}),
        ("body_not_an_event", {"a body that is no event is refused"}),
        ("field_missing", {"an event about no session is refused"}),
        ("body_too_large", {"an oversized body is refused"}),
        ("admits the old", {"an event that is too old is expired"}),
        ("admits twice", {"copies at once are admitted once",
                          "disorder and copies change no verdict"}),
        ("sets back", {"a verified session is not set back"}),
    ],
)  # fmt: skip
@takes_long
async def test_each_broken_promise_has_its_red_row(flaw: str, promises: set[str]) -> None:
    """An endpoint that breaks one promise is red in the rows of that promise only."""
    async with serving(flaw) as url:
        assert broken(await tried(url)) == promises


async def test_an_endpoint_that_fails_or_is_absent_keeps_nothing() -> None:
    """Neither a 500 nor silence counts as a kept promise."""
    async with serving("breaks down") as url:
        rows = await tried(url)
    assert all(row.kept is False for row in rows)
    assert {row.seen.split()[1] for row in rows} == {"http_500"}

    rows = await tried(url)
    assert all(row.kept is False for row in rows)


async def test_sessions_are_marked_unless_they_are_to_be_delivered() -> None:
    """The ids of a self-test's sessions are marked, with `deliver` none is."""
    async with serving() as url:
        _, marked = await selftest(url).run()
        _, ordinary = await selftest(url, deliver=True).run()
    assert all(is_selftest(session.session_id) for session in marked)
    assert not any(is_selftest(session.session_id) for session in ordinary)


async def test_limits_are_tried_where_the_settings_put_them() -> None:
    """What counts as stale or too large depends on the deployment's settings."""
    settings = replace(Settings(), signature_tolerance_s=30, max_body_bytes=MAX_BYTES * 2)
    async with serving() as url:
        rows = await tried(url, settings=settings)
    # This endpoint's tolerance is 300 s, so it accepts what 30 s would reject.
    assert broken(rows) == {
        "a stale signature is refused",
        "a signature from the future is refused",
    }


async def test_a_live_deployment_is_tried_with_live_events() -> None:
    """A deployment that ignores test events is sent live events."""
    bodies = []
    settings = replace(Settings(), livemode=Livemode.LIVE)

    async def keep(request: Request) -> Response:
        bodies.append(await request.body())
        return Response(status_code=400)

    async with listening(Starlette(routes=[Route(WEBHOOK, keep, methods=["POST"])])) as listener:
        await tried(f"http://127.0.0.1:{listener.port}{WEBHOOK}", settings=settings)
    whole = [orjson.loads(body) for body in bodies if body.endswith(b"}")]
    assert {event["livemode"] for event in whole} == {True}


@given(st.text("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", min_size=1))
def test_no_session_of_stripes_is_taken_for_a_selftests(word: str) -> None:
    """After the prefix, Stripe's ids have letters and digits only: none is marked."""
    assert not is_selftest(f"vs_{word}")


ACCEPTED = f"{SELFTEST_PREFIX}x"
REFUSED = f"{SELFTEST_PREFIX}refused"


@pytest.fixture
async def sent(connections: Connections, keys: Keys) -> list[SentSession]:
    """Return one session that was accepted and one that was refused, as Redis must hold them."""
    state = {
        "state": "1 1 01234567 0123456789abcdef R",
        "status": "8 verified",
        "latest": "R 1 evt_1",
    }
    record = state | {"evt_1": "a 1 1 nonce 1-0"}
    await connections.client.hset(keys.session(ACCEPTED), mapping=record)
    change = (
        f'{{"event_id":"evt_1","event_type":"x","occurred_at":"2026-01-01T00:00:00Z",'
        f'"session_id":"{ACCEPTED}","current":"verified"}}'
    )
    stream = _stream(keys)
    fields = {"change": change, "previous": "", "sequence": 1, "epoch": 1}
    await connections.client.xadd(stream, fields)
    [[_, [(entry_id, _)]]] = await connections.client.xreadgroup("log", "one", {stream: ">"})
    await connections.client.xack(stream, "log", entry_id)
    secrets = frozenset({b"canary"})
    return [
        SentSession(ACCEPTED, frozenset({"evt_1"}), "verified", 1, secrets),
        SentSession(REFUSED, frozenset(), "", 0, frozenset()),
    ]


def _stream(keys: Keys) -> str:
    return keys.transitions(keys.partition(ACCEPTED))


async def _seen(settings: Settings, sent: list[SentSession]) -> list[Row]:
    return await selftest_redis.inspect_redis(settings, sent, since=time.time())


async def test_a_correct_redis_is_green(
    sent: list[SentSession], settings: Settings, connections: Connections, keys: Keys
) -> None:
    """All rows are green, and the record is deleted; what could not be tried is not green."""
    assert [row.kept for row in await _seen(settings, sent)] == [True] * 5
    assert not await connections.client.exists(keys.session(ACCEPTED))
    rows = await _seen(settings, sent[1:])
    assert [row.kept for row in rows] == [None, True, None, None, None]


# What is wrong in Redis, the promise that it breaks, and how it comes to be.
FAULTS: dict[str, tuple[str, Callable[[redis.Redis, Keys], Any]]] = {
    "another status": (
        "every event and each final status is recorded",
        lambda client, keys: client.hset(keys.session(ACCEPTED), "status", "10 processing"),
    ),
    "an unreadable record": (
        "every event and each final status is recorded",
        lambda client, keys: client.hset(keys.session(ACCEPTED), "state", "?"),
    ),
    "a record of what was refused": (
        "nothing is recorded of what was refused",
        lambda client, keys: client.hset(keys.session(REFUSED), "status", "8 verified"),
    ),
    "no stream": (
        "sequences are 1, 2, 3 … without a gap",
        lambda client, keys: client.delete(_stream(keys)),
    ),
    "a secret": (
        "no client secret and no link is in Redis",
        lambda client, keys: client.hset(keys.session(ACCEPTED), "evt_2", "l 1 1 canary 1"),
    ),
    "a group that has read nothing": (
        "every handler's worker acknowledges transitions",
        lambda client, keys: client.xgroup_setid(_stream(keys), "log", "0"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_each_fault_in_redis_has_its_red_row(
    fault: str,
    sent: list[SentSession],
    settings: Settings,
    keys: Keys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is missing, wrong, secret or unacknowledged in Redis is red in its own row only."""
    monkeypatch.setattr(selftest_redis, "ACK_DEADLINE_S", 0.2)
    promise, spoil = FAULTS[fault]
    with redis.Redis.from_url(settings.redis_url.reveal()) as client:
        spoil(client, keys)

    assert broken(await _seen(settings, sent)) == {promise}


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        ({"redis_url": Secret("redis://127.0.0.1:1/0")}, "redis_unreachable"),
        ({"redis_prefix": "wrong"}, "nothing was ever stored under REDIS_PREFIX"),
        ({"partitions": 16}, "PARTITIONS is 16, but the layout in Redis was made for 8"),
    ],
)
async def test_another_deployment_breaks_no_promise(
    sent: list[SentSession], settings: Settings, wrong: dict[str, Any], seen: str
) -> None:
    """With a wrong setting of its own, the self-test reports no broken promise."""
    [row] = await _seen(replace(settings, **wrong), sent)

    assert (row.seen, row.kept) == (seen, None)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """Yield a sandbox with a handler that notes the sessions it is called with."""
    directory = tmp_path_factory.mktemp("selftest")
    (directory / "showing.py").write_text(HANDLER)
    with open_sandbox(directory) as opened:
        yield opened


HANDLERS = {"HANDLERS": "log,showing:open"}


def _selftest(
    sandbox: Sandbox, *arguments: str, **settings: str
) -> tuple[Process, list[dict[str, Any]]]:
    command = sandbox.run("selftest", *arguments, "--json", **HANDLERS, **settings)
    return command, orjson.loads(command.out)


@takes_long
def test_a_deployment_behind_two_receivers_is_green(sandbox: Sandbox) -> None:
    """Two receivers and a worker keep every promise; handlers are called with --deliver only."""
    receivers = [sandbox.start("serve", **HANDLERS).ready() for _ in range(2)]
    worker = sandbox.start("work", **HANDLERS).ready()
    urls = [word for receiver in receivers for word in ("--to", receiver.url)]
    command, rows = _selftest(sandbox, *urls)
    shown = Path(sandbox.directory, "shown")

    assert [row for row in rows if row["kept"] is not True] == []
    assert command.wait() == 0
    assert not shown.exists()
    assert 'outcome="selftest"' in httpx2.get(f"{worker.admin}/metrics").text
    with redis.Redis.from_url(sandbox.server.url) as client:
        assert [*client.scan_iter(f"*{SELFTEST_PREFIX}*")] == []

    command, rows = _selftest(sandbox, *urls, "--deliver")
    assert command.wait() == 0, rows
    assert wait_until(shown.exists)
    for process in (*receivers, worker):
        assert process.stop() == 0
        assert b"Traceback" not in process.out + process.err


def test_an_address_at_which_nothing_answers_is_one_line(sandbox: Sandbox) -> None:
    """Exit code 1 and the address, without its password."""
    silent = f"http://user:canary@127.0.0.1:1{WEBHOOK}"
    typed = sandbox.invoke("selftest", "--to", silent)

    assert (typed.code, typed.out) == (1, b"")
    said = f"error: http://{MASK}@127.0.0.1:1{WEBHOOK}: no answer\n"
    assert typed.err == said.encode()
