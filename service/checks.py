"""What `check` looks at: Redis, every handler and its queue, and what waits for whom.

Looks and changes nothing. What Redis's own state means is in `findings`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from . import handlers, health, janitor, layout
from .config import Settings
from .connections import Connections, connect
from .errors import ConfigError
from .findings import RANKS, Finding, Promise, Severity
from .layout import Keys

CHECK_TIMEOUT_S = 15.0
# As the alert has it.
LONGEST_WAIT_S = 300.0
STRIPES_TOLERANCE_S = 300


async def findings(settings: Settings, environ: Mapping[str, str]) -> list[Finding]:
    """Return every finding: of the settings, of Redis, of groups and of handlers.

    Raises:
        ConfigError: A handler's name means nothing, or Redis holds another layout.
        RedisError: Redis did not answer.
    """
    openers = handlers.find(settings.handlers)
    keys = Keys(settings.redis_prefix, settings.partitions)
    async with connect(settings.redis_url) as connections:
        await layout.exists(connections, keys)
        found = [*_settings(settings), *await health.inspect(connections, settings)]
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


def _settings(settings: Settings) -> list[Finding]:
    """Say what the settings themselves mean."""
    severity, meaning = Severity.FINE, f"{len(settings.secrets)} endpoints have signing secrets"
    if settings.signature_tolerance_s > STRIPES_TOLERANCE_S:
        severity = Severity.WARNING
        meaning = "SIGNATURE_TOLERANCE_S is above Stripe's own 300: an old request may come again"
    keys = len(settings.log_metadata_keys)
    logged = f"{keys} keys of metadata are logged" if keys else "no metadata is logged"
    return [
        Finding("signatures", severity, (Promise.AUTHENTIC,), meaning),
        Finding("logging", Severity.FINE, (Promise.SECRET,), logged),
    ]


async def _groups(connections: Connections, keys: Keys, settings: Settings) -> list[Finding]:
    """Say what waits for each handler, and for those that are no longer configured."""
    found = []
    for group in await janitor.groups(connections, keys):
        waiting = "an unknown number" if group.unsettled is None else group.unsettled
        meaning = f"{waiting} of transitions unsettled"
        meaning += f", the oldest for {group.oldest_s:.0f} s" if group.oldest_s else ""
        meaning += f", {group.replays} replays, {group.dead} dead letters"
        is_late = group.oldest_s > LONGEST_WAIT_S
        severity = Severity.WARNING if group.dead or is_late else Severity.FINE
        if group.handler not in settings.handlers:
            severity = Severity.WARNING
            meaning += "; not among HANDLERS: it holds trimming until it works again or is retired"
        elif await connections.client.exists(keys.circuit(group.handler)):
            severity = Severity.WARNING
            meaning += "; its worker cannot reach its queue and probes"
        elif is_late and not await janitor.works(
            connections, keys, group.handler, lease_ttl_s=settings.lease_ttl_s
        ):
            meaning += "; no worker works for it"
        found.append(Finding(f"group {group.handler}", severity, (Promise.ALONE,), meaning))
    return found


async def _handler(name: str, opener: handlers.OpenHandler, environ: Mapping[str, str]) -> Finding:
    """Open a handler, ask it to look at its queue, and close it again."""
    try:
        async with (
            asyncio.timeout(CHECK_TIMEOUT_S),
            handlers.open_all({name: opener}, environ) as opened,
        ):
            looked = await handlers.examine(opened[name])
            severity, meaning = Severity.FINE, "its queue is ready" if looked else "opens"
    except ConfigError as error:
        severity, meaning = Severity.FATAL, str(error)
    except Exception as error:  # noqa: BLE001 - a handler may raise anything
        severity, meaning = Severity.FATAL, f"does not answer: {type(error).__name__}"
    meaning = f"{meaning} ({handlers.origin(name)})"
    return Finding(f"handler {name}", severity, (Promise.ALONE,), meaning)
