"""The commands that look at a deployment: `check`, `selftest`, `session`, and `version`."""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import click

from .. import __version__
from ..config import DAY_S, Settings
from ..inbox import session_record
from ..inbox.session_record import SessionRecord
from ..operations.check import collect_findings, worst_by_promise
from ..operations.selftest import Row, Selftest
from ..operations.selftest_redis import inspect_redis
from ..storage.assessment import RANKS, Finding, Severity
from ..stripe.events import EVENT_TYPE_PREFIX
from ..telemetry import logs
from ..telemetry.redaction import scrub
from . import defaults, terminal

_EVENT_COLUMNS = ("event_id", "created", "type", "outcome", "sequence", "from", "to")


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
@click.argument("session_id", metavar="vs_...")
@terminal.json_option
def session(session_id: str, *, as_json: bool) -> None:
    """Show the record of a session.

    It has the session's status and every event that is remembered. Times are UTC. Types and
    changes are those of transitions that the streams still hold.
    """

    async def read() -> tuple[SessionRecord | None, session_record.Transitions]:
        async with defaults.open_deployment() as (connections, keys):
            record = await session_record.read(connections, keys, session_id)
            return record, await session_record.find_transitions(
                connections, keys, record
            ) if record else {}

    try:
        record, changes = terminal.run_async(read)
    except ValueError:
        terminal.fail(["the stored session record cannot be read"], terminal.EXIT_FAILED)
    if record is None:
        terminal.fail(["no session record has this id"], terminal.EXIT_FAILED)
    events = [_describe_event(event, changes) for event in record.events]
    if as_json:
        terminal.print_json(record._asdict() | {"events": events})
        return
    terminal.print_rows(("field", "value"), _describe_record(record), as_json=False)
    click.echo()
    rows = [
        (
            event["event_id"],
            _format_time(event["created"]),
            (event["event_type"] or "").removeprefix(EVENT_TYPE_PREFIX),
            *(event[name] for name in ("outcome", "sequence", "previous", "current")),
        )
        for event in events
    ]
    terminal.print_rows(_EVENT_COLUMNS, rows, as_json=False)


@click.command()
def version() -> None:
    """Print the version."""
    click.echo(__version__)


def _describe_event(
    event: session_record.KnownEvent, changes: session_record.Transitions
) -> dict[str, Any]:
    """Return an event as builtin types, with the type and change that its transition has."""
    change = changes.get(event.event_id)
    return event._asdict() | {
        "event_type": change.event_type if change else None,
        "previous": change.previous if change else None,
        "current": change.current if change else None,
    }


def _describe_record(record: SessionRecord) -> list[tuple[object, ...]]:
    described = record._asdict() | {
        "epoch": f"{record.epoch} ({_format_time(record.epoch / 1000)})",
        "latest_created": _format_time(record.latest_created),
        "expires_in_s": f"{record.expires_in_s} ({record.expires_in_s // DAY_S} days)",
        "events": len(record.events),
    }
    return [*described.items()]


def _format_time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
