"""The commands about mail: dead letters, replays, and the handlers' groups.

Finding, copying and deleting are done in `replays` and `janitor`; here they are said and shown.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import click

from . import janitor, layout, local, replays, signals, terminal
from .config import Settings
from .connections import Connections, connect
from .errors import ConfigError
from .layout import Keys
from .replays import Entry, Wanted

Command = TypeVar("Command", bound=Callable[..., Any])

MOST_PER_CALL = 100
_AGO = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_COLUMNS = ("id", "at", "session_id", "event_id", "current", "reason", "error", "attempts")


class Since(click.ParamType[datetime]):
    """A time: `90m`, `3d` (so long ago), or ISO 8601, in UTC where it does not say."""

    name = "when"

    def convert(self, value: Any, param: Any, ctx: Any) -> datetime:
        """Return the time *value* means."""
        if isinstance(value, datetime):
            return value
        try:
            if ago := _AGO.fullmatch(value):
                return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
            found = datetime.fromisoformat(value)
        except (ValueError, OverflowError):
            self.fail("expected a time like 2026-01-31T12:00, or 90m, 12h, 3d ago", param, ctx)
        return found if found.tzinfo else found.replace(tzinfo=UTC)


def _filters(command: Command) -> Command:
    """Give *command* the options that say which entries are meant."""
    for option in (
        click.option("--since", type=Since(), help="Only from then on: 90m, 3d, or ISO 8601."),
        click.option("--session", "session_id", metavar="vs_...", help="Only of this session."),
    ):
        command = option(command)
    return command


_reason = click.option("--reason", metavar="WORD", help="Only those buried for this reason.")
_every = click.option("--all", "everything", is_flag=True, help="All that the options cover.")


@click.group()
def dead() -> None:
    """List, show, replay or drop what handlers refused or gave up."""


@dead.command("list")
@click.argument("handler")
@_filters
@_reason
@terminal.json_option
def list_letters(
    handler: str,
    *,
    session_id: str | None,
    since: datetime | None,
    reason: str | None,
    as_json: bool,
) -> None:
    """List a HANDLER's dead letters."""
    wanted = Wanted(session_id=session_id, reason=reason, since=since)

    async def collect() -> list[tuple[object, ...]]:
        async with _opened() as (connections, keys):
            return [_row(e) async for e in replays.letters(connections, keys, handler, wanted)]

    terminal.print_rows(_COLUMNS, terminal.asking_redis(collect), as_json=as_json)


@dead.command()
@click.argument("handler")
@click.argument("letter", metavar="ID")
@terminal.json_option
def show(handler: str, letter: str, *, as_json: bool) -> None:
    """Show one dead letter of a HANDLER, with the whole transition."""

    async def look() -> Entry | None:
        async with _opened() as (connections, keys):
            found = replays.letters(connections, keys, handler, Wanted())
            return await anext((e async for e in found if e.id == letter), None)

    entry = terminal.asking_redis(look)
    if entry is None:
        terminal.fail(["no such dead letter"], terminal.FOUND_WRONG)
    described = replays.described(entry)
    if as_json:
        terminal.print_json(described)
    else:
        terminal.print_rows(("field", "value"), [*described.items()], as_json=False)


@dead.command("replay")
@click.argument("handler")
@click.argument("letters", nargs=-1, metavar="[ID...]")
@_filters
@_reason
@_every
@terminal.json_option
def replay_letters(
    handler: str,
    letters: Sequence[str],
    *,
    session_id: str | None,
    since: datetime | None,
    reason: str | None,
    everything: bool,
    as_json: bool,
) -> None:
    """Hand dead letters to their HANDLER again, through its running worker.

    May be interrupted and called again: what has been handed over is no dead letter any more.
    """
    _is_configured(handler)
    wanted = Wanted(session_id=session_id, reason=reason, since=since)
    _something_is_named(letters, wanted, everything=everything)
    name = _name()

    async def work() -> int:
        async with _opened() as (connections, keys):
            found = _among(replays.letters(connections, keys, handler, wanted), letters)

            async def hand_over(entries: Sequence[Entry]) -> int:
                done = await replays.replay(connections, keys, handler, entries, name=name)
                return done.put

            return await _in_chunks(found, hand_over, "replaying")

    replayed = terminal.asking_redis(work)
    _print_outcome({"replay": name, "replayed": replayed}, as_json=as_json)
    _all_were_there(letters, replayed)


@dead.command()
@click.argument("handler")
@click.argument("letters", nargs=-1, metavar="[ID...]")
@_filters
@_reason
@_every
@click.confirmation_option("--yes", prompt="Delete dead letters for good?", help="Do not ask.")
@terminal.json_option
def drop(
    handler: str,
    letters: Sequence[str],
    *,
    session_id: str | None,
    since: datetime | None,
    reason: str | None,
    everything: bool,
    as_json: bool,
) -> None:
    """Delete dead letters of a HANDLER for good."""
    wanted = Wanted(session_id=session_id, reason=reason, since=since)
    _something_is_named(letters, wanted, everything=everything)

    async def work() -> int:
        async with _opened() as (connections, keys):
            found = _among(replays.letters(connections, keys, handler, wanted), letters)

            async def delete(entries: Sequence[Entry]) -> int:
                return await replays.drop(connections, keys, handler, entries)

            return await _in_chunks(found, delete, "dropping")

    dropped = terminal.asking_redis(work)
    _print_outcome({"dropped": dropped}, as_json=as_json)
    _all_were_there(letters, dropped)


@click.command()
@click.argument("handler")
@_filters
@click.option("--type", "event_type", metavar="TYPE", help="Only of this event type, whole.")
@_every
@terminal.json_option
def replay(
    handler: str,
    *,
    session_id: str | None,
    since: datetime | None,
    event_type: str | None,
    everything: bool,
    as_json: bool,
) -> None:
    """Hand a HANDLER the past: what the streams still hold, marked as a replay.

    What the handler has not settled yet is left out: it comes anyway.
    """
    _is_configured(handler)
    wanted = Wanted(session_id=session_id, event_type=event_type, since=since)
    _something_is_named((), wanted, everything=everything)
    name, left_out = _name(), 0

    async def work() -> int:
        async with _opened() as (connections, keys):

            async def hand_over(entries: Sequence[Entry]) -> int:
                nonlocal left_out
                done = await replays.replay(connections, keys, handler, entries, name=name)
                left_out += done.left_out
                return done.put

            found = replays.past(connections, keys, wanted)
            return await _in_chunks(found, hand_over, "replaying")

    outcome = {"replay": name, "replayed": terminal.asking_redis(work), "left_out": left_out}
    _print_outcome(outcome, as_json=as_json)


@click.group()
def handlers() -> None:
    """List the handlers' groups, or retire one that is no more."""


@handlers.command("list")
@terminal.json_option
def list_groups(*, as_json: bool) -> None:
    """List every group there is, with what it has not settled and its dead letters."""

    async def look() -> list[tuple[object, ...]]:
        async with _opened() as (connections, keys):
            return [(*group,) for group in await janitor.groups(connections, keys)]

    rows = terminal.asking_redis(look)
    terminal.print_rows(janitor.Group._fields, rows, as_json=as_json)


@handlers.command()
@click.argument("handler")
@click.confirmation_option(
    "--yes", prompt="Forget its place, replays and dead letters?", help="Do not ask."
)
def retire(handler: str) -> None:
    """Forget a HANDLER that is no longer configured, and all that waits for it."""
    settings = Settings.from_environ(local.environment())
    if handler in settings.handlers:
        raise ConfigError([f"{handler} is among HANDLERS: take it out there first"])

    async def work() -> int:
        async with _opened() as (connections, keys):
            if await janitor.works(connections, keys, handler, lease_ttl_s=settings.lease_ttl_s):
                terminal.fail(["a worker still works for it: stop it first"], terminal.FOUND_WRONG)
            return await janitor.retire(connections, keys, handler)

    if not terminal.asking_redis(work):
        terminal.fail(["there is no such group"], terminal.FOUND_WRONG)


async def _in_chunks(
    found: AsyncIterator[Entry], act: Callable[[Sequence[Entry]], Any], what: str
) -> int:
    """Let *act* have the entries in chunks of one partition each; return how many it counted.

    SIGINT and SIGTERM are heeded between two chunks: canceling a call to Redis would leave it open
    whether it was executed, and may get lost in the client.

    Raises:
        Abort: Told to stop before the end.
    """
    done = 0
    chunk: list[Entry] = []
    stopping = signals.stopping()
    with terminal.bar(what, total=None) as (progress, bar):

        async def flush() -> None:
            nonlocal done
            if chunk:
                done += await act(chunk)
                progress.update(bar, description=f"{what}: {done}")
                chunk.clear()
            if stopping.is_set():
                raise click.Abort

        async for entry in found:
            if len(chunk) == MOST_PER_CALL or (chunk and chunk[0].partition != entry.partition):
                await flush()
            chunk.append(entry)
        await flush()
    return done


async def _among(found: AsyncIterator[Entry], ids: Sequence[str]) -> AsyncIterator[Entry]:
    async for entry in found:
        if not ids or entry.id in ids:
            yield entry


def _is_configured(handler: str) -> None:
    if handler not in Settings.from_environ(local.environment()).handlers:
        raise ConfigError([f"{handler} is not among HANDLERS: nobody would take the replay"])


def _all_were_there(ids: Sequence[str], done: int) -> None:
    if done < (named := len({*ids})):
        terminal.fail([f"{named - done} of the named could not be found"], terminal.FOUND_WRONG)


def _something_is_named(ids: Sequence[str], wanted: Wanted, *, everything: bool) -> None:
    if not (ids or everything or any(wanted)):
        raise click.UsageError("name ids, or what is wanted by options, or --all")


def _name() -> str:
    """Return a name for a replay: when it began, and a little chance."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"


def _row(entry: Entry) -> tuple[object, ...]:
    described = replays.described(entry)
    return tuple(described.get(column) for column in _COLUMNS)


def _print_outcome(outcome: dict[str, object], *, as_json: bool) -> None:
    if as_json:
        terminal.print_json(outcome)
    else:
        terminal.print_rows(tuple(outcome), [tuple(outcome.values())], as_json=False)


@asynccontextmanager
async def _opened() -> AsyncIterator[tuple[Connections, Keys]]:
    """Yield clients and keys by the settings."""
    settings = Settings.from_environ(local.environment())
    keys = Keys(settings.redis_prefix, settings.partitions)
    async with connect(settings.redis_url) as connections:
        # With another number of partitions some mail would never be seen.
        await layout.exists(connections, keys)
        yield connections, keys
