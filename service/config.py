"""Settings: what an operator may say, each declared once with its default, bounds and meaning.

The only reader of environment names. Nothing here acts on a setting or repeats one in a problem.
"""
# ruff: noqa: RUF009 (each call in the body of `Settings` makes a dataclass field)

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

from .errors import ConfigError
from .secret import Secret

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)
N = TypeVar("N", int, float)

SECRETS = "STRIPE_WEBHOOK_SECRETS"


class Durability(StrEnum):
    """What must hold before an event is acknowledged."""

    NONE = "none"
    FSYNC = "fsync"
    REPLICA = "replica"


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


@dataclass(frozen=True, kw_only=True)
class _Kind(Generic[T]):
    """What a text may be: `read` raises ValueError on anything but what `expected` says."""

    expected: str
    read: Callable[[str], T]


def _matching(pattern: str, expected: str) -> _Kind[str]:
    def read(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise ValueError(expected)
        return text

    return _Kind(expected=expected, read=read)


def _between(numeral: _Kind[str], convert: Callable[[str], N], low: N, high: N) -> _Kind[N]:
    expected = f"{numeral.expected} from {low} to {high}"

    def read(text: str) -> N:
        number = convert(numeral.read(text))
        if not low <= number <= high:
            raise ValueError(expected)
        return number

    return _Kind(expected=expected, read=read)


def _many(item: _Kind[T], least: int, most: int, what: str) -> _Kind[tuple[T, ...]]:
    expected = f"{least} to {most} different {what}, separated by commas only: {item.expected}"

    def read(text: str) -> tuple[T, ...]:
        items = tuple(item.read(part) for part in text.split(",")) if text else ()
        if not least <= len(items) <= most or len(set(items)) < len(items):
            raise ValueError(expected)
        return items

    return _Kind(expected=expected, read=read)


def _hidden(kind: _Kind[T]) -> _Kind[Secret[T]]:
    return _Kind(expected=kind.expected, read=lambda text: Secret(kind.read(text)))


_URL = _matching(
    r"(rediss?(\+sentinel|\+cluster)?|unix)://[!-~]+",
    "redis://, rediss://, either with +sentinel or +cluster, or unix://",
)
_PREFIX = _matching(r"[a-z0-9_-]{1,32}", "1 to 32 of a-z, 0-9, _ and -")
_HOST = _matching(r"[A-Za-z0-9.:%_-]{1,253}", "a host name or an IP address")
_HANDLER = _matching(
    r"(?a:[A-Za-z_][\w-]*|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*)",
    "a name or package.module:attribute",
)
_LOG_KEY = _matching(r"[!-~]{1,40}", "1 to 40 visible ASCII characters")
_SIGNING = _matching(r"[!-~]{1,256}", "1 to 256 visible ASCII characters, no whitespace")
_SIGNING_BYTES = _Kind(expected=_SIGNING.expected, read=lambda text: _SIGNING.read(text).encode())
_SECRETS = _many(_hidden(_SIGNING_BYTES), 1, 16, "secrets")
_ENDPOINT = "an ENDPOINT of 1 to 64 of A-Z, 0-9 and _ that is not FILE and does not end in _FILE"
_LOCAL_REDIS = Secret("redis://127.0.0.1:6379/0")
# What has to be in ascending order, lower first.
_ASCENDING = (
    ("dedup_horizon_days", "session_retention_days"),
    ("retry_first_s", "retry_ceiling_s"),
)


class _Sources:
    """The places a setting may stand in, and by name what is wrong with what stands there."""

    def __init__(self, environ: Mapping[str, str], run_secrets: Path) -> None:
        self.problems: dict[str, str] = {}
        self._environ = environ
        self._directories = [_listing(environ.get("CREDENTIALS_DIRECTORY")), _listing(run_secrets)]

    def value(self, name: str, kind: _Kind[T]) -> T | None:
        """Return what is set, or None where nothing is set or a problem was noted."""
        try:
            text = self._text(name)
            return None if text is None else kind.read(text)
        except ConfigError as error:
            self.problems[name] = str(error)
        except ValueError:
            self.problems[name] = f"{name}: expected {kind.expected}"
        return None

    def secrets(self) -> Mapping[str, tuple[Secret[bytes], ...]]:
        """Return the secrets of every endpoint that any source names."""
        found = {}
        if (secrets := self.value(SECRETS, _SECRETS)) is not None:
            found[""] = secrets
        for name in sorted(self._endpoint_names()):
            endpoint = name.removeprefix(f"{SECRETS}_")
            if name.endswith("_FILE") or not re.fullmatch(r"[A-Z0-9_]{1,64}", endpoint):
                self.problems[name] = f"{name!a}: expected {_ENDPOINT}"
            elif (secrets := self.value(name, _SECRETS)) is not None:
                found[endpoint.lower()] = secrets
            else:
                self.problems.setdefault(name, f"{name}: expected {_SECRETS.expected}")
        return MappingProxyType(found)

    def _text(self, name: str) -> str | None:
        text, path = self._environ.get(name), self._environ.get(f"{name}_FILE")
        if text and path:
            raise ConfigError([f"{name}: expected alone, but {name}_FILE is set as well"])
        places = ((listing, key) for listing in self._directories for key in (name, name.lower()))
        file = path or next((listing[key] for listing, key in places if key in listing), None)
        if text or file is None:
            return text or None
        try:
            return Path(file).read_bytes().decode().removesuffix("\n")
        except (OSError, ValueError):
            source = f"{name}_FILE" if path else name
            raise ConfigError([f"{source}: expected a readable file of UTF-8 text"]) from None

    def _endpoint_names(self) -> set[str]:
        names = {name.removesuffix("_FILE") for name in self._environ}
        for listing in self._directories:
            names.update(name.upper() if name.islower() else name for name in listing)
        return {name for name in names if name.startswith(f"{SECRETS}_")}


def _listing(directory: str | Path | None) -> Mapping[str, Path]:
    # A directory that cannot be listed is not ours: login shells inherit the variable as well.
    try:
        return {file.name: file for file in Path(directory).iterdir()} if directory else {}
    except (OSError, ValueError):
        return {}


def _variable(item: Field[Any]) -> str:
    return SECRETS if item.name == "secrets" else item.name.upper()


def _shown(default: object) -> str:
    if isinstance(default, Secret):
        return _shown(default.reveal())
    if isinstance(default, tuple):
        return ",".join(default)
    return "" if default is MISSING else str(default)


def _setting(default: T, kind: _Kind[T], description: str) -> T:
    return field(default=default, metadata={"kind": kind, "description": description})


def _whole(default: int, low: int, high: int, description: str) -> int:
    kind = _between(_matching(r"[0-9]+", "a whole number"), int, low, high)
    return _setting(default, kind, description)


def _decimal(default: float, low: float, high: float, description: str) -> float:
    kind = _between(_matching(r"[0-9]+(\.[0-9]+)?", "a number"), float, low, high)
    return _setting(default, kind, description)


def _word(default: E, description: str) -> E:
    words = type(default)
    return _setting(default, _Kind(expected=f"one of {', '.join(words)}", read=words), description)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting, valid. The variable of a field is its name in capitals.

    Only `secrets` differs: `STRIPE_WEBHOOK_SECRETS` fills its key `""`, which is the endpoint
    without a name, and `STRIPE_WEBHOOK_SECRETS_{ENDPOINT}` its key `{endpoint}`.
    """

    secrets: Mapping[str, tuple[Secret[bytes], ...]] = field(
        default_factory=dict,
        metadata={
            "kind": _SECRETS,
            "description": f"Signing secrets; {SECRETS}_{{ENDPOINT}} for further endpoints",
        },
    )
    redis_url: Secret[str] = _setting(_LOCAL_REDIS, _hidden(_URL), "Redis or Valkey")
    redis_prefix: str = _setting("idv", _PREFIX, "What every key begins with")
    partitions: int = _whole(8, 1, 256, "Partitions of the ledger, fixed once in use")
    durability: Durability = _word(
        Durability.NONE, "What Redis confirms before an event is acknowledged"
    )
    livemode: Livemode = _word(Livemode.BOTH, "Events to accept")

    host: str = _setting("0.0.0.0", _HOST, "Address to listen on")  # noqa: S104 (in a container)
    port: int = _whole(8000, 0, 65535, "Port for webhooks and probes")
    admin_port: int = _whole(8001, 0, 65535, "Port for metrics and probes")
    max_body_bytes: int = _whole(262144, 1024, 16777216, "Largest body of a request")
    signature_tolerance_s: int = _whole(300, 1, 3600, "Seconds a signature may be old, or ahead")
    max_in_flight: int = _whole(512, 1, 100000, "Requests in hand before a 503")
    receive_timeout_s: float = _decimal(10.0, 0.1, 300, "Seconds a client has for a whole request")
    keep_alive_s: int = _whole(
        75, 1, 3600, "Seconds an idle connection stays, more than the balancer's"
    )
    drain_s: float = _decimal(5.0, 0, 300, "Seconds between not ready and closing the listeners")
    shutdown_grace_s: float = _decimal(
        15.0, 0.1, 600, "Seconds to finish what is in hand when stopping"
    )
    admit_deadline_s: float = _decimal(
        5.0, 0.1, 30, "Seconds to try Redis within one request before a 503"
    )

    dedup_horizon_days: int = _whole(35, 1, 3650, "Days after which an event is too old to admit")
    session_retention_days: int = _whole(
        400, 1, 3650, "Days a session is remembered after its last event"
    )
    stream_max_entries: int = _whole(
        1000000, 1, 10**12, "Transitions a partition holds before a 503"
    )

    handlers: tuple[str, ...] = _setting(
        ("log",), _many(_HANDLER, 1, 64, "handlers"), "Who is handed each transition"
    )
    handler_concurrency: int = _whole(
        16, 1, 1024, "Sessions side by side, per handler and partition"
    )
    handler_timeout_s: float = _decimal(10.0, 0.1, 600, "Seconds for one attempt")
    retry_first_s: float = _decimal(1.0, 0.01, 3600, "Seconds of the first back-off")
    retry_ceiling_s: float = _decimal(300.0, 0.01, 86400, "Seconds of the longest back-off")
    retry_attempts: int = _whole(10, 1, 1000, "Attempts before the dead letter")
    lease_ttl_s: float = _decimal(
        10.0, 1, 300, "Seconds until another worker takes over from a dead one"
    )

    log_level: LogLevel = _word(LogLevel.INFO, "Least severity to log")
    log_format: LogFormat = _word(LogFormat.AUTO, "Look of the log")
    log_metadata_keys: tuple[str, ...] = _setting(
        (), _many(_LOG_KEY, 0, 64, "keys"), "Metadata of Stripe's that may be logged"
    )

    @classmethod
    def from_environ(
        cls,
        environ: Mapping[str, str],
        *,
        require_secrets: bool = False,
        run_secrets: Path = Path("/run/secrets"),
    ) -> Settings:
        """Read every setting from its first source, where an empty variable is one not set.

        The sources of `NAME` are `NAME`, the file at `NAME_FILE`, and the files `NAME` or `name`
        in `$CREDENTIALS_DIRECTORY` and in `run_secrets`. One newline at a file's end is dropped.

        Raises:
            ConfigError: with every problem, each by name; also where `require_secrets` and no
                endpoint has any.
        """
        sources = _Sources(environ, run_secrets)
        values: dict[str, Any] = {"secrets": sources.secrets()}
        for item in fields(cls):
            if item.name != "secrets":
                value = sources.value(_variable(item), item.metadata["kind"])
                values[item.name] = item.default if value is None else value
        problems = sources.problems
        for low, high in _ASCENDING:
            unsure = {low.upper(), high.upper()} & problems.keys()
            if not unsure and values[low] > values[high]:
                problems[high.upper()] = f"{high.upper()}: expected at least {low.upper()}"
        tried = values["secrets"] or any(name.startswith(SECRETS) for name in problems)
        if require_secrets and not tried:
            problems[SECRETS] = f"{SECRETS}: expected {_SECRETS.expected}"
        if problems:
            raise ConfigError(tuple(problems.values()))
        return cls(**values)


class Row(NamedTuple):
    """One setting as the documents show it."""

    name: str
    default: str
    description: str


def describe() -> tuple[Row, ...]:
    """Return a row for every setting, in the order of their declarations."""
    return tuple(
        Row(
            name=_variable(item),
            default=_shown(item.default),
            description=f"{item.metadata['description']} ({item.metadata['kind'].expected})",
        )
        for item in fields(Settings)
    )


def example() -> str:
    """Return the text of `.env.example`."""
    return "\n".join(f"# {row.description}\n{row.name}={row.default}\n" for row in describe())
