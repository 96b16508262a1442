"""The commands: click and rich. Prints and returns exit codes; what is done is done elsewhere.

Exit codes: 0 all is well, 1 something was found wrong, 2 a setting or an argument is wrong,
3 Redis does not answer.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NoReturn, TypeVar

import click
import orjson
from redis.exceptions import RedisError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import __version__, handlers, health, ledger, logs, processes, sender
from .config import Settings
from .connections import connect, shortage
from .embedded import EmbeddedServer, find_server
from .errors import ConfigError, Unavailable
from .layout import Keys
from .secret import Secret
from .simulate import LIFECYCLES, SimulatedEvent, lifecycle_events
from .web import WEBHOOK_PATH

Result = TypeVar("Result")

DEV_DIRECTORY = Path(".data")
SIGNING_SECRET = DEV_DIRECTORY / "signing_secret"
DEV_REDIS_URL = DEV_DIRECTORY / "redis_url"
# Long enough ago that even the slowest step of a synthetic life is not in the future.
LIFE_BEGAN_BEFORE_S = 5 * 86_400

FOUND_WRONG, MISCONFIGURED, UNREACHABLE = 1, 2, 3

_out = Console()
_notes = Console(stderr=True)


def main() -> None:
    """Run the command line, turning our errors into one line each and an exit code."""
    try:
        commands()
    except ConfigError as error:
        _fail(error.problems, MISCONFIGURED)
    except Unavailable as error:
        _fail([f"Redis does not answer ({error.reason}); REDIS_URL says where"], UNREACHABLE)
    except Exception as error:  # noqa: BLE001 - whatever it says may hold what it failed on
        _fail([f"failed with {type(error).__name__}"], FOUND_WRONG)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def commands() -> None:
    """Receive Stripe Identity webhooks once, in order and without secrets.

    Settings come from the environment; .env.example lists them all.
    """


@commands.command()
def dev() -> None:
    """Run receiver, worker and the log handler on a private Valkey kept in .data/."""
    environ = {"HOST": "127.0.0.1", "DRAIN_S": "0", **os.environ}
    if _names_redis(environ):
        _run_dev(environ)
        return
    with EmbeddedServer.start(find_server(environ), directory=DEV_DIRECTORY) as server:
        DEV_REDIS_URL.write_text(server.url + "\n")
        try:
            _run_dev(environ | {"REDIS_URL": server.url})
        finally:
            DEV_REDIS_URL.unlink(missing_ok=True)


@commands.command()
def serve() -> None:
    """Listen for Stripe: verify, parse, admit."""
    settings = _settings(require_secrets=True)
    processes.run(settings, os.environ, receive=True)


@commands.command()
@click.option("--handlers", "names", metavar="NAMES", help="Only these of HANDLERS, by commas.")
def work(names: str | None) -> None:
    """Hand transitions to the handlers."""
    settings = _settings()
    chosen = settings.handlers if names is None else tuple(names.split(","))
    unknown = sorted(set(chosen) - set(settings.handlers))
    if unknown:
        raise ConfigError([f"--handlers: {name} is not among HANDLERS" for name in unknown])
    processes.run(settings, os.environ, receive=False, work=chosen)


@commands.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(*, as_json: bool) -> None:
    """Check settings, Redis and handlers; exit 0 only when every promise can be kept."""
    environ = _environ()
    settings = Settings.from_environ(environ)
    logs.configure(settings.log_level, settings.log_format, sys.stderr.buffer)
    findings = _asking_redis(lambda: _findings(settings, environ))
    _print_rows(
        ("name", "severity", "meaning"), [tuple(finding) for finding in findings], as_json=as_json
    )
    if any(finding.severity is health.Severity.FATAL for finding in findings):
        sys.exit(FOUND_WRONG)


@commands.command(epilog="\b\n" + "\n".join(["LIFECYCLE is one of:", *LIFECYCLES]))
@click.argument("lifecycles", nargs=-1, metavar="LIFECYCLE...", type=click.Choice([*LIFECYCLES]))
@click.option("--count", default=1, show_default=True, type=click.IntRange(1, 1_000_000),
              help="Sessions per lifecycle.")  # fmt: skip
@click.option("--rate", type=click.FloatRange(0.01), help="At most so many events per second.")
@click.option("--duplicates", default=0.0, show_default=True, type=click.FloatRange(0, 1),
              help="Share of events sent a second time.")  # fmt: skip
@click.option("--shuffle", is_flag=True, help="Mix the order of everything.")
@click.option("--file", "files", multiple=True, type=click.Path(exists=True, dir_okay=False,
              path_type=Path), help="Send this body instead; may be repeated.")  # fmt: skip
@click.option("--to", default=None, metavar="URL", help="The endpoint; default: the one of dev.")
@click.option("--secret-file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="The signing secret; default: STRIPE_WEBHOOK_SECRETS, or dev's.")  # fmt: skip
@click.option("--seed", type=int, help="Make the same sessions again.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def send(
    lifecycles: Sequence[str],
    *,
    count: int,
    rate: float | None,
    duplicates: float,
    shuffle: bool,
    files: Sequence[Path],
    to: str | None,
    secret_file: Path | None,
    seed: int | None,
    as_json: bool,
) -> None:
    """Send signed synthetic lifecycles, or the bodies of files, to an endpoint."""
    if bool(lifecycles) == bool(files):
        raise click.UsageError("name either lifecycles or --file")
    random = Random(secrets.randbits(64) if seed is None else seed)  # noqa: S311 - invented sessions
    events = _lives(lifecycles, count, random)
    deliveries = [sender.Delivery(body=path.read_bytes()) for path in files] or sender.plan(
        events, duplicates=duplicates, shuffle=shuffle, random=random
    )
    secret = _signing_secret(secret_file)
    address = to or _address(Settings.from_environ(os.environ).port)
    with Progress(console=_notes, transient=True, disable=not _notes.is_terminal) as progress:
        bar = progress.add_task("sending", total=len(deliveries))
        summary = asyncio.run(
            sender.send(
                deliveries,
                to=address,
                secret=secret,
                rate=rate,
                progress=lambda _: progress.advance(bar),
            )
        )
    _print_rows(("outcome", "answers"), sorted(summary.counts.items()), as_json=as_json)
    if not as_json:
        sessions = dict.fromkeys(event.session_id for event in events)
        for session_id in [*sessions][:3]:
            _notes.print(f"look at it with: python -m service session {session_id}", style="dim")
    if not summary.ok:
        sys.exit(FOUND_WRONG)


@commands.command()
@click.argument("session_id", metavar="vs_...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def session(session_id: str, *, as_json: bool) -> None:
    """Show what the ledger knows of a session: where it stands and every event it remembers."""
    settings = Settings.from_environ(_environ())
    keys = Keys(settings.redis_prefix, settings.partitions)

    async def look() -> ledger.SessionRecord | None:
        async with connect(settings.redis_url) as connections:
            return await ledger.read(connections, keys, session_id)

    record = _asking_redis(look)
    if record is None:
        _fail(["the ledger has no memory of this session"], FOUND_WRONG)
    if as_json:
        events = [event._asdict() for event in record.events]
        _print_json(record._asdict() | {"events": events})
        return
    described = {**record._asdict(), "events": len(record.events)}
    _print_rows(("field", "value"), [*described.items()], as_json=False)
    _print_rows(ledger.RememberedEvent._fields, record.events, as_json=False)


@commands.command()
def version() -> None:
    """Print the version."""
    click.echo(__version__)


def _run_dev(environ: dict[str, str]) -> None:
    settings = Settings.from_environ(environ)
    made_here = "" not in settings.secrets
    if made_here:
        settings = replace(settings, secrets={**settings.secrets, "": (_own_signing_secret(),)})
    logs.configure(settings.log_level, settings.log_format)
    processes.run(
        settings,
        environ,
        receive=True,
        work=settings.handlers,
        started=lambda ports: _print_welcome(ports, made_here=made_here),
    )


def _print_welcome(ports: processes.Ports, *, made_here: bool) -> None:
    endpoint = _address(ports.web)
    elsewhere = "" if endpoint == _address(Settings().port) else f" --to {endpoint}"
    lines = {
        "endpoint": endpoint,
        "signing secret": SIGNING_SECRET.read_text().strip() if made_here else "yours",
        "metrics": f"http://127.0.0.1:{ports.admin}/metrics",
        "type next": f"{Path(sys.executable).name} -m service send verified{elsewhere}",
    }
    for name, text in lines.items():
        _notes.print(f"{name:>15}  {text}", highlight=False, soft_wrap=True)


def _environ() -> dict[str, str]:
    """Return the environment; where it names no Redis, that of a `dev` running here counts."""
    if not _names_redis(os.environ) and DEV_REDIS_URL.exists():
        return {**os.environ, "REDIS_URL": DEV_REDIS_URL.read_text().strip()}
    return dict(os.environ)


def _names_redis(environ: Mapping[str, str]) -> bool:
    return bool(environ.get("REDIS_URL") or environ.get("REDIS_URL_FILE"))


def _address(port: int | None) -> str:
    return f"http://127.0.0.1:{port}{WEBHOOK_PATH}"


def _settings(*, require_secrets: bool = False) -> Settings:
    """Read the settings and configure logging by them."""
    settings = Settings.from_environ(os.environ, require_secrets=require_secrets)
    logs.configure(settings.log_level, settings.log_format)
    return settings


def _own_signing_secret() -> Secret[bytes]:
    """Return the signing secret of `dev`, made on first use and readable by its owner only."""
    try:
        DEV_DIRECTORY.mkdir(mode=0o700, exist_ok=True)
        if not SIGNING_SECRET.exists():
            descriptor = os.open(SIGNING_SECRET, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(f"whsec_{secrets.token_hex(16)}\n")
        return Secret(SIGNING_SECRET.read_bytes().strip())
    except OSError:
        raise ConfigError([f"{SIGNING_SECRET} can neither be read nor made"]) from None


def _signing_secret(path: Path | None) -> Secret[bytes]:
    if path is not None:
        return Secret(path.read_bytes().strip())
    configured = Settings.from_environ(os.environ).secrets.get("")
    if configured:
        return configured[0]
    if SIGNING_SECRET.exists():
        return _own_signing_secret()
    raise ConfigError(["no signing secret: start dev first, or name --secret-file"])


def _lives(lifecycles: Sequence[str], count: int, random: Random) -> list[SimulatedEvent]:
    began_at = int(time.time()) - LIFE_BEGAN_BEFORE_S
    return [
        event
        for _ in range(count)
        for name in lifecycles
        for event in lifecycle_events(name, random=random, started_at=began_at)
    ]


async def _findings(settings: Settings, environ: Mapping[str, str]) -> list[health.Finding]:
    openers = handlers.find(settings.handlers)
    async with connect(settings.redis_url) as connections:
        findings = await health.inspect(connections, settings)
    return findings + [await _opens(name, openers[name], environ) for name in openers]


async def _opens(
    name: str, opener: handlers.OpenHandler, environ: Mapping[str, str]
) -> health.Finding:
    try:
        async with opener(environ):
            severity, meaning = health.Severity.FINE, "opens"
    except ConfigError as error:
        severity, meaning = health.Severity.FATAL, str(error)
    except Exception as error:  # noqa: BLE001 - a handler may raise anything
        severity, meaning = health.Severity.FATAL, f"does not open: {type(error).__name__}"
    return health.Finding(f"handler {name}", severity, meaning)


def _asking_redis(ask: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    try:
        return asyncio.run(ask())
    except (RedisError, OSError) as error:
        raise Unavailable(shortage(error)) from None


def _print_rows(
    columns: Sequence[str], rows: Sequence[tuple[object, ...]], *, as_json: bool
) -> None:
    if as_json:
        _print_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row))
    _out.print(table)


def _print_json(found: object) -> None:
    click.echo(orjson.dumps(found))


def _fail(lines: Sequence[str], code: int) -> NoReturn:
    for line in lines:
        click.echo(f"error: {line}", err=True)
    sys.exit(code)
