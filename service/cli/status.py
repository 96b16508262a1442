"""The command `status`: what a deployment is doing, once or again and again."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import click
from redis.exceptions import RedisError

from ..config import Settings
from ..errors import ConfigError, Unavailable
from ..monitoring.overview import Overview, collect, misconfigured, unavailable
from ..storage import layout
from ..storage.connections import Connections, connect, display_address
from ..storage.keys import Keys
from ..storage.redis_errors import unavailable_reason
from . import defaults, terminal
from .status_view import render

WATCH_EVERY_S = 2.0

Show = Callable[[Overview], None]


@click.command()
@click.option("--watch", is_flag=True, help="Show it again every two seconds, until Ctrl-C.")
@terminal.json_option
def status(*, watch: bool, as_json: bool) -> None:
    """Show whether all is well, why not, and what the deployment is doing.

    The exit code is 0 unless something fails: then 1, or 3 if Redis does not answer. With --watch
    it is 0. With --watch --json each line is one object.
    """
    settings = defaults.read_settings()
    where = f"{settings.redis_prefix} at {display_address(settings.redis_url)}"

    def show_json(overview: Overview) -> None:
        terminal.print_json(_plain(overview))

    def view_by(show: Callable[[Any], None]) -> Show:
        return lambda overview: show(render(overview, where, has_charts=terminal.draws_charts()))

    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            if as_json:
                asyncio.run(_watch(settings, show_json))
            else:
                with terminal.live_view() as show:
                    asyncio.run(_watch(settings, view_by(show)))
        return
    overview = asyncio.run(_read_once(settings))
    (show_json if as_json else view_by(terminal.print_view))(overview)
    if not overview.is_available:
        sys.exit(terminal.EXIT_UNREACHABLE)
    if overview.verdict == "failing":
        sys.exit(terminal.EXIT_FAILED)


async def _read_once(settings: Settings) -> Overview:
    async with connect(settings.redis_url) as connections:
        return await _read(connections, settings)


async def _watch(settings: Settings, show: Show) -> None:
    """Show the present state every two seconds, whether Redis answers or not."""
    async with connect(settings.redis_url) as connections:
        while True:
            try:
                overview = await _read(connections, settings)
            except ConfigError as error:
                # A Redis that has lost everything is claimed anew by the processes.
                overview = misconfigured(error)
            show(overview)
            await asyncio.sleep(WATCH_EVERY_S)


async def _read(connections: Connections, settings: Settings) -> Overview:
    """Return the present state.

    Raises:
        ConfigError: The deployment there has another layout, or there is none.
    """
    keys = Keys(settings.redis_prefix, settings.partitions)
    try:
        if not await layout.is_claimed(connections, keys):
            raise ConfigError([f"REDIS_PREFIX: nothing was ever stored under {keys.prefix}"])
        return await collect(connections, keys, settings)
    except Unavailable as error:
        return unavailable(error.reason)
    except (RedisError, OSError) as error:
        return unavailable(unavailable_reason(error))


def _plain(found: Any) -> Any:
    """Return a value as JSON has it: named tuples become objects."""
    if hasattr(found, "_asdict"):
        return {
            name: _plain(value) for name, value in found._asdict().items() if name != "watch_report"
        }
    if isinstance(found, Mapping):
        return {name: _plain(value) for name, value in found.items()}
    return [_plain(each) for each in found] if isinstance(found, tuple | list) else found
