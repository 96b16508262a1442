"""The forms of REDIS_URL, taken apart into hosts and options. Connects to nothing.

No error here quotes the URL: it may hold a password.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from redis.asyncio.connection import parse_url

from ..errors import ConfigError

SENTINEL_PORT = 26379
REDIS_PORT = 6379

_URL_OPTIONS = {"db", "username", "password"}
_DATABASE = re.compile(r"(/[0-9]*)?/?")
_FILE_OPTIONS = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"}


def topology(url: str) -> str:
    """Return what follows the `+` of the scheme: `sentinel`, `cluster`, or nothing."""
    return url.partition("://")[0].partition("+")[2]


def display_address(url: str) -> str:
    """Return where a URL leads, as `host:port` or a path, with no user and no password."""
    scheme, _, rest = url.partition("://")
    if scheme == "unix":
        return unquote(urlsplit(url).path)
    authority, behind = re.fullmatch(r"([^/?#]*)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    if "@" in behind:
        # A password with an unescaped slash: what looks like a host is a part of it.
        return "?"
    default_port = SENTINEL_PORT if topology(url) == "sentinel" else REDIS_PORT
    hosts = addresses(authority.rpartition("@")[2], default_port)
    return ", ".join(f"{host}:{port}" for host, port in hosts)


def options(url: str, *, also: Collection[str] = ()) -> dict[str, Any]:
    """Return the options of one of redis-py's URLs; refuse those that would undo our settings.

    Raises:
        ConfigError: A file that an option names does not exist.
        ValueError: The URL is not usable.
    """
    parts = urlsplit(url)
    # redis-py ignores these: a database that is no number, the host of a Unix socket, and what
    # follows a # or ? that a password should have escaped.
    is_wrong = parts.hostname if parts.scheme == "unix" else not _DATABASE.fullmatch(parts.path)
    if is_wrong or parts.fragment:
        raise ValueError("unknown part")
    for name in parse_qs(parts.query, strict_parsing=bool(parts.query)):
        if name not in {*_URL_OPTIONS, *also} and not name.startswith("ssl_"):
            raise ValueError("unknown option")
    found = dict(parse_url(url))
    if "connection_class" in found:
        for name in sorted(_FILE_OPTIONS & found.keys()):
            if not Path(str(found[name])).is_file():
                raise ConfigError([f"{name} names no file"])
    return found


def shared_options(parts: SplitResult, *, also: Collection[str] = ()) -> dict[str, Any]:
    """Return user, password and TLS options of a URL with several hosts.

    `ssl` is among them where the URL asks for TLS.

    Raises:
        ConfigError: A file that an option names does not exist.
        ValueError: The URL is not usable.
    """
    user, at, _ = parts.netloc.rpartition("@")
    scheme = parts.scheme.partition("+")[0]
    found = options(f"{scheme}://{user}{at}?{parts.query}", also=also)
    if found.pop("connection_class", None):
        found["ssl"] = True
    return found


def split_hosts(url: str) -> tuple[SplitResult, str]:
    """Take the hosts out of a URL that may have several, which `urlsplit` does not support.

    Raises:
        ValueError: It has none.
    """
    found = re.fullmatch(r"([^:/]+://(?:[^/?#]*@)?)([^/?#]+)((?:/[^?#@]*)?(?:\?[^#]*)?)", url)
    if found is None:
        raise ValueError("no hosts, or a password that is not escaped")
    return urlsplit(f"{found[1]}hosts{found[3]}"), found[2]


def addresses(hosts: str, default_port: int) -> list[tuple[str, int]]:
    """Return the addresses of hosts separated by commas.

    Raises:
        ValueError: A host or a port is not valid.
    """
    single = [urlsplit(f"//{host}") for host in hosts.split(",")]
    return [(one.hostname or "127.0.0.1", one.port or default_port) for one in single]
