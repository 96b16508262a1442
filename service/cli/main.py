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

from .. import __version__, config
from ..config import SECRETS, Settings
from ..errors import ConfigError, Unavailable
from ..operations import selftest, selftest_redis
from ..operations.check import findings, verdicts
from ..runtime import process
from ..runtime.embedded_redis import EmbeddedServer, find_server
from ..storage.assessment import Finding, Severity
from ..telemetry import logs
from ..telemetry.redaction import scrub
from . import dead_letters, defaults, handler_groups, send, send_target, session, terminal


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
        url = Settings.from_environ(defaults.environment()).redis_url
        terminal.fail([terminal.trouble(error.reason, url)], terminal.UNREACHABLE)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="%(version)s")
def commands() -> None:
    """Receive Stripe Identity webhooks once, in order and without secrets.

    Settings come from the environment; .env.example lists them all.
    """
    for name, meant in config.find_misspelled(os.environ).items():
        terminal.note(f"warning: {name} is no setting, but {meant} is")


@commands.command()
def dev() -> None:
    """Run receiver and worker in one process, on a private Valkey kept in .data/.

    HANDLERS names the handlers (log unless set): your own too, as my_handler:open for the function
    open in my_handler.py of this folder. REDIS_URL names another Redis.
    """
    environ = {"HOST": defaults.LOOPBACK, "DRAIN_S": "0", **os.environ}
    if not defaults.is_address(environ["HOST"]):
        # Some shells, and conda, have a variable of that name for something else.
        terminal.note(f"HOST is not an IP address: dev listens on {defaults.LOOPBACK}")
        environ["HOST"] = defaults.LOOPBACK
    if defaults.names_redis(environ):
        _run_dev(environ)
        return
    with EmbeddedServer.start(find_server(environ), directory=defaults.DIRECTORY) as server:
        defaults.REDIS_URL.write_text(server.url + "\n")
        try:
            _run_dev(environ | {"REDIS_URL": server.url})
        finally:
            defaults.REDIS_URL.unlink(missing_ok=True)


@commands.command()
def serve() -> None:
    """Listen for Stripe: verify, parse, admit."""
    process.run(_settings(require_secrets=True), os.environ, receive=True)


@commands.command()
@click.option("--handlers", "names", metavar="NAMES", help="Only these of HANDLERS, by commas.")
def work(names: str | None) -> None:
    """Hand transitions to the handlers."""
    settings = _settings()
    chosen = settings.handlers if names is None else tuple(names.split(","))
    unknown = sorted(set(chosen) - set(settings.handlers))
    if unknown:
        raise ConfigError([f"--handlers: {name} is not among HANDLERS" for name in unknown])
    process.run(settings, os.environ, receive=False, work=chosen)


@commands.command()
@terminal.json_option
def check(*, as_json: bool) -> None:
    """Check settings, Redis and handlers; exit 0 only when every promise can be kept."""
    environ = defaults.environment()
    settings = Settings.from_environ(environ)
    logs.configure(settings.log_level, settings.log_format, sys.stderr.buffer)
    found = terminal.asking_redis(lambda: findings(settings, environ))
    if as_json:
        terminal.print_json([finding._asdict() for finding in found])
    else:
        rows = [(*one[:2], ", ".join(one.promises), one.meaning) for one in found]
        terminal.print_rows(Finding._fields, rows, as_json=False, prose=("promises", "meaning"))
        columns = ("promise", "severity", "because of")
        terminal.print_rows(columns, verdicts(found), as_json=False, prose=("because of",))
    if any(finding.severity is Severity.FATAL for finding in found):
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
    settings = Settings.from_environ(defaults.environment())
    subject = selftest.Subject(
        urls=addresses or (send_target.default_address(),),
        secret=send_target.signing_secret(secret_file),
        settings=settings,
        deliver=deliver,
    )

    async def tried() -> list[selftest.Row]:
        if silent := await selftest.silent(subject):
            terminal.fail([f"{scrub(url)}: no answer" for url in silent], terminal.FOUND_WRONG)
        random, since = Random(secrets.randbits(64)), time.time()  # noqa: S311 - invented sessions
        trial = await selftest.examine(subject, random=random, now=since)
        return [*trial.rows, *await selftest_redis.rows(settings, trial, since=since)]

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
def version() -> None:
    """Print the version."""
    click.echo(__version__)


for command in (
    *(send.send, session.session),
    *(dead_letters.dead, dead_letters.replay, handler_groups.handlers),
):
    commands.add_command(command)


def _run_dev(environ: dict[str, str]) -> None:
    settings = Settings.from_environ(environ)
    made_here = "" not in settings.secrets
    if made_here:
        defaults.signing_secret()
        environ = environ | {f"{SECRETS}_FILE": str(defaults.SIGNING_SECRET)}
        settings = Settings.from_environ(environ)
    _log(settings)
    try:
        process.run(
            settings,
            environ,
            receive=True,
            work=settings.handlers,
            tracebacks=True,
            started=lambda ports: _print_welcome(ports, made_here=made_here),
        )
    finally:
        defaults.ENDPOINT.unlink(missing_ok=True)


def _print_welcome(ports: process.Ports, *, made_here: bool) -> None:
    endpoint = send_target.address(ports.web)
    is_found = endpoint == send_target.address(Settings().port)
    if defaults.DIRECTORY.exists():
        defaults.ENDPOINT.write_text(endpoint + "\n")
        is_found = True
    elsewhere = "" if is_found else f" --to {endpoint}"
    lines = {
        "endpoint": endpoint,
        "signing secret": defaults.SIGNING_SECRET.read_text().strip() if made_here else "yours",
        "metrics": f"http://127.0.0.1:{ports.admin}/metrics",
        "type next": f"{terminal.invoked()} send verified{elsewhere}",
    }
    for name, text in lines.items():
        terminal.note(f"{name:>15}  {text}")


def _settings(*, require_secrets: bool = False) -> Settings:
    """Read the settings and configure logging by them."""
    settings = Settings.from_environ(os.environ, require_secrets=require_secrets)
    _log(settings)
    return settings


def _log(settings: Settings) -> None:
    """Log for as long as this process runs, its faults included."""
    logs.configure(settings.log_level, settings.log_format)
    logs.log_unhandled_errors()
    # A crash of the interpreter itself leaves no line; where it was goes to standard error.
    faulthandler.enable()
