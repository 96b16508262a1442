"""Which deployment a command speaks to: the one that settings name, else the `dev` started here.

`dev` keeps what it made up (its Redis, its signing secret, its endpoint) in `.data/` of the current
folder. Other commands look there for what neither the environment nor an option names. Nothing here
writes to Redis.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path

from ..config import SECRETS, WEBHOOK_PATH, Settings
from ..delivery import consumer_groups
from ..errors import ConfigError
from ..parsers import FETCH
from ..secret import Secret
from ..storage import layout
from ..storage.connections import Connections, connect, display_address
from ..storage.keys import Keys

LOOPBACK = "127.0.0.1"
DIRECTORY = Path(".data")
SIGNING_SECRET = DIRECTORY / "signing_secret"
REDIS_URL = DIRECTORY / "redis_url"
ENDPOINT = DIRECTORY / "endpoint"


def environment() -> dict[str, str]:
    """Return the environment, with the Redis of a running `dev` where it names none.

    The signing secret of that `dev` comes along, unless the environment has one.
    """
    environ = dict(os.environ)
    if names_redis(environ) or not REDIS_URL.exists():
        return environ
    environ["REDIS_URL"] = REDIS_URL.read_text().strip()
    if SIGNING_SECRET.exists() and not any(name.startswith(SECRETS) for name in environ):
        environ[f"{SECRETS}_FILE"] = str(SIGNING_SECRET)
    return environ


def read_settings() -> Settings:
    """Return the settings of `environment`.

    Raises:
        ConfigError: A setting is wrong.
    """
    return Settings.from_environ(environment())


def names_redis(environ: Mapping[str, str]) -> bool:
    """Say whether an environment names a Redis."""
    return bool(environ.get("REDIS_URL") or environ.get("REDIS_URL_FILE"))


def allows_colors() -> bool:
    """Say whether the user wants colors on terminals (https://no-color.org)."""
    return not os.environ.get("NO_COLOR")


def is_address(host: str) -> bool:
    """Say whether a text can be HOST: an IP address, or empty."""
    try:
        return not host or bool(ip_address(host))
    except ValueError:
        return False


def local_endpoint(port: int | None) -> str:
    """Return the webhook endpoint of a receiver on this machine."""
    return f"http://{LOOPBACK}:{port}{WEBHOOK_PATH}"


def find_endpoint() -> str:
    """Return the endpoint on PORT, else that of a running `dev`, else that on the default port."""
    environ = environment()
    names_port = environ.get("PORT") or environ.get("PORT_FILE")
    if not names_port and ENDPOINT.exists():
        return ENDPOINT.read_text().strip()
    return local_endpoint(Settings.from_environ(environ).port)


def find_signing_secret(path: Path | None) -> Secret[bytes]:
    """Return the secret in a file, else the configured one, else that of `dev`.

    Raises:
        ConfigError: There is none.
    """
    if path is not None:
        return Secret(path.read_bytes().strip())
    if configured := read_settings().secrets.get(""):
        return configured[0]
    if SIGNING_SECRET.exists():
        return make_signing_secret()
    raise ConfigError(["no signing secret: start dev first, or name --secret-file"])


def make_signing_secret() -> Secret[bytes]:
    """Return the signing secret of `dev`, made on first use and readable by its owner only."""
    try:
        DIRECTORY.mkdir(mode=0o700, exist_ok=True)
        if not SIGNING_SECRET.exists():
            # Created readable by the owner only: a later chmod would leave a moment between.
            descriptor = os.open(SIGNING_SECRET, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(f"whsec_{secrets.token_hex(16)}\n")
        return Secret(SIGNING_SECRET.read_bytes().strip())
    except OSError:
        raise ConfigError([f"{SIGNING_SECRET} can neither be read nor made"]) from None


@asynccontextmanager
async def open_deployment(handler: str | None = None) -> AsyncIterator[tuple[Connections, Keys]]:
    """Yield clients and keys of the deployment that the settings name.

    A wrong REDIS_PREFIX, PARTITIONS or handler name would look like an empty deployment, in which
    all is well, so each of them is an error.

    Args:
        handler: A handler that must exist there: it is configured, or `fetch`, or has a consumer
            group.

    Raises:
        ConfigError: It has another layout, nothing was ever stored there, or no such handler.
        RedisError: Redis did not answer.
    """
    settings = read_settings()
    keys = Keys(settings.redis_prefix, settings.partitions)
    async with connect(settings.redis_url) as connections:
        if not await layout.is_claimed(connections, keys):
            where = f"{settings.redis_prefix} at {display_address(settings.redis_url)}"
            raise ConfigError([f"REDIS_PREFIX: nothing was ever stored under {where}"])
        if handler not in (None, FETCH, *settings.handlers):
            names = await consumer_groups.group_names(connections, keys)
            if handler not in names:
                known = ", ".join(sorted({*settings.all_handlers, *names}))
                raise ConfigError([f"no handler is called {handler}; known here: {known}"])
        yield connections, keys


def require_configured(handler: str) -> None:
    """Refuse to replay to a handler that no worker calls; the key of `fetch` is the worker's.

    Raises:
        ConfigError: It is not among HANDLERS.
    """
    handlers = read_settings().handlers
    if handler not in (*handlers, FETCH):
        known = ", ".join(handlers)
        raise ConfigError([f"{handler} is not among HANDLERS ({known}): no worker would call it"])
