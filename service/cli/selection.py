"""The options by which commands select entries of streams: since when, of which session or type."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import click

from ..stripe.events import EVENT_TYPE_PREFIX
from ..transitions.lifecycle import TYPE_RANKS

Command = TypeVar("Command", bound=Callable[..., Any])

_AGO = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


class Since(click.ParamType[datetime]):
    """A time: `90m` or `3d` ago, or ISO 8601, which is UTC unless it has an offset."""

    name = "when"

    def convert(self, value: Any, param: Any, ctx: Any) -> datetime:
        """Return the time that *value* means."""
        if isinstance(value, datetime):
            return value
        try:
            if ago := _AGO.fullmatch(value):
                return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
            found = datetime.fromisoformat(value)
        except (ValueError, OverflowError):
            self.fail("expected a time like 2026-01-31T12:00, or 90m, 12h, 3d ago", param, ctx)
        return found if found.tzinfo else found.replace(tzinfo=UTC)


class EventType(click.ParamType[str]):
    """An event type of Stripe Identity: the whole name, or its last word."""

    name = "type"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Return the whole name of the type that *value* means."""
        whole = EVENT_TYPE_PREFIX + str(value).removeprefix(EVENT_TYPE_PREFIX)
        if whole not in TYPE_RANKS:
            words = ", ".join(each.removeprefix(EVENT_TYPE_PREFIX) for each in TYPE_RANKS)
            self.fail(f"expected one of {words}", param, ctx)
        return whole


def filters(command: Command) -> Command:
    """Add the options that every selection has to *command*."""
    for option in (
        click.option("--since", type=Since(), help="Only from then on: 90m, 3d, or ISO 8601."),
        click.option("--session", "session_id", metavar="vs_...", help="Only of this session."),
    ):
        command = option(command)
    return command


by_type = click.option("--type", "event_type", type=EventType(),
                       help="Only of this event type: verified, or its whole name.")  # fmt: skip
by_reason = click.option("--reason", metavar="WORD", help="Only those with this reason.")
everything = click.option("--all", "everything", is_flag=True, help="All that the options cover.")
yes = click.option("--yes", is_flag=True, help="Do not ask.")
dry_run = click.option("--dry-run", is_flag=True, help="Print how many are meant; change nothing.")


def require_any(ids: Sequence[str], filters: dict[str, Any], *, everything: bool) -> None:
    """Refuse a command that would act on all entries without `--all`."""
    if not (ids or everything or any(value is not None for value in filters.values())):
        raise click.UsageError("name what is wanted, or give --all")
