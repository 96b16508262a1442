"""The command that admits what is unknown of the events that Stripe still lists."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import click
import structlog

from ..config import Settings
from ..errors import ConfigError
from ..parsers import CONNECTED_ACCOUNT
from ..runtime import signals
from ..storage.connections import connect
from ..storage.keys import Keys
from ..storage.layout import claim, is_claimed
from ..stripe_api.backfill import Backfill, find_callers, select_types
from ..stripe_api.client import StripeApi, open_api
from ..stripe_api.cursors import account_field
from ..stripe_api.keys import ApiKeys
from ..stripe_api.rate_limit import RateLimiter
from ..stripe_api.window_admission import WindowAdmission
from ..telemetry import logs
from . import bulk, defaults, selection, terminal

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Account(click.ParamType[str]):
    """The id of a connected account."""

    name = "account"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Return the id."""
        try:
            return CONNECTED_ACCOUNT.parse(value)
        except ValueError:
            self.fail(f"expected {CONNECTED_ACCOUNT.expected}", param, ctx)


@click.command()
@click.option("--since", required=True, type=selection.Since(),
              help="Events from then on: 90m, 3d, or ISO 8601. Stripe lists 30 days.")  # fmt: skip
@click.option("--until", type=selection.Since(), help="Events until then; default: now.")
@click.option("--account", type=Account(), metavar="acct_...",
              help="Only this connected account; default: yours and STRIPE_ACCOUNTS.")  # fmt: skip
@selection.dry_run
@terminal.json_option
def backfill(
    since: datetime, until: datetime | None, account: str | None, *, dry_run: bool, as_json: bool
) -> None:
    """Read the events that Stripe lists, and admit those that are unknown.

    It may run beside everything else, and again. When interrupted, it prints how to go on.
    """
    settings = defaults.read_settings()
    first, last = int(since.timestamp()), int(until.timestamp() if until else time.time())
    if first > last:
        raise click.UsageError("--since is later than --until")
    keys = ApiKeys(settings.stripe_api_key)
    callers = find_callers(settings, keys, account)
    if not callers:
        raise ConfigError(["STRIPE_API_KEY: backfill needs a key of a mode that LIVEMODE accepts"])
    bulk.configure_logging()
    begun: list[Backfill] = []

    async def run() -> None:
        async with _open(settings, keys, is_dry_run=dry_run) as (api, admission):
            types = await select_types(api, callers)
            work = Backfill(api, admission, types, first=first, last=last, is_dry_run=dry_run)
            begun.append(work)
            seconds = (last - first + 1) * len(callers)
            with terminal.progress_bar("reading", total=seconds) as (progress, task):
                await work.run(signals.stop_event(), lambda read: progress.advance(task, read))

    try:
        terminal.run_async(run)
    finally:
        for work in begun:
            _report(work, as_json=as_json)
            if not work.is_complete:
                options = f"--since {_format(work.next_second)} --until {_format(last)}"
                options += f" --account {account}" if account else ""
                options += " --dry-run" if dry_run else ""
                terminal.print_note(f"go on with: {terminal.program()} backfill {options}")
    for work in begun:
        if not work.is_complete:
            failed = [f"{account_field(who)}: {why}" for who, why in work.failures.items()]
            terminal.fail(failed or ["interrupted"], terminal.EXIT_FAILED)


@asynccontextmanager
async def _open(
    settings: Settings, api_keys: ApiKeys, *, is_dry_run: bool
) -> AsyncIterator[tuple[StripeApi, WindowAdmission]]:
    keys = Keys(settings.redis_prefix, settings.partitions)
    async with connect(settings.redis_url) as connections:
        if is_dry_run:
            await is_claimed(connections, keys)
        else:
            # Unlike other commands it may be the first process that ever stores anything there.
            await claim(connections, keys)
        limiter = RateLimiter(connections, keys, settings.stripe_api_rate)
        async with open_api(settings.stripe_api_base, api_keys, limiter) as api:
            yield api, WindowAdmission(connections, keys, settings)


def _report(work: Backfill, *, as_json: bool) -> None:
    """Print what became of the events, and log it unless that was a dry run."""
    if not work.is_dry_run:
        log.warning("backfill.ended", **work.counts)
        logs.flush()
    terminal.print_rows(("outcome", "events"), sorted(work.counts.items()), as_json=as_json)


def _format(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"
