"""The commands about the handlers' consumer groups: `handlers list`, `handlers retire`."""

from __future__ import annotations

import click
import structlog

from ..delivery import consumer_groups
from ..errors import ConfigError
from ..parsers import FETCH
from . import bulk, defaults, terminal

log: structlog.stdlib.BoundLogger = structlog.get_logger()


@click.group()
def handlers() -> None:
    """List or delete the handlers' consumer groups."""


@handlers.command("list")
@terminal.json_option
def list_groups(*, as_json: bool) -> None:
    """List every group, with its lag, replays and dead letters."""

    async def read() -> list[tuple[object, ...]]:
        async with defaults.open_deployment() as (connections, keys):
            return [(*group,) for group in await consumer_groups.list_groups(connections, keys)]

    rows = terminal.run_async(read)
    terminal.print_rows(consumer_groups.Group._fields, rows, as_json=as_json)


@handlers.command()
@click.argument("handler")
@click.option("--yes", is_flag=True, help="Do not ask.")
def retire(handler: str, *, yes: bool) -> None:
    """Delete the group of a removed HANDLER.

    Its replays and dead letters are deleted too, and with fetch the notifications that wait.
    """
    settings = defaults.read_settings()
    if handler in settings.all_handlers:
        named_by = "STRIPE_API_KEY is set" if handler == FETCH else f"{handler} is among HANDLERS"
        raise ConfigError([f"{named_by}: change that first"])

    # Two calls, so that no connection stays open while the operator decides.
    async def has_worker() -> bool:
        async with defaults.open_deployment(handler) as (connections, keys):
            [workers] = await consumer_groups.count_workers(
                connections, keys, [handler], lease_ttl_s=settings.lease_ttl_s
            )
            return workers > 0

    async def delete() -> int:
        async with defaults.open_deployment(handler) as (connections, keys):
            return await consumer_groups.retire(connections, keys, handler)

    if terminal.run_async(has_worker):
        terminal.fail(["a worker still works for it: stop it first"], terminal.EXIT_FAILED)
    if not yes:
        kept = "notifications" if handler == FETCH else "group"
        click.confirm(
            f"Delete the {kept}, replays and dead letters of {handler}?", abort=True, err=True
        )
    partitions = terminal.run_async(delete)
    bulk.configure_logging()
    log.warning("handler.retired", handler=handler, partitions=partitions)
