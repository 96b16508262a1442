"""The commands about mail: dead letters, and replays of the past.

Finding, copying and deleting are done in `replays`; here they are said and shown. What changes
anything is validated first, then asked about, and leaves one log line on standard error.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import click
import structlog

from ..config import Settings
from ..delivery import consumer_groups, dead_letters
from ..delivery.dead_letters import Entry, Wanted
from ..errors import ConfigError
from ..runtime import signals
from ..storage.connections import Connections
from ..storage.layout import Keys
from ..telemetry import logs
from . import dead_letter_options as options
from . import defaults, deployment, terminal

Find = Callable[[Connections, Keys], AsyncIterator[Entry]]
Act = Callable[[Connections, Keys, Sequence[Entry]], Awaitable[None]]

MAX_PER_CALL = 100
_COLUMNS = ("id", "at", "session_id", "event_id", "current", "reason", "error", "attempts")

log: structlog.stdlib.BoundLogger = structlog.get_logger()


@click.group()
def dead() -> None:
    """List, show, replay or drop what handlers refused or gave up."""


@dead.command("list")
@click.argument("handler")
@options.filters
@options.reason
@terminal.json_option
def list_letters(handler: str, *, as_json: bool, **wanted: Any) -> None:
    """List a HANDLER's dead letters."""

    async def collect() -> list[tuple[object, ...]]:
        async with deployment.opened(handler) as (connections, keys):
            found = dead_letters.letters(connections, keys, handler, Wanted(**wanted))
            return [_row(entry) async for entry in found]

    terminal.print_rows(_COLUMNS, terminal.asking_redis(collect), as_json=as_json)


@dead.command()
@click.argument("handler")
@click.argument("letter", metavar="ID")
@terminal.json_option
def show(handler: str, letter: str, *, as_json: bool) -> None:
    """Show one dead letter of a HANDLER, with the whole transition."""

    async def look() -> Entry | None:
        async with deployment.opened(handler) as (connections, keys):
            found = dead_letters.letters(connections, keys, handler, Wanted())
            return await anext((e async for e in found if e.id == letter), None)

    entry = terminal.asking_redis(look)
    if entry is None:
        terminal.fail(["no such dead letter"], terminal.FOUND_WRONG)
    described = dead_letters.described(entry)
    if as_json:
        terminal.print_json(described)
    else:
        terminal.print_rows(("field", "value"), [*described.items()], as_json=False)


@dead.command("replay")
@click.argument("handler")
@click.argument("letters", nargs=-1, metavar="[ID...]")
@options.filters
@options.reason
@options.everything
@options.dry_run
@terminal.json_option
def replay_letters(
    handler: str,
    letters: Sequence[str],
    *,
    everything: bool,
    dry_run: bool,
    as_json: bool,
    **wanted: Any,
) -> None:
    """Hand dead letters to their HANDLER again, through its running worker.

    May be interrupted and called again: what has been handed over is no dead letter any more.
    """
    _something_is_named(letters, wanted, everything=everything)
    deployment.is_configured(handler)
    find = _letters(handler, letters, wanted)
    if dry_run:
        _print_outcome({"would_replay": _count(handler, find)}, as_json=as_json)
        return
    outcome: dict[str, Any] = {"replay": _name(), "replayed": 0}

    async def hand_over(connections: Connections, keys: Keys, entries: Sequence[Entry]) -> None:
        name = outcome["replay"]
        done = await dead_letters.replay(connections, keys, handler, entries, name=name)
        outcome["replayed"] += done.put

    _change(
        "dead_letters.replayed",
        find,
        hand_over,
        outcome,
        handler=handler,
        wanted=wanted,
        as_json=as_json,
    )
    _all_were_there(letters, outcome["replayed"])


@dead.command()
@click.argument("handler")
@click.argument("letters", nargs=-1, metavar="[ID...]")
@options.filters
@options.reason
@options.everything
@options.dry_run
@options.yes
@terminal.json_option
def drop(
    handler: str,
    letters: Sequence[str],
    *,
    everything: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    **wanted: Any,
) -> None:
    """Delete dead letters of a HANDLER for good."""
    _something_is_named(letters, wanted, everything=everything)
    find = _letters(handler, letters, wanted)
    count = 0 if yes and not dry_run else _count(handler, find)
    if dry_run:
        _print_outcome({"would_drop": count}, as_json=as_json)
        return
    if count:
        click.confirm(f"Delete {count} dead letters of {handler} for good?", abort=True, err=True)
    outcome: dict[str, Any] = {"dropped": 0}

    async def delete(connections: Connections, keys: Keys, entries: Sequence[Entry]) -> None:
        outcome["dropped"] += await dead_letters.drop(connections, keys, handler, entries)

    _change(
        "dead_letters.dropped",
        find,
        delete,
        outcome,
        handler=handler,
        wanted=wanted,
        as_json=as_json,
    )
    _all_were_there(letters, outcome["dropped"])


@click.command()
@click.argument("handler")
@options.filters
@click.option("--type", "event_type", type=options.EventType(),
              help="Only of this event type: verified, or its whole name.")  # fmt: skip
@options.everything
@options.dry_run
@options.yes
@terminal.json_option
def replay(
    handler: str,
    *,
    everything: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    **wanted: Any,
) -> None:
    """Hand a HANDLER the past: what the streams still hold, marked as a replay.

    What the handler has not settled yet is left out: it comes anyway. Interrupted, it begins again
    when it is called again.
    """
    _something_is_named((), wanted, everything=everything)
    deployment.is_configured(handler)
    name = _name()

    async def find(connections: Connections, keys: Keys) -> AsyncIterator[Entry]:
        if handler not in await consumer_groups.group_names(connections, keys):
            raise ConfigError([f"{handler} has no group yet: start its worker first"])
        async for entry in dead_letters.past(connections, keys, Wanted(**wanted)):
            yield entry

    def counting(outcome: dict[str, Any], *, dry_run: bool) -> Act:
        async def act(connections: Connections, keys: Keys, entries: Sequence[Entry]) -> None:
            done = await dead_letters.replay(
                connections, keys, handler, entries, name=name, dry_run=dry_run
            )
            outcome["left_out"] += done.left_out
            outcome["would_replay" if dry_run else "replayed"] += done.put

        return act

    planned: dict[str, Any] = {"would_replay": 0, "left_out": 0}
    if dry_run or not yes:
        _look(handler, find, counting(planned, dry_run=True))
        if dry_run or not planned["would_replay"]:
            _print_outcome(planned, as_json=as_json)
            return
        count = planned["would_replay"]
        click.confirm(f"Hand {handler} {count} transitions again?", abort=True, err=True)
    outcome = {"replay": name, "replayed": 0, "left_out": 0}
    act = counting(outcome, dry_run=False)
    _change("replay.made", find, act, outcome, handler=handler, wanted=wanted, as_json=as_json)


def _letters(handler: str, ids: Sequence[str], wanted: dict[str, Any]) -> Find:
    async def find(connections: Connections, keys: Keys) -> AsyncIterator[Entry]:
        async for entry in dead_letters.letters(connections, keys, handler, Wanted(**wanted)):
            if not ids or entry.id in ids:
                yield entry

    return find


def _count(handler: str, find: Find) -> int:
    """Return how many entries are meant."""
    count = 0

    async def note(_: Connections, __: Keys, entries: Sequence[Entry]) -> None:
        nonlocal count
        count += len(entries)

    _look(handler, find, note)
    return count


def _look(handler: str, find: Find, act: Act) -> None:
    """Let *act*, which changes nothing, have all entries."""
    if not terminal.asking_redis(lambda: _in_chunks(handler, find, act, "counting")):
        raise click.Abort


def _change(
    event: str,
    find: Find,
    act: Act,
    outcome: dict[str, Any],
    *,
    handler: str,
    wanted: dict[str, Any],
    as_json: bool,
) -> None:
    """Let *act* have all entries; log and print the *outcome* that it keeps, even if cut off."""
    has_ended = False
    try:
        has_ended = terminal.asking_redis(lambda: _in_chunks(handler, find, act, "working"))
    finally:
        if has_ended or any(value for value in outcome.values() if isinstance(value, int)):
            settings = Settings.from_environ(defaults.environment())
            logs.configure(settings.log_level, settings.log_format, sys.stderr.buffer)
            named = {name: str(value) for name, value in wanted.items() if value is not None}
            log.warning(event, handler=handler, **outcome, **named)
            logs.flush()
            _print_outcome(outcome, as_json=as_json)
    if not has_ended:
        terminal.fail(["interrupted: so much was done"], terminal.FOUND_WRONG)


async def _in_chunks(handler: str, find: Find, act: Act, what: str) -> bool:
    """Let *act* have the entries in chunks of one partition each; say whether it has had all.

    SIGINT and SIGTERM are heeded between two chunks: canceling a call to Redis would leave it open
    whether it was executed, and may get lost in the client.
    """
    stopping = signals.stopping()
    chunk: list[Entry] = []
    async with deployment.opened(handler) as (connections, keys):
        with terminal.bar(what, total=None) as (progress, bar):
            async for entry in find(connections, keys):
                if len(chunk) == MAX_PER_CALL or (chunk and chunk[0].partition != entry.partition):
                    await act(connections, keys, chunk)
                    progress.update(bar, advance=len(chunk))
                    chunk = []
                if stopping.is_set():
                    return False
                chunk.append(entry)
            if chunk:
                await act(connections, keys, chunk)
    return True


def _all_were_there(ids: Sequence[str], done: int) -> None:
    if done < (named := len({*ids})):
        terminal.fail([f"{named - done} of the named could not be found"], terminal.FOUND_WRONG)


def _something_is_named(ids: Sequence[str], wanted: dict[str, Any], *, everything: bool) -> None:
    if not (ids or everything or any(value is not None for value in wanted.values())):
        raise click.UsageError("name ids, or what is wanted by options, or --all")


def _name() -> str:
    """Return a name for a replay: when it began, and a little chance."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"


def _row(entry: Entry) -> tuple[object, ...]:
    described = dead_letters.described(entry)
    return tuple(described.get(column) for column in _COLUMNS)


def _print_outcome(outcome: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        terminal.print_json(outcome)
    else:
        terminal.print_rows(tuple(outcome), [tuple(outcome.values())], as_json=False)
