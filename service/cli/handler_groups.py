"""The commands about handlers' groups: which there are, and forgetting one that is no more."""

from __future__ import annotations

import sys

import click
import structlog

from ..config import Settings
from ..delivery import consumer_groups
from ..errors import ConfigError
from ..telemetry import logs
from . import defaults, deployment, terminal

log: structlog.stdlib.BoundLogger = structlog.get_logger()


@click.group()
def handlers() -> None:
    """List the handlers' groups, or retire one that is no more."""


@handlers.command("list")
@terminal.json_option
def list_groups(*, as_json: bool) -> None:
    """List every group there is, with what it has not settled and its dead letters."""

    async def look() -> list[tuple[object, ...]]:
        async with deployment.opened() as (connections, keys):
            return [(*group,) for group in await consumer_groups.list_groups(connections, keys)]

    rows = terminal.asking_redis(look)
    terminal.print_rows(consumer_groups.Group._fields, rows, as_json=as_json)


@handlers.command()
@click.argument("handler")
@click.option("--yes", is_flag=True, help="Do not ask.")
def retire(handler: str, *, yes: bool) -> None:
    """Forget a HANDLER that is no longer configured, and all that waits for it."""
    settings = Settings.from_environ(defaults.environment())
    if handler in settings.handlers:
        raise ConfigError([f"{handler} is among HANDLERS: take it out there first"])

    async def works() -> bool:
        async with deployment.opened(handler) as (connections, keys):
            return await consumer_groups.is_worked(
                connections, keys, handler, lease_ttl_s=settings.lease_ttl_s
            )

    async def forget() -> int:
        async with deployment.opened(handler) as (connections, keys):
            return await consumer_groups.retire(connections, keys, handler)

    if terminal.asking_redis(works):
        terminal.fail(["a worker still works for it: stop it first"], terminal.FOUND_WRONG)
    if not yes:
        click.confirm(
            f"Forget the place, replays and dead letters of {handler}?", abort=True, err=True
        )
    partitions = terminal.asking_redis(forget)
    logs.configure(settings.log_level, settings.log_format, sys.stderr.buffer)
    log.warning("handler.retired", handler=handler, partitions=partitions)
