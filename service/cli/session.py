"""The command that shows one session: where it stands, and every event that is remembered of it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from ..config import DAY_S
from ..inbox import session_record
from ..inbox.session_record import SessionRecord
from ..stripe.events import EVENT_TYPE_PREFIX
from . import deployment, terminal

_COLUMNS = ("event_id", "created", "type", "outcome", "sequence", "from", "to")


@click.command()
@click.argument("session_id", metavar="vs_...")
@terminal.json_option
def session(session_id: str, *, as_json: bool) -> None:
    """Show what the ledger knows of a session: where it stands and every event it remembers.

    Times are UTC. Types and changes are those of transitions that the streams still hold.
    """

    async def look() -> tuple[SessionRecord | None, session_record.Changes]:
        async with deployment.opened() as (connections, keys):
            record = await session_record.read(connections, keys, session_id)
            return record, await session_record.changes(connections, keys, record) if record else {}

    try:
        record, changes = terminal.asking_redis(look)
    except ValueError:
        terminal.fail(["what stands there is no record of ours"], terminal.FOUND_WRONG)
    if record is None:
        terminal.fail(["the ledger has no memory of this session"], terminal.FOUND_WRONG)
    if as_json:
        events = [_event(event, changes) for event in record.events]
        terminal.print_json(record._asdict() | {"events": events})
        return
    terminal.print_rows(("field", "value"), _fields(record), as_json=False)
    click.echo()
    rows = [_row(_event(event, changes)) for event in record.events]
    terminal.print_rows(_COLUMNS, rows, as_json=False)


def _event(event: session_record.KnownEvent, changes: session_record.Changes) -> dict[str, Any]:
    """Return an event as builtin types, with what its transition says."""
    change = changes.get(event.event_id)
    return event._asdict() | {
        "event_type": change.event_type if change else None,
        "previous": change.previous if change else None,
        "current": change.current if change else None,
    }


def _row(event: dict[str, Any]) -> tuple[object, ...]:
    return (
        event["event_id"],
        _time(event["created"]),
        (event["event_type"] or "").removeprefix(EVENT_TYPE_PREFIX),
        event["outcome"],
        event["sequence"],
        event["previous"],
        event["current"],
    )


def _fields(record: SessionRecord) -> list[tuple[object, ...]]:
    described = record._asdict() | {
        "epoch": f"{record.epoch} ({_time(record.epoch / 1000)})",
        "latest_created": _time(record.latest_created),
        "expires_in_s": f"{record.expires_in_s} ({record.expires_in_s // DAY_S} days)",
        "events": len(record.events),
    }
    return [*described.items()]


def _time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
