"""How commands act on many entries: in chunks, interruptibly, with one log line and one result.

What is found and what is done comes from the command, as two functions. A change is logged and its
result printed even when it was interrupted: what was done by then is done.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import click
import structlog

from ..delivery import dead_letters
from ..delivery.dead_letters import Chunk
from ..runtime import signals
from ..storage.connections import Connections
from ..storage.keys import Keys
from ..telemetry import logs
from . import defaults, terminal

Find = Callable[[Connections, Keys], AsyncIterator[Chunk]]
# Called with entries of one partition.
Act = Callable[[Connections, Keys, Chunk], Awaitable[None]]

log: structlog.stdlib.BoundLogger = structlog.get_logger()


def count(handler: str, find: Find) -> int:
    """Return how many entries *find* yields."""
    found = 0

    async def add(_: Connections, __: Keys, entries: Chunk) -> None:
        nonlocal found
        found += len(entries)

    look(handler, find, add)
    return found


def look(handler: str, find: Find, act: Act) -> None:
    """Call *act*, which changes nothing, for all entries.

    Raises:
        Abort: It was interrupted.
    """
    if not terminal.run_async(lambda: _run_in_chunks(handler, find, act, "counting")):
        raise click.Abort


def change(
    event: str,
    find: Find,
    act: Act,
    result: dict[str, Any],
    *,
    handler: str,
    filters: dict[str, Any],
    as_json: bool,
) -> None:
    """Call *act* for all entries, then log *event* and print *result*, which *act* keeps."""
    is_complete = False
    try:
        is_complete = terminal.run_async(lambda: _run_in_chunks(handler, find, act, "working"))
    finally:
        if is_complete or any(value for value in result.values() if isinstance(value, int)):
            configure_logging()
            given = {name: str(value) for name, value in filters.items() if value is not None}
            log.warning(event, handler=handler, **result, **given)
            logs.flush()
            print_result(result, as_json=as_json)
    if not is_complete:
        terminal.fail(["interrupted: the rest is unchanged"], terminal.EXIT_FAILED)


def configure_logging() -> None:
    """Log to standard error: standard output holds the result."""
    settings = defaults.read_settings()
    logs.configure(
        settings.log_level, settings.log_format, sys.stderr.buffer, colors=defaults.allows_colors()
    )


def print_result(result: dict[str, Any], *, as_json: bool) -> None:
    """Print a result as one row, or as one JSON object."""
    if as_json:
        terminal.print_json(result)
    else:
        terminal.print_rows(tuple(result), [tuple(result.values())], as_json=False)


async def _run_in_chunks(handler: str, find: Find, act: Act, label: str) -> bool:
    """Call *act* for chunks of entries of one partition; return False when interrupted.

    SIGINT and SIGTERM take effect between two chunks.
    """
    stopping = signals.stop_event()
    async with defaults.open_deployment(handler) as (connections, keys):
        with terminal.progress_bar(label, total=None) as (progress, task):

            async def act_on(chunk: Chunk) -> None:
                if chunk:
                    await act(connections, keys, chunk)
                progress.update(task, advance=len(chunk))

            found = find(connections, keys)
            return await dead_letters.run_in_chunks(found, act_on, stopping)
