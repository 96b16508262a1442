"""Checks a deployment: its settings, Redis, each handler's queue and group, Stripe's endpoints.

Changes nothing. What the state of Redis itself means is in `storage.assessment`, and what is wrong
at Stripe in `stripe_api.endpoints`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from ..config import SECRETS, Livemode, Settings
from ..delivery import consumer_groups
from ..delivery.consumer import FAILURE_WEIGHT
from ..delivery.consumer_groups import Group
from ..delivery.sources import source_of
from ..errors import ConfigError, Unreachable
from ..handlers import OpenHandler, loading
from ..parsers import FETCH
from ..storage import health, layout
from ..storage.assessment import RANKS, Finding, Promise, Severity
from ..storage.connections import Connections, connect
from ..storage.layout import Keys
from ..storage.scripts import Script, ScriptCall
from ..stripe_api import endpoints
from ..stripe_api.client import open_api
from ..stripe_api.endpoints import EndpointFinding
from ..stripe_api.keys import ApiKeys
from ..stripe_api.rate_limit import Priority

CHECK_TIMEOUT_S = 15.0
# The same as in the alert `DeliveryDelayed`.
MAX_WAIT_S = 300.0
# The default of Stripe's own libraries.
STRIPE_TOLERANCE_S = 300
# Per handler and partition.
MAX_FAILING_COUNTED = 100

_FAILING = Script(__package__, "failing.lua")


async def collect_findings(settings: Settings, environ: Mapping[str, str]) -> list[Finding]:
    """Return every finding: of the settings, of Redis, of groups, of handlers and of Stripe's API.

    Raises:
        ConfigError: A handler's name is unknown, or Redis holds another layout.
        RedisError: Redis did not answer.
    """
    openers = loading.find(settings.handlers)
    keys = Keys(settings.redis_prefix, settings.partitions)
    async with connect(settings.redis_url) as connections:
        found = [*_check_settings(settings), *await health.inspect(connections, settings)]
        if _runs_scripts(found):
            exists = await layout.is_claimed(connections, keys)
            found.append(_check_layout(settings, exists=exists))
            found += await _check_groups(connections, keys, settings)
    found += [await _check_handler(name, openers[name], environ) for name in openers]
    return found + await _check_stripe_api(settings)


def worst_by_promise(found: Sequence[Finding]) -> list[tuple[Promise, Severity, str]]:
    """Return for each promise the worst severity of the findings about it, and their names."""
    rows = []
    for promise in Promise:
        about = [finding for finding in found if promise in finding.promises]
        worst = max(
            (finding.severity for finding in about), key=RANKS.__getitem__, default=Severity.FINE
        )
        named = dict.fromkeys(finding.name for finding in about if finding.severity is worst)
        rows.append((promise, worst, "" if worst is Severity.FINE else ", ".join(named)))
    return rows


def _runs_scripts(found: Sequence[Finding]) -> bool:
    """Say whether Redis runs our scripts: a busy one does not even report its version."""
    return any(one.name == "version" and one.severity is Severity.FINE for one in found)


def _check_settings(settings: Settings) -> list[Finding]:
    severity, meaning = Severity.FINE, f"{len(settings.secrets)} endpoints have signing secrets"
    if not settings.secrets:
        severity = Severity.FATAL
        meaning = f"{SECRETS} is not set: a receiver with these settings does not start"
    elif settings.signature_tolerance_s > STRIPE_TOLERANCE_S:
        severity = Severity.WARNING
        meaning = (
            "SIGNATURE_TOLERANCE_S is above Stripe's default of 300: old requests are accepted"
        )
    keys = len(settings.log_metadata_keys)
    logged = f"{keys} keys of metadata are logged" if keys else "no metadata is logged"
    return [
        Finding("signatures", severity, (Promise.AUTHENTIC,), meaning),
        Finding("logging", Severity.FINE, (Promise.SECRET,), logged),
        _check_handlers_setting(settings),
    ]


def _check_handlers_setting(settings: Settings) -> Finding:
    only_logs = settings.handlers == ("log",) and settings.livemode is not Livemode.TEST
    if only_logs:
        meaning = "HANDLERS is log alone: transitions are written to the log and nowhere else"
        return Finding("handlers", Severity.WARNING, (Promise.ALONE,), meaning)
    return Finding("handlers", Severity.FINE, (Promise.ALONE,), ", ".join(settings.handlers))


def _check_layout(settings: Settings, *, exists: bool) -> Finding:
    """Warn where nothing is stored: with a wrong prefix everything would look well."""
    if exists:
        meaning = f"{settings.partitions} partitions under {settings.redis_prefix}"
        return Finding("layout", Severity.FINE, (Promise.ONCE,), meaning)
    meaning = "nothing was ever stored under REDIS_PREFIX: a new deployment, or the wrong prefix"
    return Finding("layout", Severity.WARNING, (Promise.ONCE,), meaning)


async def _check_groups(connections: Connections, keys: Keys, settings: Settings) -> list[Finding]:
    """Check each handler's group, and the groups of handlers that are no longer configured."""
    return [
        await _check_group(connections, keys, settings, group)
        for group in await consumer_groups.list_groups(connections, keys)
    ]


async def _check_group(
    connections: Connections, keys: Keys, settings: Settings, group: Group
) -> Finding:
    kind = source_of(group.handler).kind
    waiting = "an unknown number of" if group.lag is None else group.lag
    meaning = f"{waiting} {kind} unacknowledged"
    meaning += f", the oldest for {group.oldest_s:.0f} s" if group.oldest_s else ""
    meaning += f", {group.replays} replays, {group.dead_letters} dead letters"
    problems = [*filter(None, [await _find_obstacle(connections, keys, settings, group)])]
    if failing := await _count_failing(connections, keys, group.handler):
        problems.append(
            f"{failing} of its {kind} failed and are retried: see delivery.retried in the "
            "worker's log"
        )
    is_wrong = bool(problems or group.dead_letters or group.oldest_s > MAX_WAIT_S)
    return Finding(
        f"group {group.handler}",
        Severity.WARNING if is_wrong else Severity.FINE,
        (Promise.ALONE,),
        "; ".join([meaning, *problems]),
    )


async def _find_obstacle(
    connections: Connections, keys: Keys, settings: Settings, group: Group
) -> str:
    """Return what keeps a group from being worked off; empty if nothing is known."""
    name, is_fetch = group.handler, group.handler == FETCH
    if not is_fetch and name not in settings.handlers:
        return "not among HANDLERS: what it has not acknowledged is kept until it is retired"
    if await connections.client.exists(keys.circuit(name)):
        queue = "Stripe's API, or an account there," if is_fetch else "its queue"
        return f"{queue} is unreachable: its worker probes until it answers"
    # Where no worker has a key, notifications would wait for ever: that is said at once.
    is_waiting = group.lag if is_fetch else group.oldest_s > MAX_WAIT_S
    if not is_waiting or await consumer_groups.is_worked(
        connections, keys, name, lease_ttl_s=settings.lease_ttl_s
    ):
        return ""
    return "no worker fetches: set STRIPE_API_KEY for one" if is_fetch else "no worker works for it"


async def _count_failing(connections: Connections, keys: Keys, handler: str) -> int:
    """Return how many of a handler's pending entries have failed before, up to a limit."""
    calls = [
        ScriptCall(
            _FAILING,
            [source_of(handler).stream(keys, partition)],
            [handler, FAILURE_WEIGHT, MAX_FAILING_COUNTED],
        )
        for partition in range(keys.partitions)
    ]
    # A partition without a stream has no group, which is an error here.
    return sum(found for found in await connections.run(calls) if isinstance(found, int))


async def _check_handler(name: str, opener: OpenHandler, environ: Mapping[str, str]) -> Finding:
    """Open a handler, let it check its queue, and close it."""
    try:
        async with (
            asyncio.timeout(CHECK_TIMEOUT_S),
            loading.open_all({name: opener}, environ) as opened,
        ):
            has_checked = await loading.check(name, opened[name])
            severity, meaning = Severity.FINE, "its queue is ready" if has_checked else "opens"
    except ConfigError as error:
        severity, meaning = Severity.FATAL, str(error)
    except Unreachable as error:
        severity, meaning = Severity.FATAL, f"its queue cannot be reached: {error.reason}"
    except Exception as error:  # noqa: BLE001 - closing may raise anything
        severity, meaning = Severity.FATAL, f"does not answer: {type(error).__name__}"
    meaning = f"{meaning} ({loading.origin(name)})"
    return Finding(f"handler {name}", severity, (Promise.ALONE,), meaning)


async def _check_stripe_api(settings: Settings) -> list[Finding]:
    """Look at what Stripe is set up to send here, if there is a key for it."""
    if not settings.stripe_api_key:
        meaning = "no STRIPE_API_KEY: thin events get 503, and what Stripe does not send is missed"
        return [_stripe_finding(Severity.FINE, meaning)]
    try:
        async with (
            asyncio.timeout(CHECK_TIMEOUT_S),
            open_api(settings.stripe_api_base, ApiKeys(settings.stripe_api_key)) as api,
        ):
            found = await endpoints.examine(api, settings, Priority.FETCH)
    except TimeoutError:
        meaning = f"Stripe's API did not answer within {CHECK_TIMEOUT_S:.0f} s"
        return [_stripe_finding(Severity.WARNING, meaning)]
    except ConfigError as error:
        return [_stripe_finding(Severity.FATAL, str(error))]
    return found or [_stripe_finding(Severity.FINE, "Stripe sends here what it should")]


def _stripe_finding(severity: Severity, meaning: str) -> Finding:
    return Finding(EndpointFinding.API.value, severity, (Promise.COMPLETE,), meaning)
