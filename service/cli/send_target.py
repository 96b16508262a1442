"""Where `send` and `selftest` send to, and with which secret, when they are not told."""

from __future__ import annotations

from pathlib import Path

from ..config import WEBHOOK_PATH, Settings
from ..errors import ConfigError
from ..secret import Secret
from . import defaults


def address(port: int | None) -> str:
    """Return the endpoint of a receiver on this machine."""
    return f"http://127.0.0.1:{port}{WEBHOOK_PATH}"


def default_address() -> str:
    """Return the endpoint on PORT, where that is set, else that of a `dev` that runs here."""
    environ = defaults.environment()
    if not defaults.names_port(environ) and defaults.ENDPOINT.exists():
        return defaults.ENDPOINT.read_text().strip()
    return address(Settings.from_environ(environ).port)


def signing_secret(path: Path | None) -> Secret[bytes]:
    """Return the secret in a file, else the configured one, else that of `dev`.

    Raises:
        ConfigError: There is none.
    """
    if path is not None:
        return Secret(path.read_bytes().strip())
    configured = Settings.from_environ(defaults.environment()).secrets.get("")
    if configured:
        return configured[0]
    if defaults.SIGNING_SECRET.exists():
        return defaults.signing_secret()
    raise ConfigError(["no signing secret: start dev first, or name --secret-file"])
