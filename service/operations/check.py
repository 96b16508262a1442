"""Checks a deployment: its settings, Redis, each handler's queue and group, Stripe's endpoints.

Changes nothing. What the state of Redis itself means is in `storage.assessment`, and what is wrong
at Stripe in `stripe_api.endpoints`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from ..config import SECRETS, Livemode, Settings
from ..errors import ConfigError, Unreachable
from ..findings import Finding, Promise, Severity, worst
from ..handlers import OpenHandler, loading
from ..handlers.failures import class_name, place
from ..monitoring.handler_rules import MAX_WAIT_S, find_obstacles
from ..monitoring.handler_state import HandlerState, read_handlers
from ..monitoring.words import counted
from ..storage import health, layout
from ..storage.connections import Connections, connect
from ..storage.keys import Keys
from ..stripe_api.client import open_api
from ..stripe_api.destinations import survey_all
from ..stripe_api.endpoints import EndpointFinding, assess
from ..stripe_api.keys import ApiKeys
from ..stripe_api.rate_limit import Priority

CHECK_TIMEOUT_S = 15.0
# The default of Stripe's own libraries.
STRIPE_TOLERANCE_S = 300


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
        severity = worst(finding.severity for finding in about)
        named = dict.fromkeys(finding.name for finding in about if finding.severity is severity)
        rows.append((promise, severity, "" if severity is Severity.FINE else ", ".join(named)))
    return rows


def _runs_scripts(found: Sequence[Finding]) -> bool:
    """Say whether Redis runs our scripts: a busy one does not even report its version."""
    return any(one.name == "version" and one.severity is Severity.FINE for one in found)


def _check_settings(settings: Settings) -> list[Finding]:
    severity, meaning = (
        Severity.FINE,
        f"signing secrets for {counted(len(settings.secrets), 'endpoint')}",
    )
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
    return [_check_group(each) for each in await read_handlers(connections, keys, settings)]


def _check_group(state: HandlerState) -> Finding:
    waiting = "an unknown number of" if state.lag is None else state.lag
    meaning = f"{waiting} {state.kind} unacknowledged"
    meaning += f", the oldest for {state.oldest_s:.0f} s" if state.oldest_s else ""
    meaning += f", {state.replays} replays, {state.dead_letters} dead letters"
    # A deployment may be checked before its workers are started.
    obstacles = find_obstacles(state, expects_worker=False)
    is_wrong = bool(obstacles or state.dead_letters or state.oldest_s > MAX_WAIT_S)
    return Finding(
        f"group {state.name}",
        Severity.WARNING if is_wrong else Severity.FINE,
        (Promise.ALONE,),
        "; ".join([meaning, *(f"{one.meaning} ({one.help})" for one in obstacles)]),
    )


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
    except TimeoutError:
        severity, meaning = Severity.FATAL, f"does not answer within {CHECK_TIMEOUT_S:.0f} s"
    except Exception as error:  # noqa: BLE001 - closing may raise anything
        what = f"{class_name(error)} ({place(error)})"
        severity, meaning = Severity.FATAL, f"cannot be closed: {what}"
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
            found = assess(await survey_all(api, Priority.FETCH), settings)
    except TimeoutError:
        meaning = f"Stripe's API did not answer within {CHECK_TIMEOUT_S:.0f} s"
        return [_stripe_finding(Severity.WARNING, meaning)]
    except ConfigError as error:
        return [_stripe_finding(Severity.FATAL, str(error))]
    return found or [_stripe_finding(Severity.FINE, "Stripe sends here what it should")]


def _stripe_finding(severity: Severity, meaning: str) -> Finding:
    return Finding(EndpointFinding.API.value, severity, (Promise.COMPLETE,), meaning)
