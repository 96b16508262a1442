"""The commands that look at an installation: `check`, `selftest`, and `version`."""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import click

from .. import __version__
from ..config import Settings
from ..findings import RANKS, Finding, Severity
from ..operations.check import collect_findings, worst_by_promise
from ..operations.selftest import Row, Selftest
from ..operations.selftest_redis import inspect_redis
from ..telemetry import logs
from ..telemetry.redaction import scrub
from . import defaults, terminal


@click.command()
@terminal.json_option
def check(*, as_json: bool) -> None:
    """Check settings, Redis and handlers.

    The exit code is 0 only if every promise can be kept.
    """
    environ = defaults.environment()
    settings = Settings.from_environ(environ)
    logs.configure(
        settings.log_level, settings.log_format, sys.stderr.buffer, colors=defaults.allows_colors()
    )
    findings = terminal.run_async(lambda: collect_findings(settings, environ))
    if as_json:
        terminal.print_json([finding._asdict() for finding in findings])
    else:
        _print_findings(findings)
    if any(finding.severity is Severity.FATAL for finding in findings):
        sys.exit(terminal.EXIT_FAILED)


def _print_findings(findings: Sequence[Finding]) -> None:
    """Print two tables, what has to be done first: all findings, and what they mean together."""
    rows = [(one.severity, one.name, one.meaning) for one in findings]
    worst = [(severity, promise, names) for promise, severity, names in worst_by_promise(findings)]
    for found in (rows, worst):
        found.sort(key=lambda row: -RANKS[row[0]])
    terminal.print_rows(("severity", "finding", "meaning"), rows, as_json=False, prose=("meaning",))
    click.echo()
    columns = ("severity", "promise", "because of")
    terminal.print_rows(columns, worst, as_json=False, prose=("because of",))


@click.command()
@click.option("--to", "addresses", multiple=True, metavar="URL",
              help="A receiver or a balancer; may be repeated. Default: dev's.")  # fmt: skip
@click.option("--secret-file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="The signing secret; default: STRIPE_WEBHOOK_SECRETS, or dev's.")  # fmt: skip
@click.option("--deliver", is_flag=True,
              help="Call the handlers for the sessions; by default they are skipped.")  # fmt: skip
@terminal.json_option
def selftest(
    addresses: Sequence[str], secret_file: Path | None, *, deliver: bool, as_json: bool
) -> None:
    """Try every promise on a running deployment.

    The exit code is 0 only if none is seen broken.
    """
    run = Selftest(
        urls=addresses or (defaults.find_endpoint(),),
        secret=defaults.find_signing_secret(secret_file),
        settings=defaults.read_settings(),
        deliver=deliver,
        random=Random(secrets.randbits(64)),  # noqa: S311 - synthetic sessions
        now=int(time.time()),
    )

    async def try_promises() -> list[Row]:
        if silent := await run.find_silent():
            terminal.fail([f"{scrub(url)}: no answer" for url in silent], terminal.EXIT_FAILED)
        rows, sent = await run.run()
        return [*rows, *await inspect_redis(run.settings, sent, since=run.now)]

    with terminal.progress_bar("trying", total=None):
        rows = asyncio.run(try_promises())
    terminal.print_rows(Row._fields, rows, as_json=as_json, prose=("promise", "expected", "seen"))
    if any(row.kept is False for row in rows):
        sys.exit(terminal.EXIT_FAILED)


@click.command()
def version() -> None:
    """Print the version."""
    click.echo(__version__)
