"""Settings: what an operator may say, each declared once with its default, bounds and meaning.

How a variable is read is in `variables`; what one queue needs is declared in its handler. Nothing
here acts on a setting.
"""
# ruff: noqa: RUF009 (each call in the body of `Settings` makes a dataclass field)

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from . import environment
from .environment import (
    REDIS_URL,
    RUN_SECRETS,
    EnvironmentReader,
    Parser,
    SettingRow,
    choice,
    comma_separated,
    integer,
    matching,
    number,
    secret,
    setting,
)
from .errors import ConfigError
from .secret import Secret

Network: TypeAlias = IPv4Network | IPv6Network

WEBHOOK_PATH = "/webhooks/stripe"
SECRETS = "STRIPE_WEBHOOK_SECRETS"
DAY_S = 86_400
# In seconds: how far our clock and Redis's may be apart: beyond it no event is admitted.
MAX_CLOCK_DIFFERENCE_S = 300


def parse_network(text: str) -> Network:
    """Read one network in CIDR notation, or one address.

    Raises:
        ValueError: It is neither, or has bits set beyond its prefix.
    """
    return ip_network(text)


class Durability(StrEnum):
    """What must hold before an event is acknowledged."""

    NONE = "none"
    FSYNC = "fsync"
    REPLICA = "replica"

    @property
    def replicas(self) -> int:
        """How many replicas must have a write before anybody may rely on it."""
        return int(self is Durability.REPLICA)


class Livemode(StrEnum):
    """Which of Stripe's two worlds is listened to."""

    BOTH = "both"
    LIVE = "live"
    TEST = "test"


class LogLevel(StrEnum):
    """The least severity that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """How log lines look; `auto` is `console` on a terminal, else `json`."""

    AUTO = "auto"
    JSON = "json"
    CONSOLE = "console"


_PREFIX = matching(r"[a-z0-9_-]{1,32}", "1 to 32 of a-z, 0-9, _ and -")
_ACCOUNT = matching(r"[A-Za-z0-9._-]{1,64}", "1 to 64 of A-Z, a-z, 0-9, '.', _ and -")
_HOST = matching(r"[A-Za-z0-9.:%_-]{1,253}", "a host name or an IP address")
_HANDLER = matching(
    r"(?a:[A-Za-z_][\w-]*|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*)",
    "a name or package.module:attribute",
)
_LOG_KEY = matching(r"[!-~]{1,40}", "1 to 40 visible ASCII characters")
_SIGNING = matching(
    r"(?![\"'])[!-~]{1,256}(?<![\"'])",
    "1 to 256 visible ASCII characters, no whitespace, without quotation marks around",
)
_SIGNING_BYTES = Parser(
    expected=_SIGNING.expected, parse=lambda text: _SIGNING.parse(text).encode()
)
_SECRETS = comma_separated(secret(_SIGNING_BYTES), 1, 16, "secrets")
_ENDPOINT = "an ENDPOINT of 1 to 64 of A-Z, 0-9 and _ that is not FILE and does not end in _FILE"
_NETWORKS = Parser(
    expected="IP addresses or networks such as 192.0.2.0/24, by commas or line breaks",
    parse=lambda text: tuple(parse_network(part) for part in re.split(r"[,\s]+", text.strip())),
)
_LOCAL_REDIS = Secret("redis://127.0.0.1:6379/0")
# A record that ended with the age limit would be gone one second before its events are expired.
_ASCENDING = (
    ("max_event_age_days", operator.lt, "more than", "session_retention_days"),
    ("retry_initial_delay_s", operator.le, "at least", "retry_max_delay_s"),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting, valid. The variable of a field is its name in capitals.

    Only `secrets` differs: `STRIPE_WEBHOOK_SECRETS` fills its key `""`, which is the endpoint
    without a name, and `STRIPE_WEBHOOK_SECRETS_{ENDPOINT}` its key `{endpoint}`.
    """

    secrets: Mapping[str, tuple[Secret[bytes], ...]] = field(default_factory=dict)
    redis_url: Secret[str] = setting(_LOCAL_REDIS, secret(REDIS_URL), "Redis or Valkey")
    redis_prefix: str = setting("idv", _PREFIX, "What every key begins with")
    partitions: int = integer(8, 1, 256, "Partitions of the ledger, fixed once in use")
    durability: Durability = choice(
        Durability.NONE, "What Redis confirms before an event is acknowledged"
    )
    livemode: Livemode = choice(Livemode.BOTH, "Events to accept")
    account_name: str = setting("", _ACCOUNT, "Name of your Stripe account in each message")

    host: str = setting("0.0.0.0", _HOST, "Address to listen on")  # noqa: S104 (in a container)
    port: int = integer(8000, 0, 65535, "Port for webhooks and probes")
    admin_port: int = integer(8001, 0, 65535, "Port for metrics and probes")
    max_body_bytes: int = integer(262144, 1024, 16777216, "Largest body of a request")
    signature_tolerance_s: int = integer(300, 1, 3600, "Seconds a signature may be old, or ahead")
    forwarded_allow_ips: tuple[Network, ...] = setting(
        (parse_network("127.0.0.1"), parse_network("::1")),
        _NETWORKS,
        "Proxies whose X-Forwarded-For is believed",
    )
    allowed_networks: tuple[Network, ...] = setting(
        (), _NETWORKS, "Where webhooks may come from; empty for anywhere"
    )
    max_connections: int = integer(
        1024, 1, 100000, "Open connections before the slowest, or else a newcomer, gets a 503"
    )
    max_in_flight: int = integer(512, 1, 100000, "Whole requests in hand before a 503")
    receive_timeout_s: float = number(
        10.0, 0.1, 300, "Seconds a client has for a whole request, and to take its answer"
    )
    keep_alive_s: int = integer(
        75, 1, 3600, "Seconds an idle connection stays, more than the balancer's"
    )
    drain_s: float = number(5.0, 0, 300, "Seconds between not ready and closing the listeners")
    shutdown_grace_s: float = number(
        15.0, 0.1, 600, "Seconds to finish what is in hand when stopping"
    )
    admit_deadline_s: float = number(
        5.0, 0.1, 30, "Seconds to try Redis within one request before a 503"
    )

    max_event_age_days: int = integer(35, 31, 3649, "Days after which an event is too old to admit")
    session_retention_days: int = integer(
        400,
        32,
        3650,
        "Days a session is remembered after its last event, more than MAX_EVENT_AGE_DAYS",
    )
    stream_max_entries: int = integer(
        1000000,
        1,
        10**12,
        "Transitions a partition holds; above, settled ones go early, and unsettled ones are a 503",
    )

    stream_retention_days: int = integer(
        7, 0, 3650, "Days a settled transition is kept, for replays"
    )
    dead_letter_retention_days: int = integer(90, 0, 3650, "Days a dead letter is kept; 0 for ever")

    handlers: tuple[str, ...] = setting(
        ("log",), comma_separated(_HANDLER, 1, 64, "handlers"), "Who is handed each transition"
    )
    handler_concurrency: int = integer(
        16, 1, 1024, "Sessions side by side, per handler and partition"
    )
    handler_timeout_s: float = number(10.0, 0.1, 600, "Seconds for one attempt")
    retry_initial_delay_s: float = number(1.0, 0.01, 3600, "Seconds of the first back-off")
    retry_max_delay_s: float = number(300.0, 0.01, 86400, "Seconds of the longest back-off")
    retry_max_attempts: int = integer(10, 1, 1000, "Attempts before the dead letter")
    lease_ttl_s: float = number(
        10.0, 1, 300, "Seconds until another worker takes over from a dead one"
    )

    log_level: LogLevel = choice(LogLevel.INFO, "Least severity to log")
    log_format: LogFormat = choice(LogFormat.AUTO, "Look of the log")
    log_metadata_keys: tuple[str, ...] = setting(
        (), comma_separated(_LOG_KEY, 0, 64, "keys"), "Metadata of Stripe's that may be logged"
    )

    @classmethod
    def from_environ(
        cls,
        environ: Mapping[str, str],
        *,
        require_secrets: bool = False,
        run_secrets: Path = RUN_SECRETS,
    ) -> Settings:
        """Read every setting from its first source, as `EnvironmentReader` describes them.

        Raises:
            ConfigError: with every problem, each by name; also where `require_secrets` and no
                endpoint has any.
        """
        sources = EnvironmentReader(environ, run_secrets)
        values = {"secrets": _secrets(sources), **sources.values(cls)}
        problems = sources.problems
        for low, is_right, expected, high in _ASCENDING:
            unsure = {low.upper(), high.upper()} & problems.keys()
            if not unsure and not is_right(values[low], values[high]):
                problems[high.upper()] = f"{high.upper()}: expected {expected} {low.upper()}"
        tried = values["secrets"] or any(name.startswith(SECRETS) for name in problems)
        if require_secrets and not tried:
            problems[SECRETS] = f"{SECRETS}: expected {_SECRETS.expected}"
        if problems:
            raise ConfigError(tuple(problems.values()))
        return cls(**values)


def read_signing_secrets(environ: Mapping[str, str]) -> Mapping[str, tuple[Secret[bytes], ...]]:
    """Read the signing secrets alone.

    Raises:
        ConfigError: With every problem, each by name; also where there are none.
    """
    sources = EnvironmentReader(environ)
    secrets = _secrets(sources)
    if sources.problems or not secrets:
        none = f"{SECRETS}: expected {_SECRETS.expected}"
        raise ConfigError(tuple(sources.problems.values()) or (none,))
    return secrets


def read_allowed_networks(environ: Mapping[str, str]) -> tuple[Network, ...]:
    """Read the networks that webhooks may come from alone.

    Raises:
        ConfigError: They are not valid, or not there.
    """
    sources = EnvironmentReader(environ)
    networks = sources.value("ALLOWED_NETWORKS", _NETWORKS)
    if networks is None:
        none = f"ALLOWED_NETWORKS: expected {_NETWORKS.expected}"
        raise ConfigError(tuple(sources.problems.values()) or (none,))
    return networks


def find_misspelled(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that are no setting but nearly, each with the setting it is near to."""
    singular = SECRETS.removesuffix("S")
    others = {name: value for name, value in environ.items() if not name.startswith(singular)}
    found = environment.find_misspelled(others, [row.name for row in describe()])
    for name in environ:
        rest = name.removeprefix(singular)
        if rest != name and (not rest or rest.startswith("_")):
            found[name] = SECRETS + rest
    return found


def describe() -> list[SettingRow]:
    """Return a row for every setting, in the order of their declarations."""
    about = f"Signing secrets; {SECRETS}_{{ENDPOINT}} for further endpoints ({_SECRETS.expected})"
    return [SettingRow(SECRETS, "", about), *environment.describe(Settings)]


def _secrets(sources: EnvironmentReader) -> Mapping[str, tuple[Secret[bytes], ...]]:
    """Return the secrets of every endpoint that any source names."""
    found = {}
    if (secrets := sources.value(SECRETS, _SECRETS)) is not None:
        found[""] = secrets
    for name in sorted(sources.names(f"{SECRETS}_")):
        endpoint = name.removeprefix(f"{SECRETS}_")
        if name.endswith("_FILE") or not re.fullmatch(r"[A-Z0-9_]{1,64}", endpoint):
            sources.problems[name] = f"{name!a}: expected {_ENDPOINT}"
        elif (secrets := sources.value(name, _SECRETS)) is not None:
            found[endpoint.lower()] = secrets
        else:
            sources.problems.setdefault(name, f"{name}: expected {_SECRETS.expected}")
    return MappingProxyType(found)
