"""What the text of each setting may be, and the value that it stands for.

How a variable is read is in `environment`, which settings there are in `config`.
"""

from __future__ import annotations

import re
from datetime import datetime
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Final, NamedTuple, TypeAlias

from .environment import Parser, comma_separated, matching
from .secret import Secret

Network: TypeAlias = IPv4Network | IPv6Network

# The handler that fetches the events of thin notifications. It is a part of the service.
FETCH: Final = "fetch"

_UNITS_S: Final = {"d": 86_400, "h": 3600}
_RFC_3339: Final = re.compile(
    r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII
)


class AdminToken(NamedTuple):
    """What one person, or one program, logs in to the page with.

    Attributes:
        name: Who that is, for the log.
        token: The secret.
    """

    name: str
    token: Secret[str]


def parse_network(text: str) -> Network:
    """Return a network in CIDR notation, or a single address as a network.

    One of IPv4-mapped IPv6 addresses is its IPv4 one, as the addresses of clients are.

    Raises:
        ValueError: The text is neither, or has bits set beyond its prefix.
    """
    network = ip_network(text)
    if isinstance(network, IPv6Network) and (mapped := network.network_address.ipv4_mapped):
        return IPv4Network((mapped, network.prefixlen - 96))
    return network


def parse_time(text: str, now: float) -> float:
    """Return a time in Unix seconds.

    Args:
        text: A number of days or hours before *now*, such as `3d` or `12h`, or an RFC 3339 time.
        now: The present in Unix seconds.

    Raises:
        ValueError: The text is neither.
    """
    if back := re.fullmatch(r"([0-9]{1,4})([dh])", text):
        return now - int(back[1]) * _UNITS_S[back[2]]
    if _RFC_3339.fullmatch(text) is None:
        raise ValueError(TIME.expected)
    return datetime.fromisoformat(text.upper()).timestamp()


def _parse_start(text: str) -> str:
    parse_time(text, 0)
    return text


def _parse_api_keys(text: str) -> tuple[Secret[str], ...]:
    """Return keys of different modes: the mode is the second part of a key."""
    keys = tuple(_API_KEY.parse(key) for key in text.split(",")) if text else ()
    if len({key.split("_")[1] for key in keys}) < len(keys):
        raise ValueError(API_KEYS.expected)
    return tuple(map(Secret, keys))


def _parse_admin_tokens(text: str) -> tuple[AdminToken, ...]:
    """Return tokens with different names and different values."""
    parts = [_ADMIN_TOKEN.parse(each).split(":", 1) for each in text.split(",")] if text else []
    if len({name for name, _ in parts}) < len(parts) or len({it for _, it in parts}) < len(parts):
        raise ValueError(ADMIN_TOKENS.expected)
    return tuple(AdminToken(name, Secret(token)) for name, token in parts)


PREFIX = matching(r"[a-z0-9_-]{1,32}", "1 to 32 of a-z, 0-9, _ and -")
ACCOUNT = matching(r"[A-Za-z0-9._-]{1,64}", "1 to 64 of A-Z, a-z, 0-9, '.', _ and -")
HOST = matching(r"[A-Za-z0-9.:%_-]{1,253}", "a host name or an IP address")
# The names that a handler may not have are those of leases of our own.
HANDLER = matching(
    rf"(?!({FETCH}|reconcile)$)(?a:[A-Za-z_][\w-]*|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*)",
    f"a name other than {FETCH} and reconcile, or package.module:attribute",
)
LOG_KEY = matching(r"[!-~]{1,40}", "1 to 40 visible ASCII characters")
_SECRET_TEXT = matching(
    r"(?![\"'])[!-~]{1,256}(?<![\"'])",
    "1 to 256 visible ASCII characters, no whitespace, without quotation marks around",
)
_SECRET = Parser(
    expected=_SECRET_TEXT.expected, parse=lambda text: Secret(_SECRET_TEXT.parse(text).encode())
)
SIGNING_SECRETS = comma_separated(_SECRET, 1, 16, "secrets")
NETWORKS = Parser(
    expected="IP addresses or networks such as 192.0.2.0/24, by commas or line breaks",
    parse=lambda text: tuple(parse_network(part) for part in re.split(r"[,\s]+", text.strip())),
)
_API_KEY = matching(r"[rs]k_(live|test)_[A-Za-z0-9_]{1,240}", "a key of either mode")
API_KEYS = Parser(
    expected="rk_live_..., rk_test_..., sk_live_... or sk_test_..., one of each mode at most,"
    " separated by a comma only",
    parse=_parse_api_keys,
)
_HOST_AND_PATH = r"[A-Za-z0-9.-]{1,253}(:[0-9]{1,5})?(/[A-Za-z0-9._~-]+)*"
API_ADDRESS = matching(
    rf"https://{_HOST_AND_PATH}|http://(localhost|127\.[0-9.]+|\[::1\])(:[0-9]{{1,5}})?",
    "https://..., or http://... of this machine's loopback",
)
CONNECTED_ACCOUNT = matching(r"acct_[A-Za-z0-9]{1,64}", "acct_...")
CONNECTED_ACCOUNTS = comma_separated(CONNECTED_ACCOUNT, 0, 1000, "accounts")
TIME = Parser(
    expected="days or hours back, such as 3d or 12h, or an RFC 3339 time", parse=_parse_start
)
_ADMIN_TOKEN = matching(r"[a-z0-9_-]{1,32}:[!-+\--~]{16,256}", "name:token")
ADMIN_TOKENS = Parser(
    expected="name:token, separated by commas only: 1 to 32 of a-z, 0-9, _ and -, and 16 to 256"
    " visible ASCII characters without a comma; no name and no token twice",
    parse=_parse_admin_tokens,
)
_HOST_NAME = matching(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", "a host name, no port")
HOST_NAMES = comma_separated(_HOST_NAME, 0, 64, "names")
