"""A deployment as the commands meet it: that it is the one that is meant, and knows the handler.

A wrong REDIS_PREFIX, PARTITIONS or handler's name would look like a deployment without a trouble.
Nothing here writes to Redis.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..config import Settings
from ..delivery import consumer_groups
from ..errors import ConfigError
from ..storage import layout
from ..storage.connections import Connections, connect, display_address
from ..storage.layout import Keys
from . import defaults


@asynccontextmanager
async def opened(handler: str | None = None) -> AsyncIterator[tuple[Connections, Keys]]:
    """Yield clients and keys of the deployment that the settings name.

    Args:
        handler: A handler it has to know: one that is configured, or that has a group.

    Raises:
        ConfigError: It has another layout, nothing was ever stored there, or no such handler.
        RedisError: Redis did not answer.
    """
    settings = Settings.from_environ(defaults.environment())
    keys = Keys(settings.redis_prefix, settings.partitions)
    async with connect(settings.redis_url) as connections:
        if not await layout.is_claimed(connections, keys):
            where = f"{settings.redis_prefix} at {display_address(settings.redis_url)}"
            raise ConfigError([f"REDIS_PREFIX: nothing was ever stored under {where}"])
        if handler is not None and handler not in settings.handlers:
            names = await consumer_groups.group_names(connections, keys)
            if handler not in names:
                known = ", ".join(sorted({*settings.handlers, *names}))
                raise ConfigError([f"no handler is called {handler}; known here: {known}"])
        yield connections, keys


def is_configured(handler: str) -> None:
    """Refuse to have something handed to a handler that no worker works for.

    Raises:
        ConfigError: It is not among HANDLERS.
    """
    handlers = Settings.from_environ(defaults.environment()).handlers
    if handler not in handlers:
        known = ", ".join(handlers)
        raise ConfigError([f"{handler} is not among HANDLERS ({known}): no worker would take it"])
