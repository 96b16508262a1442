"""The command line: the group of all commands, and what an error looks like.

Each command is in a module of its name, but for `dev`, `serve` and `work` in `run`, `dead` in
`dead_letters`, and `handlers` in `handler_groups`. What they do is done in the packages below; here
arguments are parsed and results are printed.
"""

from __future__ import annotations

import os
import sys

import click

from .. import __version__, config
from ..errors import ConfigError, Unavailable
from . import (
    backfill,
    check,
    dead_letters,
    defaults,
    handler_groups,
    replay,
    run,
    selftest,
    send,
    session,
    status,
    terminal,
)


def main() -> None:
    """Run the command line: every error becomes one line for each problem, and an exit code."""
    # A handler may be a file of the current folder, for the console script as for `python -m`.
    if "" not in sys.path and not sys.flags.safe_path:
        sys.path.append("")
    terminal.open_standard_streams()
    terminal.escape_unencodable_output()
    try:
        _run_commands()
    except ConfigError as error:
        terminal.fail(error.problems, terminal.EXIT_MISCONFIGURED)
    except Exception as error:  # noqa: BLE001 - its text may quote the data that it failed on
        terminal.fail([f"failed with {type(error).__name__}"], terminal.EXIT_FAILED)


def _run_commands() -> None:
    try:
        commands()
    except Unavailable as error:
        url = defaults.read_settings().redis_url
        terminal.fail([terminal.describe_unavailable(error.reason, url)], terminal.EXIT_UNREACHABLE)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="%(version)s")
def commands() -> None:
    """Receive Stripe Identity webhooks once, in order and without secrets.

    Settings come from the environment; .env.example lists them all.
    """
    for name, meant in config.find_misspelled(os.environ).items():
        terminal.print_note(f"warning: {name} is no setting, but {meant} is")


@click.command()
def version() -> None:
    """Print the version."""
    click.echo(__version__)


for command in (
    *(run.dev, run.serve, run.work, status.status),
    *(check.check, selftest.selftest, session.session, version),
    *(send.send, backfill.backfill),
    *(dead_letters.dead, replay.replay, handler_groups.handlers),
):
    commands.add_command(command)
