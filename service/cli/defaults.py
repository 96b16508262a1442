"""What `dev` keeps in .data/, and where the other commands look for it.

A command that is told nothing else talks to the `dev` that runs in the same folder.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

from ..errors import ConfigError
from ..secret import Secret

LOOPBACK = "127.0.0.1"
DIRECTORY = Path(".data")
SIGNING_SECRET = DIRECTORY / "signing_secret"
REDIS_URL = DIRECTORY / "redis_url"
ENDPOINT = DIRECTORY / "endpoint"

_SECRETS = "STRIPE_WEBHOOK_SECRETS"


def environment() -> dict[str, str]:
    """Return the environment; where it names no Redis, that of a `dev` running here counts.

    So does its signing secret then, where no endpoint has any.
    """
    found = dict(os.environ)
    if names_redis(found) or not REDIS_URL.exists():
        return found
    found["REDIS_URL"] = REDIS_URL.read_text().strip()
    if SIGNING_SECRET.exists() and not any(name.startswith(_SECRETS) for name in found):
        found[f"{_SECRETS}_FILE"] = str(SIGNING_SECRET)
    return found


def names_redis(environ: Mapping[str, str]) -> bool:
    """Say whether an environment names a Redis."""
    return bool(environ.get("REDIS_URL") or environ.get("REDIS_URL_FILE"))


def names_port(environ: Mapping[str, str]) -> bool:
    """Say whether an environment names the port for webhooks."""
    return bool(environ.get("PORT") or environ.get("PORT_FILE"))


def is_address(host: str) -> bool:
    """Say whether a text is an IP address; nothing at all is as good."""
    try:
        return not host or bool(ip_address(host))
    except ValueError:
        return False


def signing_secret() -> Secret[bytes]:
    """Return the signing secret of `dev`, made on first use and readable by its owner only."""
    try:
        DIRECTORY.mkdir(mode=0o700, exist_ok=True)
        if not SIGNING_SECRET.exists():
            descriptor = os.open(SIGNING_SECRET, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(f"whsec_{secrets.token_hex(16)}\n")
        return Secret(SIGNING_SECRET.read_bytes().strip())
    except OSError:
        raise ConfigError([f"{SIGNING_SECRET} can neither be read nor made"]) from None
