"""What `check` looks at: Redis, every handler and its queue, and what waits for whom.

Looks and changes nothing. What Redis's own state means is in `findings`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from ..config import SECRETS, Livemode, Settings
from ..delivery import consumer_groups
from ..delivery.consumer import FAILURE
from ..delivery.consumer_groups import Group
from ..errors import ConfigError, Unreachable
from ..handlers import OpenHandler, loading
from ..storage import health, layout
from ..storage.assessment import RANKS, Finding, Promise, Severity
from ..storage.connections import Connections, connect
from ..storage.layout import Keys
from ..storage.scripts import Script, ScriptCall

CHECK_TIMEOUT_S = 15.0
# As the alert has it.
LONGEST_WAIT_S = 300.0
STRIPES_TOLERANCE_S = 300
# Per handler and partition: whether there are more does not matter.
MAX_FAILING_COUNTED = 100

_FAILING = Script(__package__, "failing.lua")


async def findings(settings: Settings, environ: Mapping[str, str]) -> list[Finding]:
    """Return every finding: of the settings, of Redis, of groups and of handlers.

    Raises:
        ConfigError: A handler's name means nothing, or Redis holds another layout.
        RedisError: Redis did not answer.
    """
    openers = loading.find(settings.handlers)
    keys = Keys(settings.redis_prefix, settings.partitions)
    async with connect(settings.redis_url) as connections:
        found = [*_settings(settings), *await health.inspect(connections, settings)]
        if _can_be_asked(found):
            is_known = await layout.is_claimed(connections, keys)
            found.append(_layout(settings, is_known=is_known))
            found += await _groups(connections, keys, settings)
    return found + [await _handler(name, openers[name], environ) for name in openers]


def verdicts(found: Sequence[Finding]) -> list[tuple[Promise, Severity, str]]:
    """Return for each promise the worst of what touches it, and by what."""
    told = []
    for promise in Promise:
        touching = [finding for finding in found if promise in finding.promises]
        worst = max(
            (finding.severity for finding in touching), key=RANKS.__getitem__, default=Severity.FINE
        )
        named = [finding.name for finding in touching if finding.severity is worst]
        told.append((promise, worst, "" if worst is Severity.FINE else ", ".join(named)))
    return told


def _can_be_asked(found: Sequence[Finding]) -> bool:
    """Say whether Redis runs our scripts: one that is busy says not even its version."""
    return any(one.name == "version" and one.severity is Severity.FINE for one in found)


def _settings(settings: Settings) -> list[Finding]:
    """Say what the settings themselves mean."""
    severity, meaning = Severity.FINE, f"{len(settings.secrets)} endpoints have signing secrets"
    if not settings.secrets:
        severity = Severity.FATAL
        meaning = f"{SECRETS} is not set: a receiver with these settings does not start"
    elif settings.signature_tolerance_s > STRIPES_TOLERANCE_S:
        severity = Severity.WARNING
        meaning = "SIGNATURE_TOLERANCE_S is above Stripe's own 300: an old request may come again"
    keys = len(settings.log_metadata_keys)
    logged = f"{keys} keys of metadata are logged" if keys else "no metadata is logged"
    return [
        Finding("signatures", severity, (Promise.AUTHENTIC,), meaning),
        Finding("logging", Severity.FINE, (Promise.SECRET,), logged),
        _handlers(settings),
    ]


def _handlers(settings: Settings) -> Finding:
    goes_no_further = settings.handlers == ("log",) and settings.livemode is not Livemode.TEST
    if goes_no_further:
        meaning = "HANDLERS is log alone: transitions are written to the log and go no further"
        return Finding("handlers", Severity.WARNING, (Promise.ALONE,), meaning)
    return Finding("handlers", Severity.FINE, (Promise.ALONE,), ", ".join(settings.handlers))


def _layout(settings: Settings, *, is_known: bool) -> Finding:
    """Say whether anything is there: with a wrong prefix all would look well."""
    if is_known:
        meaning = f"{settings.partitions} partitions under {settings.redis_prefix}"
        return Finding("layout", Severity.FINE, (Promise.ONCE,), meaning)
    meaning = "nothing was ever stored under REDIS_PREFIX: a new deployment, or the wrong prefix"
    return Finding("layout", Severity.WARNING, (Promise.ONCE,), meaning)


async def _groups(connections: Connections, keys: Keys, settings: Settings) -> list[Finding]:
    """Say what waits for each handler, and for those that are no longer configured."""
    return [
        await _judged(connections, keys, settings, group)
        for group in await consumer_groups.list_groups(connections, keys)
    ]


async def _judged(
    connections: Connections, keys: Keys, settings: Settings, group: Group
) -> Finding:
    name = group.handler
    waiting = "an unknown number" if group.unsettled is None else group.unsettled
    meaning = f"{waiting} of transitions unsettled"
    meaning += f", the oldest for {group.oldest_s:.0f} s" if group.oldest_s else ""
    meaning += f", {group.replays} replays, {group.dead} dead letters"
    is_late = group.oldest_s > LONGEST_WAIT_S
    problems = []
    if name not in settings.handlers:
        problems.append("not among HANDLERS: it holds trimming until it works again or is retired")
    elif await connections.client.exists(keys.circuit(name)):
        problems.append("its worker cannot reach its queue and probes")
    elif is_late and not await consumer_groups.is_worked(
        connections, keys, name, lease_ttl_s=settings.lease_ttl_s
    ):
        problems.append("no worker works for it")
    if failing := await _failing(connections, keys, name):
        problems.append(
            f"{failing} of what it has in hand failed before: delivery.retried in the worker's "
            "log says with what"
        )
    is_wrong = bool(problems or group.dead or is_late)
    return Finding(
        f"group {name}",
        Severity.WARNING if is_wrong else Severity.FINE,
        (Promise.ALONE,),
        "; ".join([meaning, *problems]),
    )


async def _failing(connections: Connections, keys: Keys, handler: str) -> int:
    """Return how much of what a handler has in hand has failed, at least."""
    calls = [
        ScriptCall(_FAILING, [keys.transitions(partition)], [handler, FAILURE, MAX_FAILING_COUNTED])
        for partition in range(keys.partitions)
    ]
    # In a partition that holds nothing yet there are no groups.
    return sum(found for found in await connections.run(calls) if isinstance(found, int))


async def _handler(name: str, opener: OpenHandler, environ: Mapping[str, str]) -> Finding:
    """Open a handler, ask it to look at its queue, and close it again."""
    try:
        async with (
            asyncio.timeout(CHECK_TIMEOUT_S),
            loading.open_all({name: opener}, environ) as opened,
        ):
            looked = await loading.check(name, opened[name])
            severity, meaning = Severity.FINE, "its queue is ready" if looked else "opens"
    except ConfigError as error:
        severity, meaning = Severity.FATAL, str(error)
    except Unreachable as error:
        severity, meaning = Severity.FATAL, f"its queue cannot be reached: {error.reason}"
    except Exception as error:  # noqa: BLE001 - closing may raise anything
        severity, meaning = Severity.FATAL, f"does not answer: {type(error).__name__}"
    meaning = f"{meaning} ({loading.origin(name)})"
    return Finding(f"handler {name}", severity, (Promise.ALONE,), meaning)
