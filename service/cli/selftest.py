"""The command `selftest`: it tries every promise on a running deployment."""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import click

from ..operations.selftest import Row, Selftest
from ..operations.selftest_redis import inspect_redis
from ..telemetry.redaction import scrub
from . import defaults, terminal


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
