"""Laws of `check`: what waits for whom, who is gone, and what cannot be is said."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from service.config import Livemode, Settings
from service.delivery.consumer import FAILURE_WEIGHT
from service.delivery.consumer_groups import create_groups
from service.errors import ConfigError, Unreachable
from service.handlers import loading
from service.operations import check
from service.secret import Secret
from service.storage.assessment import Finding, Promise, Severity
from service.storage.connections import Connections
from service.storage.layout import Keys, claim
from service.transitions.transition import StatusTransition
from tests.support.harness import soon
from tests.support.servers import server

FIELDS: dict[Any, Any] = {"change": "{}", "previous": "", "sequence": 1, "epoch": 1}


async def found(settings: Settings, name: str) -> Finding:
    """Return the one finding of that name."""
    [one] = [each for each in await check.collect_findings(settings, {}) if each.name == name]
    return one


@pytest.mark.usefixtures("connections")
async def test_all_is_fine(settings: Settings) -> None:
    """With nothing waiting and the log handler, group and handler are fine."""
    group, handler = [await found(settings, f"{kind} log") for kind in ("group", "handler")]

    assert group.severity is handler.severity is Severity.FINE
    assert group.meaning == "0 transitions unacknowledged, 0 replays, 0 dead letters"
    assert handler.meaning == "opens (service.handlers.log:open)"


async def test_the_oldest_is_told_and_a_long_wait_is_a_warning(
    connections: Connections, settings: Settings, keys: Keys
) -> None:
    """What has waited for long is told with its age, and that nobody works for the handler."""
    now_ms = int(time.time() * 1000)
    await connections.client.xadd(keys.transitions(3), FIELDS, id=f"{now_ms - 400_000}-1")
    await connections.client.xadd(keys.transitions(5), FIELDS, id=f"{now_ms - 2_000}-1")
    group = await found(settings, "group log")

    assert group.severity is Severity.WARNING
    assert re.match(
        r"2 transitions unacknowledged, the oldest for 4\d\d s, 0 replays", group.meaning
    )
    assert group.meaning.endswith("; no worker works for it")


def test_each_promise_has_a_verdict() -> None:
    """A promise is as safe as the worst finding that touches it, and that is named."""
    findings = [
        Finding("clock", Severity.FATAL, (Promise.AUTHENTIC, Promise.ONCE), ""),
        Finding("fsync", Severity.WARNING, (Promise.DURABLE, Promise.ONCE), ""),
        Finding("memory", Severity.WARNING, (Promise.DURABLE,), ""),
        Finding("eviction", Severity.FINE, (Promise.FORWARD_ONLY,), ""),
    ]
    assert check.worst_by_promise(findings) == [
        (Promise.AUTHENTIC, Severity.FATAL, "clock"),
        (Promise.DURABLE, Severity.WARNING, "fsync, memory"),
        (Promise.ONCE, Severity.FATAL, "clock"),
        (Promise.FORWARD_ONLY, Severity.FINE, ""),
        (Promise.ALONE, Severity.FINE, ""),
        (Promise.SECRET, Severity.FINE, ""),
    ]


@pytest.mark.usefixtures("connections")
async def test_every_promise_is_looked_at(settings: Settings) -> None:
    """No promise is called kept because nobody looked."""
    findings = await check.collect_findings(settings, {})
    assert {promise for each in findings for promise in each.promises} == {*Promise}


@pytest.mark.usefixtures("connections")
async def test_a_tolerance_above_stripes_is_a_warning(settings: Settings) -> None:
    """A signature may be as old as Stripe's own libraries let it be, or it is said."""
    wide = await found(replace(settings, signature_tolerance_s=301), "signatures")
    assert wide.severity is Severity.WARNING
    assert (await found(settings, "signatures")).severity is Severity.FINE


@pytest.mark.usefixtures("connections")
async def test_a_prefix_under_which_nothing_is_stored_is_a_warning(settings: Settings) -> None:
    """A deployment that is not there is told from one in which all is well."""
    assert await found(settings, "layout") == Finding(
        "layout", Severity.FINE, (Promise.ONCE,), "8 partitions under idv"
    )
    other = await found(replace(settings, redis_prefix="other"), "layout")
    assert other.severity is Severity.WARNING


async def test_dead_letters_are_a_warning(
    connections: Connections, settings: Settings, keys: Keys
) -> None:
    """Dead letters are a warning, with their number beside what is unsettled and replayed."""
    for key in (keys.dead_letters(1, "log"), keys.dead_letters(2, "log"), keys.replays(0, "log")):
        await connections.client.xadd(key, FIELDS)
    await connections.client.xadd(keys.transitions(3), FIELDS)
    group = await found(settings, "group log")

    assert group.severity is Severity.WARNING
    assert re.fullmatch(
        "1 transitions unacknowledged(, the oldest for [01] s)?, 1 replays, 2 dead letters",
        group.meaning,
    )


async def test_a_handler_that_fails_is_a_warning(
    connections: Connections, settings: Settings, keys: Keys
) -> None:
    """What a handler has failed with is told before it has become a dead letter."""
    for partition in (3, 3, 5):
        await connections.client.xadd(keys.transitions(partition), FIELDS)
        await connections.client.xreadgroup("log", "w", {keys.transitions(partition): ">"})
    assert (await found(settings, "group log")).severity is Severity.FINE
    for partition in (3, 5):
        [entry, *_] = await connections.client.xrange(keys.transitions(partition))
        failed_twice = ("XCLAIM", keys.transitions(partition), "log", "w", 0, entry[0])
        await connections.client.execute_command(
            *failed_twice, "RETRYCOUNT", 2 * FAILURE_WEIGHT + 1
        )
    group = await found(settings, "group log")

    assert group.severity is Severity.WARNING
    assert "; 2 of its transitions failed and are retried" in group.meaning


@pytest.mark.usefixtures("connections")
async def test_without_a_signing_secret_nothing_can_be_received(settings: Settings) -> None:
    """A receiver would not start, and that is said."""
    signatures = await found(replace(settings, secrets={}), "signatures")
    assert signatures.severity is Severity.FATAL
    assert "STRIPE_WEBHOOK_SECRETS" in signatures.meaning


@pytest.mark.parametrize(
    ("handlers", "livemode", "severity"),
    [
        (("log",), Livemode.BOTH, Severity.WARNING),
        (("log",), Livemode.LIVE, Severity.WARNING),
        (("log",), Livemode.TEST, Severity.FINE),
        (("log", "redis_stream"), Livemode.LIVE, Severity.FINE),
    ],
)
@pytest.mark.usefixtures("connections")
async def test_the_log_alone_leads_nowhere(
    settings: Settings, handlers: tuple[str, ...], livemode: Livemode, severity: Severity
) -> None:
    """Where real events come, a log as the only handler is a warning."""
    chosen = replace(settings, handlers=handlers, livemode=livemode)
    assert (await found(chosen, "handlers")).severity is severity


async def test_a_full_redis_is_fatal(connections: Connections, settings: Settings) -> None:
    """Where every event gets 503, `check` is not content, and everything else is told as well."""
    await connections.client.config_set("maxmemory", 1)
    try:
        findings = await check.collect_findings(settings, {})
    finally:
        await connections.client.config_set("maxmemory", 0)
    severities = {each.name: each.severity for each in findings}
    assert severities["writes"] is Severity.FATAL
    assert severities.keys() >= {"memory", "group log", "handler log"}


async def test_a_busy_redis_is_told_as_such(settings: Settings, tmp_path: Path) -> None:
    """A Redis that runs a script and answers nothing else is a finding, not a silence."""
    with server(tmp_path) as started, started.client() as client:
        client.config_set("busy-reply-threshold", 10)
        with ThreadPoolExecutor(1) as threads, started.client() as other:
            running = threads.submit(other.eval, "while true do end", 0)
            soon(lambda: _refuses_with(client, "BUSY"))
            busy = replace(settings, redis_url=Secret(started.url))
            writes = await found(busy, "writes")
            client.script_kill()
            assert running.exception()
    assert writes.severity is Severity.FATAL
    assert "BUSY" in writes.meaning


def _refuses_with(client: redis.Redis, word: str) -> bool:
    try:
        client.ping()
    except redis.ResponseError as error:
        return str(error).startswith(word)
    return False


async def test_a_redis_that_is_too_old_is_told_as_such(settings: Settings) -> None:
    """Redis 6.2 knows no `#!lua` and refuses our scripts: its version is the reason."""
    asked = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while words := await _command(reader):
            asked.append(words[0])
            writer.write(_SAID_BY_6_2.get(words[0], b"-ERR unknown command\r\n"))
        writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        old = replace(settings, redis_url=Secret(f"redis://127.0.0.1:{port}"))
        findings = {each.name: each for each in await check.collect_findings(old, {})}
    assert b"EVAL" in asked
    assert findings["version"].severity is Severity.FATAL
    assert "older than Redis 7.0" in findings["version"].meaning
    assert "handler log" in findings
    assert not {"writes", "group log"} & findings.keys()


_INFO = b"redis_version:6.2.14\r\nrun_id:0123456789abcdef\r\nrole:master\r\n"
_SAID_BY_6_2 = {
    b"HELLO": b"%1\r\n+proto\r\n:3\r\n",
    b"INFO": b"$%d\r\n%s\r\n" % (len(_INFO), _INFO),
    b"TIME": b"*2\r\n$10\r\n%d\r\n$1\r\n0\r\n" % time.time(),
    b"EVAL": b"-ERR Error compiling script (new function): unexpected symbol near '#'\r\n",
    b"CONFIG": b"-ERR wrong number of arguments\r\n",
    b"HMGET": b"*2\r\n_\r\n_\r\n",
}


async def _command(reader: asyncio.StreamReader) -> list[bytes]:
    """Read a command as a client sends it; nothing at the end."""
    words = []
    for _ in range(int((await reader.readline())[1:] or 0)):
        size = int((await reader.readline())[1:])
        words.append((await reader.readexactly(size + 2))[:-2])
    return words


async def test_a_group_without_an_owner_is_a_warning(
    connections: Connections, settings: Settings, keys: Keys
) -> None:
    """A group that is not among HANDLERS is reported: it holds trimming."""
    await create_groups(connections, keys, ["gone"])
    group = await found(settings, "group gone")

    assert group.severity is Severity.WARNING
    assert "not among HANDLERS" in group.meaning


async def test_another_layout_is_refused(
    connections: Connections, settings: Settings, keys: Keys
) -> None:
    """With a number of partitions that Redis was not made for nothing is looked at."""
    await claim(connections, keys)
    with pytest.raises(ConfigError, match="PARTITIONS is 16"):
        await check.collect_findings(replace(settings, partitions=16), {})


async def test_a_look_claims_nothing(
    connections: Connections, settings: Settings, keys: Keys
) -> None:
    """On an empty server `check` leaves no trace."""
    await connections.client.flushall()
    await check.collect_findings(settings, {})
    assert await connections.client.keys("*") == []


@pytest.mark.usefixtures("connections")
@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (ConfigError(["NAME: is wrong"]), "NAME: is wrong"),
        (ConnectionError("secret"), "its queue cannot be reached: connection_lost"),
        (Unreachable("no_such_queue"), "its queue cannot be reached: no_such_queue"),
        (LookupError("secret"), f"HANDLERS: log cannot be checked: LookupError ({__file__}:"),
    ],
)
async def test_a_handler_that_fails_its_check_is_fatal(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    meaning: str,
) -> None:
    """What a handler's own look at its queue raises is told by its class, or our own words."""

    class Own:
        async def __call__(self, _: StatusTransition, /) -> None: ...

        async def check(self) -> None:
            raise error

    @asynccontextmanager
    async def opener(_: Mapping[str, str]) -> AsyncIterator[Own]:
        yield Own()

    monkeypatch.setattr(loading, "find", lambda _: {"log": opener})
    one = await found(settings, "handler log")
    assert one.severity is Severity.FATAL
    assert one.meaning.startswith(meaning)
    assert one.meaning.endswith(" (service.handlers.log:open)")
    assert "secret" not in one.meaning


@pytest.mark.usefixtures("connections")
async def test_a_handler_that_hangs_is_given_up(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue that never answers is fatal after a while, not a hang."""

    @asynccontextmanager
    async def opener(_: Mapping[str, str]) -> AsyncIterator[None]:
        await asyncio.Event().wait()
        yield

    monkeypatch.setattr(check, "CHECK_TIMEOUT_S", 0.02)
    monkeypatch.setattr(loading, "find", lambda _: {"log": opener})
    assert "TimeoutError" in (await found(settings, "handler log")).meaning
