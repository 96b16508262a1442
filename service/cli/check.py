"""The command `check`: what of settings, Redis and handlers keeps a promise from being kept."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from ..config import Settings
from ..findings import RANKS, Finding, Severity
from ..operations.check import collect_findings, worst_by_promise
from ..telemetry import logs
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
