"""Laws of `check`: what waits for whom, who is gone, and what cannot be is said."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from service import checks, handlers
from service.config import Settings
from service.connections import Connections
from service.errors import ConfigError
from service.findings import Finding, Promise, Severity
from service.layout import Keys, guard, open_groups
from service.transitions import StatusTransition

FIELDS: dict[Any, Any] = {"change": "{}", "previous": "", "sequence": 1, "epoch": 1}


async def found(settings: Settings, name: str) -> Finding:
    """Return the one finding of that name."""
    [one] = [each for each in await checks.findings(settings, {}) if each.name == name]
    return one


@pytest.mark.usefixtures("connections")
async def test_all_is_fine(settings: Settings) -> None:
    """With nothing waiting and the log handler, group and handler are fine."""
    group, handler = [await found(settings, f"{kind} log") for kind in ("group", "handler")]

    assert group.severity is handler.severity is Severity.FINE
    assert group.meaning == "0 of transitions unsettled, 0 replays, 0 dead letters"
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
    assert re.match(r"2 of transitions unsettled, the oldest for 4\d\d s, 0 replays", group.meaning)
    assert group.meaning.endswith("; no worker works for it")


def test_each_promise_has_a_verdict() -> None:
    """A promise is as safe as the worst finding that touches it, and that is named."""
    findings = [
        Finding("clock", Severity.FATAL, (Promise.AUTHENTIC, Promise.ONCE), ""),
        Finding("fsync", Severity.WARNING, (Promise.DURABLE, Promise.ONCE), ""),
        Finding("memory", Severity.WARNING, (Promise.DURABLE,), ""),
        Finding("eviction", Severity.FINE, (Promise.FORWARD_ONLY,), ""),
    ]
    assert checks.verdicts(findings) == [
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
    findings = await checks.findings(settings, {})
    assert {promise for each in findings for promise in each.promises} == {*Promise}


@pytest.mark.usefixtures("connections")
async def test_a_tolerance_above_stripes_is_a_warning(settings: Settings) -> None:
    """A signature may be as old as Stripe's own libraries let it be, or it is said."""
    wide = await found(replace(settings, signature_tolerance_s=301), "signatures")
    assert wide.severity is Severity.WARNING
    assert (await found(settings, "signatures")).severity is Severity.FINE


async def test_dead_letters_are_a_warning(
    connections: Connections, settings: Settings, keys: Keys
) -> None:
    """Dead letters are a warning, with their number beside what is unsettled and replayed."""
    for key in (keys.dead(1, "log"), keys.dead(2, "log"), keys.replays(0, "log")):
        await connections.client.xadd(key, FIELDS)
    await connections.client.xadd(keys.transitions(3), FIELDS)
    group = await found(settings, "group log")

    assert group.severity is Severity.WARNING
    assert re.fullmatch(
        "1 of transitions unsettled(, the oldest for [01] s)?, 1 replays, 2 dead letters",
        group.meaning,
    )


async def test_a_group_without_an_owner_is_a_warning(
    connections: Connections, settings: Settings, keys: Keys
) -> None:
    """A group that is not among HANDLERS is reported: it holds trimming."""
    await open_groups(connections, keys, ["gone"])
    group = await found(settings, "group gone")

    assert group.severity is Severity.WARNING
    assert "not among HANDLERS" in group.meaning


async def test_another_layout_is_refused(
    connections: Connections, settings: Settings, keys: Keys
) -> None:
    """With a number of partitions that Redis was not made for nothing is looked at."""
    await guard(connections, keys)
    with pytest.raises(ConfigError, match="PARTITIONS is 16"):
        await checks.findings(replace(settings, partitions=16), {})


async def test_a_look_claims_nothing(
    connections: Connections, settings: Settings, keys: Keys
) -> None:
    """On an empty server `check` leaves no trace."""
    await connections.client.flushall()
    await checks.findings(settings, {})
    assert await connections.client.keys("*") == []


@pytest.mark.usefixtures("connections")
@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (ConfigError(["NAME: is wrong"]), "NAME: is wrong"),
        (ConnectionError("secret"), "does not answer: ConnectionError"),
        (LookupError("secret"), "does not answer: LookupError"),
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

    monkeypatch.setattr(handlers, "find", lambda _: {"log": opener})
    one = await found(settings, "handler log")
    assert one.severity is Severity.FATAL
    assert one.meaning == f"{meaning} (service.handlers.log:open)"


@pytest.mark.usefixtures("connections")
async def test_a_handler_that_hangs_is_given_up(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue that never answers is fatal after a while, not a hang."""

    @asynccontextmanager
    async def opener(_: Mapping[str, str]) -> AsyncIterator[None]:
        await asyncio.Event().wait()
        yield

    monkeypatch.setattr(checks, "CHECK_TIMEOUT_S", 0.02)
    monkeypatch.setattr(handlers, "find", lambda _: {"log": opener})
    assert "TimeoutError" in (await found(settings, "handler log")).meaning
