"""The commands: click and rich. What is done is done elsewhere; here it is said and shown."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import click

from . import (
    __version__,
    checks,
    ledger,
    local,
    logs,
    mail_commands,
    processes,
    selftest,
    sender,
    terminal,
    traces,
)
from .config import SECRETS, Settings
from .connections import connect
from .embedded import EmbeddedServer, find_server
from .errors import ConfigError, Unavailable
from .findings import Finding, Severity
from .layout import Keys
from .redaction import scrub
from .secret import Secret
from .simulate import LIFECYCLES, SimulatedEvent, lifecycle_events
from .web import WEBHOOK_PATH

# Long enough ago that even the slowest step of a synthetic life is not in the future.
LIFE_BEGAN_BEFORE_S = 5 * 86_400


def main() -> None:
    """Run the command line, turning our errors into one line each and an exit code."""
    # Handlers may be files of the current folder, as they may with `python -m service`.
    if "" not in sys.path and not sys.flags.safe_path:
        sys.path.append("")
    terminal.print_any_text()
    try:
        _run_command()
    except ConfigError as error:
        terminal.fail(error.problems, terminal.MISCONFIGURED)
    except Exception as error:  # noqa: BLE001 - whatever it says may hold what it failed on
        terminal.fail([f"failed with {type(error).__name__}"], terminal.FOUND_WRONG)


def _run_command() -> None:
    try:
        commands()
    except Unavailable as error:
        url = Settings.from_environ(local.environment()).redis_url
        terminal.fail([terminal.trouble(error.reason, url)], terminal.UNREACHABLE)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def commands() -> None:
    """Receive Stripe Identity webhooks once, in order and without secrets.

    Settings come from the environment; .env.example lists them all.
    """


@commands.command()
def dev() -> None:
    """Run receiver and worker in one process, on a private Valkey kept in .data/.

    HANDLERS names the handlers (log unless set): your own too, as my_handler:open for the function
    open in my_handler.py of this folder. REDIS_URL names another Redis.
    """
    environ = {"HOST": "127.0.0.1", "DRAIN_S": "0", **os.environ}
    if local.names_redis(environ):
        _run_dev(environ)
        return
    with EmbeddedServer.start(find_server(environ), directory=local.DIRECTORY) as server:
        local.REDIS_URL.write_text(server.url + "\n")
        try:
            _run_dev(environ | {"REDIS_URL": server.url})
        finally:
            local.REDIS_URL.unlink(missing_ok=True)


@commands.command()
def serve() -> None:
    """Listen for Stripe: verify, parse, admit."""
    processes.run(_settings(require_secrets=True), os.environ, receive=True)


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
@terminal.json_option
def check(*, as_json: bool) -> None:
    """Check settings, Redis and handlers; exit 0 only when every promise can be kept."""
    environ = local.environment()
    settings = Settings.from_environ(environ)
    logs.configure(settings.log_level, settings.log_format, sys.stderr.buffer)
    findings = terminal.asking_redis(lambda: checks.findings(settings, environ))
    if as_json:
        terminal.print_json([finding._asdict() for finding in findings])
    else:
        rows = [(*one[:2], ", ".join(one.promises), one.meaning) for one in findings]
        terminal.print_rows(Finding._fields, rows, as_json=False, prose=("promises", "meaning"))
        columns = ("promise", "severity", "because of")
        terminal.print_rows(
            columns, checks.verdicts(findings), as_json=False, prose=("because of",)
        )
    if any(finding.severity is Severity.FATAL for finding in findings):
        sys.exit(terminal.FOUND_WRONG)


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
@terminal.json_option
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
    with terminal.bar("sending", total=len(deliveries)) as (progress, bar):
        summary = asyncio.run(
            sender.send(
                deliveries,
                to=address,
                secret=secret,
                rate=rate,
                progress=lambda _: progress.advance(bar),
            )
        )
    terminal.print_rows(("outcome", "answers"), sorted(summary.counts.items()), as_json=as_json)
    if not as_json:
        sessions = dict.fromkeys(event.session_id for event in events)
        for session_id in [*sessions][:3]:
            terminal.note(f"look at it with: python -m service session {session_id}", "dim")
    if not summary.ok:
        sys.exit(terminal.FOUND_WRONG)


@commands.command("selftest")
@click.option("--to", "addresses", multiple=True, metavar="URL",
              help="A receiver or a balancer; may be repeated. Default: dev's.")  # fmt: skip
@click.option("--secret-file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="The signing secret; default: STRIPE_WEBHOOK_SECRETS, or dev's.")  # fmt: skip
@click.option("--deliver", is_flag=True,
              help="Show the sessions to the handlers; else they settle unseen.")  # fmt: skip
@terminal.json_option
def examine(
    addresses: Sequence[str], secret_file: Path | None, *, deliver: bool, as_json: bool
) -> None:
    """Try every promise on a running deployment; exit 0 only when all that was seen keeps them."""
    settings = Settings.from_environ(local.environment())
    subject = selftest.Subject(
        urls=addresses or (_address(settings.port),),
        secret=_signing_secret(secret_file),
        settings=settings,
        deliver=deliver,
    )

    async def tried() -> list[selftest.Row]:
        if silent := await selftest.silent(subject):
            terminal.fail([f"{scrub(url)}: no answer" for url in silent], terminal.FOUND_WRONG)
        random, since = Random(secrets.randbits(64)), time.time()  # noqa: S311 - invented sessions
        trial = await selftest.examine(subject, random=random, now=since)
        return [*trial.rows, *await traces.rows(settings, trial, since=since)]

    with terminal.bar("trying", total=None):
        rows = asyncio.run(tried())
    terminal.print_rows(
        selftest.Row._fields,
        [tuple(row) for row in rows],
        as_json=as_json,
        prose=("promise", "expected", "seen"),
    )
    if any(row.kept is False for row in rows):
        sys.exit(terminal.FOUND_WRONG)


@commands.command()
@click.argument("session_id", metavar="vs_...")
@terminal.json_option
def session(session_id: str, *, as_json: bool) -> None:
    """Show what the ledger knows of a session: where it stands and every event it remembers."""
    settings = Settings.from_environ(local.environment())
    keys = Keys(settings.redis_prefix, settings.partitions)

    async def look() -> ledger.SessionRecord | None:
        async with connect(settings.redis_url) as connections:
            return await ledger.read(connections, keys, session_id)

    try:
        record = terminal.asking_redis(look)
    except ValueError:
        terminal.fail(["what stands there is no record of ours"], terminal.FOUND_WRONG)
    if record is None:
        terminal.fail(["the ledger has no memory of this session"], terminal.FOUND_WRONG)
    if as_json:
        events = [event._asdict() for event in record.events]
        terminal.print_json(record._asdict() | {"events": events})
        return
    described = {**record._asdict(), "events": len(record.events)}
    terminal.print_rows(("field", "value"), [*described.items()], as_json=False)
    terminal.print_rows(ledger.RememberedEvent._fields, record.events, as_json=False)


@commands.command()
def version() -> None:
    """Print the version."""
    click.echo(__version__)


for mail_command in (mail_commands.dead, mail_commands.replay, mail_commands.handlers):
    commands.add_command(mail_command)


def _run_dev(environ: dict[str, str]) -> None:
    settings = Settings.from_environ(environ)
    made_here = "" not in settings.secrets
    if made_here:
        local.signing_secret()
        environ = environ | {f"{SECRETS}_FILE": str(local.SIGNING_SECRET)}
        settings = Settings.from_environ(environ)
    _log(settings)
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
        "signing secret": local.SIGNING_SECRET.read_text().strip() if made_here else "yours",
        "metrics": f"http://127.0.0.1:{ports.admin}/metrics",
        "type next": f"{Path(sys.executable).name} -m service send verified{elsewhere}",
    }
    for name, text in lines.items():
        terminal.note(f"{name:>15}  {text}")


def _address(port: int | None) -> str:
    return f"http://127.0.0.1:{port}{WEBHOOK_PATH}"


def _settings(*, require_secrets: bool = False) -> Settings:
    """Read the settings and configure logging by them."""
    settings = Settings.from_environ(os.environ, require_secrets=require_secrets)
    _log(settings)
    return settings


def _log(settings: Settings) -> None:
    """Log for as long as this process runs, its faults included."""
    logs.configure(settings.log_level, settings.log_format)
    logs.report_faults()
    # A crash of the interpreter itself leaves no line; where it was goes to standard error.
    faulthandler.enable()


def _signing_secret(path: Path | None) -> Secret[bytes]:
    if path is not None:
        return Secret(path.read_bytes().strip())
    configured = Settings.from_environ(os.environ).secrets.get("")
    if configured:
        return configured[0]
    if local.SIGNING_SECRET.exists():
        return local.signing_secret()
    raise ConfigError(["no signing secret: start dev first, or name --secret-file"])


def _lives(lifecycles: Sequence[str], count: int, random: Random) -> list[SimulatedEvent]:
    began_at = int(time.time()) - LIFE_BEGAN_BEFORE_S
    return [
        event
        for _ in range(count)
        for name in lifecycles
        for event in lifecycle_events(name, random=random, started_at=began_at)
    ]
