"""The settings: each declared once, with its default, bounds and description.

How a variable is read is in `environment`, and what its text may be in `parsers`. The settings of
one queue are declared in its handler. Nothing here acts on a setting.
"""
# ruff: noqa: RUF009 (each call in the body of `Settings` makes a dataclass field)

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from . import environment, parsers
from .environment import (
    REDIS_URL,
    RUN_SECRETS,
    EnvironmentReader,
    SettingRow,
    choice,
    comma_separated,
    integer,
    number,
    secret,
    setting,
)
from .errors import ConfigError
from .parsers import FETCH, AdminToken, Network, parse_network
from .secret import Secret

# The signing secrets of every endpoint, by its name; "" is the endpoint without a name.
EndpointSecrets: TypeAlias = Mapping[str, tuple[Secret[bytes], ...]]

WEBHOOK_PATH = "/webhooks/stripe"
SECRETS = "STRIPE_WEBHOOK_SECRETS"
DAY_S = 86_400
# No event is admitted while our clock and Redis's differ by more.
MAX_CLOCK_DIFFERENCE_S = 300


class Durability(StrEnum):
    """What must hold before an event is acknowledged."""

    NONE = "none"
    FSYNC = "fsync"
    REPLICA = "replica"

    @property
    def replicas(self) -> int:
        """The number of replicas that must have a write before it counts as stored."""
        return int(self is Durability.REPLICA)


class Livemode(StrEnum):
    """Which events are accepted: those of live mode, of test mode, or both."""

    BOTH = "both"
    LIVE = "live"
    TEST = "test"


class LogLevel(StrEnum):
    """The lowest severity that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """The format of log lines; `auto` is `console` on a terminal, else `json`."""

    AUTO = "auto"
    JSON = "json"
    CONSOLE = "console"


_ENDPOINT = "an ENDPOINT of 1 to 64 of A-Z, 0-9 and _ that is not FILE and does not end in _FILE"
_LOCAL_REDIS = Secret("redis://127.0.0.1:6379/0")
# If a session record were kept exactly as long as the age limit, it would be deleted one second
# before its last event expires.
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

    secrets: EndpointSecrets = field(default_factory=dict)
    redis_url: Secret[str] = setting(
        _LOCAL_REDIS, secret(REDIS_URL), "URL of Redis or Valkey, with credentials"
    )
    redis_prefix: str = setting("idv", parsers.PREFIX, "Prefix of every Redis key")
    partitions: int = integer(8, 1, 256, "Number of partitions; cannot change once in use")
    durability: Durability = choice(
        Durability.NONE, "What Redis must confirm before an event is acknowledged"
    )
    livemode: Livemode = choice(Livemode.BOTH, "Mode of the events to accept")
    account_name: str = setting(
        "", parsers.ACCOUNT, "Name of your own Stripe account in each message"
    )

    host: str = setting("0.0.0.0", parsers.HOST, "Address to listen on")  # noqa: S104 (in a container)
    port: int = integer(8000, 0, 65535, "Port for webhooks and probes")
    admin_port: int = integer(8001, 0, 65535, "Port for metrics, probes and the page")
    admin_tokens: tuple[AdminToken, ...] = setting(
        (), parsers.ADMIN_TOKENS, "Logins to the page that may replay and drop; empty for none"
    )
    admin_read_tokens: tuple[AdminToken, ...] = setting(
        (), parsers.ADMIN_TOKENS, "Logins to the page that may read; empty: reading needs no login"
    )
    admin_hosts: tuple[str, ...] = setting(
        (), parsers.HOST_NAMES, "Host names of the page, besides localhost and IP addresses"
    )
    admin_redis_url: Secret[str] = setting(
        Secret(""), secret(REDIS_URL), "URL of Redis for the page; empty for REDIS_URL"
    )
    max_body_bytes: int = integer(262144, 1024, 16777216, "Largest request body, in bytes")
    signature_tolerance_s: int = integer(
        300, 1, 3600, "Largest difference between a signature's timestamp and now, in seconds"
    )
    forwarded_allow_ips: tuple[Network, ...] = setting(
        (parse_network("127.0.0.1"), parse_network("::1")),
        parsers.NETWORKS,
        "Proxies whose X-Forwarded-For header is trusted",
    )
    allowed_networks: tuple[Network, ...] = setting(
        (), parsers.NETWORKS, "Networks that webhooks may come from; empty for any"
    )
    max_connections: int = integer(
        1024, 1, 100000, "Open connections; above, the slowest or else the newest one gets a 503"
    )
    max_in_flight: int = integer(
        512, 1, 100000, "Requests in progress; above, a request gets a 503"
    )
    receive_timeout_s: float = number(
        10.0, 0.1, 300, "Seconds for a client to send a request, and to read its response"
    )
    keep_alive_s: int = integer(
        75, 1, 3600, "Seconds until an idle connection is closed; more than the load balancer's"
    )
    drain_s: float = number(
        5.0, 0, 300, "Seconds between becoming not ready and closing the listening sockets"
    )
    shutdown_grace_s: float = number(
        15.0, 0.1, 600, "Seconds to finish requests and deliveries when stopping"
    )
    admit_deadline_s: float = number(
        5.0, 0.1, 30, "Seconds to try Redis within one request before a 503"
    )

    max_event_age_days: int = integer(35, 31, 3649, "Days after which an event is too old to admit")
    session_retention_days: int = integer(
        400,
        32,
        3650,
        "Days a session record is kept after its last event; more than MAX_EVENT_AGE_DAYS",
    )
    stream_max_entries: int = integer(
        1000000,
        1,
        10**12,
        "Transitions per partition; above, settled ones are trimmed early, else events get a 503",
    )

    stream_retention_days: int = integer(
        7, 0, 3650, "Days a settled transition is kept for replays"
    )
    dead_letter_retention_days: int = integer(
        90, 0, 3650, "Days a dead letter is kept; 0 to keep them forever"
    )

    stripe_api_key: tuple[Secret[str], ...] = setting(
        (), parsers.API_KEYS, "Keys of Stripe's API; empty to ask it nothing"
    )
    stripe_api_base: str = setting(
        "https://api.stripe.com", parsers.API_ADDRESS, "Where Stripe's API is, or a proxy of it"
    )
    stripe_api_rate: int = integer(
        20, 1, 1000, "Requests per second to Stripe's API, of the whole deployment and per mode"
    )
    stripe_accounts: tuple[str, ...] = setting(
        (), parsers.CONNECTED_ACCOUNTS, "Connected accounts to reconcile besides your own"
    )
    # Any longer, and the alerts on lag would call a healthy reconciler late (MAX_RECONCILE_LAG_S).
    reconcile_every_s: int = integer(
        60, 0, 300, "Seconds between two readings of Stripe's list of events; 0 for none"
    )
    reconcile_from: str = setting(
        "3d", parsers.TIME, "Where the first reading of an account's events begins"
    )

    handlers: tuple[str, ...] = setting(
        ("log",),
        comma_separated(parsers.HANDLER, 1, 64, "handlers"),
        "Handlers that each transition is delivered to",
    )
    handler_concurrency: int = integer(
        16, 1, 1024, "Sessions handled concurrently, per handler and partition"
    )
    handler_timeout_s: float = number(10.0, 0.1, 600, "Seconds for one handler call")
    retry_initial_delay_s: float = number(1.0, 0.01, 3600, "Seconds before the first retry")
    retry_max_delay_s: float = number(
        300.0, 0.01, 86400, "Longest delay between retries, in seconds"
    )
    retry_max_attempts: int = integer(
        10, 1, 1000, "Attempts before a transition becomes a dead letter"
    )
    lease_ttl_s: float = number(
        10.0, 1, 300, "Seconds until another worker takes over the partitions of a dead one"
    )

    log_level: LogLevel = choice(LogLevel.INFO, "Lowest severity to log")
    log_format: LogFormat = choice(LogFormat.AUTO, "Format of the log")
    log_metadata_keys: tuple[str, ...] = setting(
        (),
        comma_separated(parsers.LOG_KEY, 0, 64, "keys"),
        "Session metadata keys that may be logged",
    )

    @property
    def all_handlers(self) -> tuple[str, ...]:
        """The handlers of the deployment: those of HANDLERS, and `fetch` where there is a key."""
        return (*self.handlers, FETCH) if self.stripe_api_key else self.handlers

    @classmethod
    def from_environ(
        cls,
        environ: Mapping[str, str],
        *,
        require_secrets: bool = False,
        run_secrets: Path = RUN_SECRETS,
    ) -> Settings:
        """Read every setting, each from the first of its sources (see `EnvironmentReader`).

        Raises:
            ConfigError: With every problem, each by name; also if no endpoint has secrets and
                `require_secrets` is set.
        """
        reader = EnvironmentReader(environ, run_secrets)
        secrets = _secrets(reader, is_required=require_secrets)
        values = {"secrets": secrets, **reader.values(cls)}
        _check_order(values, reader.problems)
        _check_tokens(values, reader.problems)
        reader.raise_problems()
        return cls(**values)


def read_signing_secrets(environ: Mapping[str, str]) -> EndpointSecrets:
    """Read the signing secrets alone.

    Raises:
        ConfigError: With every problem, each by name; also if there are no secrets.
    """
    reader = EnvironmentReader(environ)
    secrets = _secrets(reader, is_required=True)
    reader.raise_problems()
    return secrets


def read_again(environ: Mapping[str, str], name: str, *, may_be_empty: bool = False) -> Any:
    """Read one setting of several values alone, while the process runs.

    Raises:
        ConfigError: It is wrong, or not set and may not be empty.
    """
    reader = EnvironmentReader(environ)
    parser = Settings.__dataclass_fields__[name.lower()].metadata["parser"]
    values = reader.value(name, parser) or ()
    reader.raise_problems()
    if not (values or may_be_empty):
        raise ConfigError([f"{name}: expected {parser.expected}"])
    return values


def check_tokens(acting: Sequence[AdminToken], reading: Sequence[AdminToken]) -> None:
    """Check that no token to read with is one to act with: its holder could do what is not meant.

    Raises:
        ConfigError: One is.
    """
    if {each.token for each in acting} & {each.token for each in reading}:
        raise ConfigError(["ADMIN_READ_TOKENS: expected none of ADMIN_TOKENS"])


def find_misspelled(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables whose name is almost that of a setting, each with that setting."""
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
    expected = parsers.SIGNING_SECRETS.expected
    about = f"Signing secrets; {SECRETS}_{{ENDPOINT}} for further endpoints ({expected})"
    return [SettingRow(SECRETS, "", about), *environment.describe(Settings)]


def _secrets(reader: EnvironmentReader, *, is_required: bool) -> EndpointSecrets:
    """Return the secrets of every endpoint that any source names; note what is wrong."""
    found = {}
    if (secrets := reader.value(SECRETS, parsers.SIGNING_SECRETS)) is not None:
        found[""] = secrets
    for name in sorted(reader.names(f"{SECRETS}_")):
        endpoint = name.removeprefix(f"{SECRETS}_")
        if name.endswith("_FILE") or not re.fullmatch(r"[A-Z0-9_]{1,64}", endpoint):
            reader.problems[name] = f"{name!a}: expected {_ENDPOINT}"
        elif (secrets := reader.value(name, parsers.SIGNING_SECRETS)) is not None:
            found[endpoint.lower()] = secrets
        else:
            reader.problems.setdefault(name, f"{name}: expected {parsers.SIGNING_SECRETS.expected}")
    if is_required and not found and not reader.problems:
        reader.problems[SECRETS] = f"{SECRETS}: expected {parsers.SIGNING_SECRETS.expected}"
    return MappingProxyType(found)


def _check_order(values: Mapping[str, Any], problems: dict[str, str]) -> None:
    """Note where a setting is not above the one it must exceed, unless either is wrong anyway."""
    for low, is_right, expected, high in _ASCENDING:
        is_known = not {low.upper(), high.upper()} & problems.keys()
        if is_known and not is_right(values[low], values[high]):
            problems[high.upper()] = f"{high.upper()}: expected {expected} {low.upper()}"


def _check_tokens(values: Mapping[str, Any], problems: dict[str, str]) -> None:
    if not {"ADMIN_TOKENS", "ADMIN_READ_TOKENS"} & problems.keys():
        try:
            check_tokens(values["admin_tokens"], values["admin_read_tokens"])
        except ConfigError as error:
            problems["ADMIN_READ_TOKENS"] = str(error)
