"""What `check` looks at: Redis, every handler and its queue, and what waits for whom.

Looks and changes nothing. What Redis's own configuration means is in `health`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from . import handlers, health, janitor, layout
from .config import Settings
from .connections import Connections, connect
from .errors import ConfigError
from .health import Finding, Severity
from .layout import Keys

CHECK_TIMEOUT_S = 15.0


async def findings(settings: Settings, environ: Mapping[str, str]) -> list[Finding]:
    """Return every finding, Redis's first.

    Raises:
        ConfigError: A handler's name means nothing, or Redis holds another layout.
        RedisError: Redis did not answer.
    """
    openers = handlers.find(settings.handlers)
    keys = Keys(settings.redis_prefix, settings.partitions)
    async with connect(settings.redis_url) as connections:
        # On an empty server there is nothing to contradict, and a look claims nothing.
        if await connections.client.exists(keys.layout):
            await layout.guard(connections, keys)
        found = await health.inspect(connections, settings)
        found += await _groups(connections, keys, settings)
    return found + [await _handler(name, openers[name], environ) for name in openers]


async def _groups(connections: Connections, keys: Keys, settings: Settings) -> list[Finding]:
    """Say what waits for each handler, and for those that are no longer configured."""
    found = []
    for group in await janitor.groups(connections, keys):
        waiting = "an unknown number" if group.unsettled is None else group.unsettled
        meaning = f"{waiting} of transitions unsettled, {group.replays} replays, "
        meaning += f"{group.dead} dead letters"
        severity = Severity.WARNING if group.dead else Severity.FINE
        if group.handler not in settings.handlers:
            severity = Severity.WARNING
            meaning += "; not among HANDLERS: it holds trimming until it works again or is retired"
        elif await connections.client.exists(keys.circuit(group.handler)):
            severity = Severity.WARNING
            meaning += "; its worker cannot reach its queue and probes"
        found.append(Finding(f"group {group.handler}", severity, meaning))
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
    return Finding(f"handler {name}", severity, f"{meaning} ({handlers.origin(name)})")
