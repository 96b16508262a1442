"""The commands about dead letters: `dead list`, `dead show`, `dead replay`, `dead drop`.

How dead letters are read, replayed and deleted is in `delivery`. A command that deletes asks first.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import click

from ..delivery import dead_letters
from ..delivery.dead_letters import Chunk, Entry, EntryFilter
from ..parsers import FETCH
from ..storage.connections import Connections
from ..storage.keys import Keys
from . import bulk, defaults, selection, terminal


@click.group()
def dead() -> None:
    """List, show, replay or drop dead letters."""


@dead.command("list")
@click.argument("handler")
@selection.filters
@selection.by_reason
@terminal.json_option
def list_letters(handler: str, *, as_json: bool, **filters: Any) -> None:
    """List a HANDLER's dead letters."""

    async def read() -> list[tuple[object, ...]]:
        async with defaults.open_deployment(handler) as (connections, keys):
            return [
                _row(entry, _columns(handler))
                async for entry in dead_letters.read_dead_letters(
                    connections, keys, handler, EntryFilter(**filters)
                )
            ]

    terminal.print_rows(_columns(handler), terminal.run_async(read), as_json=as_json)


@dead.command()
@click.argument("handler")
@click.argument("letter", metavar="ID")
@terminal.json_option
def show(handler: str, letter: str, *, as_json: bool) -> None:
    """Show one dead letter of a HANDLER, with all that it holds."""

    async def read() -> Entry | None:
        async with defaults.open_deployment(handler) as (connections, keys):
            return await dead_letters.find_one(connections, keys, handler, letter)

    entry = terminal.run_async(read)
    if entry is None:
        terminal.fail(["no such dead letter"], terminal.EXIT_FAILED)
    described = dead_letters.describe(entry)
    if as_json:
        terminal.print_json(described)
    else:
        terminal.print_rows(("field", "value"), [*described.items()], as_json=False)


@dead.command("replay")
@click.argument("handler")
@click.argument("letters", nargs=-1, metavar="[ID...]")
@selection.filters
@selection.by_reason
@selection.everything
@selection.dry_run
@terminal.json_option
def replay_letters(
    handler: str,
    letters: Sequence[str],
    *,
    everything: bool,
    dry_run: bool,
    as_json: bool,
    **filters: Any,
) -> None:
    """Deliver dead letters to their HANDLER again.

    Its running worker does so. The command can be interrupted and called again: what has been
    replayed is no dead letter any more.
    """
    selection.require_any(letters, filters, everything=everything)
    defaults.require_configured(handler)
    find = _finder(handler, letters, filters)
    if dry_run:
        bulk.print_result({"would_replay": bulk.count(handler, find)}, as_json=as_json)
        return
    name = dead_letters.new_name()
    result: dict[str, Any] = {"replay": name, "replayed": 0}

    async def act(connections: Connections, keys: Keys, entries: Sequence[Entry]) -> None:
        done = await dead_letters.replay(connections, keys, handler, entries, name=name)
        result["replayed"] += done.replayed

    bulk.change(
        "dead_letters.replayed",
        find,
        act,
        result,
        handler=handler,
        filters=filters,
        as_json=as_json,
    )
    _require_all_found(letters, result["replayed"])


@dead.command()
@click.argument("handler")
@click.argument("letters", nargs=-1, metavar="[ID...]")
@selection.filters
@selection.by_reason
@selection.everything
@selection.dry_run
@selection.yes
@terminal.json_option
def drop(
    handler: str,
    letters: Sequence[str],
    *,
    everything: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    **filters: Any,
) -> None:
    """Delete dead letters of a HANDLER for good."""
    selection.require_any(letters, filters, everything=everything)
    find = _finder(handler, letters, filters)
    # Counting reads all entries, so it is done only where the number is shown.
    count = 0 if yes and not dry_run else bulk.count(handler, find)
    if dry_run:
        bulk.print_result({"would_drop": count}, as_json=as_json)
        return
    if count:
        click.confirm(f"Delete {count} dead letters of {handler} for good?", abort=True, err=True)
    result: dict[str, Any] = {"dropped": 0}

    async def act(connections: Connections, keys: Keys, entries: Sequence[Entry]) -> None:
        result["dropped"] += await dead_letters.drop(connections, keys, handler, entries)

    bulk.change(
        "dead_letters.dropped",
        find,
        act,
        result,
        handler=handler,
        filters=filters,
        as_json=as_json,
    )
    _require_all_found(letters, result["dropped"])


def _finder(handler: str, ids: Sequence[str], filters: dict[str, Any]) -> bulk.Find:
    """Return what yields a handler's dead letters: those named by id, or all that are covered."""

    def find(connections: Connections, keys: Keys) -> AsyncIterator[Chunk]:
        return dead_letters.letter_chunks(connections, keys, handler, EntryFilter(**filters), ids)

    return find


def _require_all_found(ids: Sequence[str], done: int) -> None:
    if done < (named := len({*ids})):
        terminal.fail([f"{named - done} of the named could not be found"], terminal.EXIT_FAILED)


def _columns(handler: str) -> tuple[str, ...]:
    """Return what is listed of a dead letter; a notification has no status, but a type."""
    changed = "event_type" if handler == FETCH else "current"
    return ("id", "at", "session_id", "event_id", changed, "reason", "error", "attempts")


def _row(entry: Entry, columns: tuple[str, ...]) -> tuple[object, ...]:
    described = dead_letters.describe(entry)
    return tuple(described.get(column) for column in columns)
