"""What `check` finds: in settings, in Redis, in handlers and their groups."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from service.config import Livemode, Settings
from service.delivery.consumer import FAILURE_WEIGHT
from service.delivery.consumer_groups import create_groups
from service.errors import ConfigError, Unreachable
from service.findings import Finding, Promise, Severity
from service.handlers import loading
from service.operations import check
from service.parsers import FETCH
from service.secret import Secret
from service.storage.connections import Connections
from service.storage.keys import Keys
from service.storage.layout import claim
from service.transitions.transition import StatusTransition
from tests.support.stripe_api import Fault, StripeStandIn, running
from tests.support.stripe_api.app import create_app
from tests.support.transitions import stored_notification
from tests.support.troubles import changed_config

FINE, WARNING, FATAL = Severity.FINE, Severity.WARNING, Severity.FATAL
FIELDS: dict[Any, Any] = {"change": "{}", "previous": "", "sequence": 1, "epoch": 1}


async def found(settings: Settings, name: str) -> Finding:
    """Return the one finding of that name."""
    [one] = [each for each in await check.collect_findings(settings, {}) if each.name == name]
    return one


@pytest.mark.usefixtures("connections")
async def test_all_is_fine(settings: Settings) -> None:
    """With nothing pending, the group and the handler are fine."""
    group, handler = [await found(settings, f"{kind} log") for kind in ("group", "handler")]

    assert group.severity is handler.severity is Severity.FINE
    assert group.meaning == "0 transitions unacknowledged, 0 replays, 0 dead letters"
    assert handler.meaning == "opens (service.handlers.log:open)"


async def test_a_long_wait_is_a_warning(
    connections: Connections, settings: Settings, keys: Keys
) -> None:
    """The age of the oldest transition is reported, and that no worker runs for the handler."""
    now_ms = int(time.time() * 1000)
    await connections.client.xadd(keys.transitions(3), FIELDS, id=f"{now_ms - 400_000}-1")
    await connections.client.xadd(keys.transitions(5), FIELDS, id=f"{now_ms - 2_000}-1")
    group = await found(settings, "group log")

    assert group.severity is Severity.WARNING
    assert re.match(
        r"2 transitions unacknowledged, the oldest for 4\d\d s, 0 replays", group.meaning
    )
    assert group.meaning.endswith(
        "; no worker calls it (start workers, or name it in their --handlers)"
    )


def test_each_promise_has_its_worst_severity() -> None:
    """A promise has the severity of the worst finding about it, and the names of those."""
    findings = [
        Finding("clock", Severity.FATAL, (Promise.AUTHENTIC, Promise.ONCE), ""),
        Finding("fsync", Severity.WARNING, (Promise.DURABLE, Promise.ONCE), ""),
        Finding("memory", Severity.WARNING, (Promise.DURABLE,), ""),
        Finding("memory", Severity.WARNING, (Promise.DURABLE,), "again"),
        Finding("eviction", Severity.FINE, (Promise.FORWARD_ONLY,), ""),
    ]
    assert check.worst_by_promise(findings) == [
        (Promise.AUTHENTIC, Severity.FATAL, "clock"),
        (Promise.DURABLE, Severity.WARNING, "fsync, memory"),
        (Promise.COMPLETE, Severity.FINE, ""),
        (Promise.ONCE, Severity.FATAL, "clock"),
        (Promise.FORWARD_ONLY, Severity.FINE, ""),
        (Promise.ALONE, Severity.FINE, ""),
        (Promise.SECRET, Severity.FINE, ""),
    ]


@pytest.mark.usefixtures("connections")
async def test_every_promise_is_checked(settings: Settings) -> None:
    """There is a finding about every promise."""
    findings = await check.collect_findings(settings, {})
    assert {promise for each in findings for promise in each.promises} == {*Promise}


@pytest.mark.usefixtures("connections")
async def test_stripe_is_asked_with_a_key(settings: Settings) -> None:
    """What Stripe is set up to send here is checked, each mode with its key."""
    stripe = StripeStandIn()
    scopes = {is_live: stripe.scope(livemode=is_live) for is_live in (True, False)}
    secrets = [stripe.directory.add_key(livemode=is_live).secret for is_live in scopes]
    destination = stripe.subscribe("https://a.test/webhooks/stripe", scope=scopes[True])
    async with running(create_app(stripe)) as address:
        keyed = replace(
            settings, stripe_api_base=address, stripe_api_key=tuple(map(Secret, secrets))
        )
        missing = await found(keyed, "endpoint_missing")
        assert missing.severity is Severity.WARNING
        assert missing.meaning.startswith("test mode: no destination has a URL")
        stripe.subscribe("https://a.test/webhooks/stripe")
        assert (await found(keyed, "stripe_api")).meaning == "Stripe sends here what it should"
        destination.is_enabled = False
        assert (await found(keyed, "endpoint_disabled")).severity is Severity.WARNING


@pytest.mark.usefixtures("connections")
async def test_a_silent_stripe_is_given_up(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An API that does not answer is a finding after a while; so is a proxy of no use."""
    monkeypatch.setattr(check, "CHECK_TIMEOUT_S", 0.3)
    stripe = StripeStandIn()
    stripe.faults.add(Fault(kind="hang"))
    async with running(create_app(stripe)) as address:
        keyed = replace(
            settings, stripe_api_base=address, stripe_api_key=(Secret("sk_test_canary"),)
        )
        silent = await found(keyed, "stripe_api")
    assert (silent.severity, silent.meaning) == (
        Severity.WARNING,
        "Stripe's API did not answer within 0 s",
    )
    monkeypatch.setenv("HTTPS_PROXY", "gopher://user:canary@proxy.test")
    proxied = await found(replace(keyed, stripe_api_base="https://stripe.test"), "stripe_api")
    assert (proxied.severity, proxied.meaning) == (
        Severity.FATAL,
        "HTTPS_PROXY: expected a proxy that can be used",
    )


@pytest.mark.usefixtures("connections")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("signatures", FINE, Promise.AUTHENTIC, "signing secrets for 1 endpoint")),
        (
            {"signature_tolerance_s": 301},
            ("signatures", WARNING, Promise.AUTHENTIC, "above Stripe's default of 300"),
        ),
        # A receiver would not start.
        ({"secrets": {}}, ("signatures", FATAL, Promise.AUTHENTIC, "STRIPE_WEBHOOK_SECRETS")),
        ({}, ("layout", FINE, Promise.ONCE, "8 partitions under idv")),
        # A wrong prefix must not look like a deployment in which all is well.
        ({"redis_prefix": "other"}, ("layout", WARNING, Promise.ONCE, "wrong prefix")),
        ({}, ("handlers", WARNING, Promise.ALONE, "log alone")),
        ({"livemode": Livemode.LIVE}, ("handlers", WARNING, Promise.ALONE, "log alone")),
        ({"livemode": Livemode.TEST}, ("handlers", FINE, Promise.ALONE, "log")),
        ({"handlers": ("log", "redis_stream")}, ("handlers", FINE, Promise.ALONE, "redis_stream")),
        ({}, ("stripe_api", FINE, Promise.COMPLETE, "no STRIPE_API_KEY")),
    ],
)
async def test_what_settings_mean(
    settings: Settings, changes: dict[str, Any], expected: tuple[str, Severity, Promise, str]
) -> None:
    """A setting that costs a promise is found, and what it costs is said."""
    name, severity, promise, words = expected
    one = await found(replace(settings, **changes), name)
    assert (one.severity, one.promises) == (severity, (promise,))
    assert words in one.meaning


async def test_dead_letters_are_a_warning(
    connections: Connections, settings: Settings, keys: Keys
) -> None:
    """Dead letters are a warning, with the numbers of dead letters and replays."""
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
    """Failures are reported before the transitions become dead letters."""
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


async def test_a_full_redis_is_fatal(connections: Connections, settings: Settings) -> None:
    """Fatal, because every event gets 503; everything else is reported as well."""
    async with changed_config(connections, maxmemory="1"):
        findings = await check.collect_findings(settings, {})
    severities = {each.name: each.severity for each in findings}
    assert severities["writes"] is Severity.FATAL
    assert severities.keys() >= {"memory", "group log", "handler log"}


async def test_a_group_without_an_owner_is_a_warning(
    connections: Connections, settings: Settings, keys: Keys
) -> None:
    """A group that is not among HANDLERS is reported, because it keeps entries from trimming."""
    await create_groups(connections, keys, ["gone"])
    group = await found(settings, "group gone")

    assert group.severity is Severity.WARNING
    assert "not among HANDLERS" in group.meaning


async def test_notifications_that_no_worker_fetches_are_a_warning(
    connections: Connections, settings: Settings, keys: Keys
) -> None:
    """At once and without a group, until a worker fetches; the same where Stripe refuses a key."""
    names = {each.name for each in await check.collect_findings(settings, {})}
    assert f"group {FETCH}" not in names
    stream = keys.notifications(3)
    await connections.client.xadd(stream, stored_notification("vs_1", 1))
    group = await found(settings, f"group {FETCH}")
    assert group.severity is Severity.WARNING
    assert group.meaning.startswith("1 notifications unacknowledged")
    assert group.meaning.endswith("; no worker fetches (start workers with STRIPE_API_KEY)")

    now_ms = time.time() * 1000
    await connections.client.zadd(keys.workers(FETCH), {"w": now_ms})
    assert (await found(settings, f"group {FETCH}")).severity is Severity.FINE
    await connections.client.set(keys.circuit(FETCH), "w")
    refused = await found(settings, f"group {FETCH}")
    assert refused.severity is Severity.WARNING
    assert "Stripe's API, or an account there, is unreachable" in refused.meaning
    await connections.client.delete(stream, keys.circuit(FETCH))
    assert f"group {FETCH}" not in {one.name for one in await check.collect_findings(settings, {})}


async def test_another_layout_is_refused(
    connections: Connections, settings: Settings, keys: Keys
) -> None:
    """A number of partitions other than the stored one is an error."""
    await claim(connections, keys)
    with pytest.raises(ConfigError, match="PARTITIONS is 16"):
        await check.collect_findings(replace(settings, partitions=16), {})


async def test_check_writes_nothing(
    connections: Connections, settings: Settings, keys: Keys
) -> None:
    """An empty server is empty after `check`."""
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
    settings: Settings, monkeypatch: pytest.MonkeyPatch, error: Exception, meaning: str
) -> None:
    """An error of a handler's own check is reported by its class, or in our own words."""

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
    """A queue that never answers is fatal after a timeout."""

    @asynccontextmanager
    async def opener(_: Mapping[str, str]) -> AsyncIterator[None]:
        await asyncio.Event().wait()
        yield

    monkeypatch.setattr(check, "CHECK_TIMEOUT_S", 0.02)
    monkeypatch.setattr(loading, "find", lambda _: {"log": opener})
    assert "does not answer within" in (await found(settings, "handler log")).meaning
