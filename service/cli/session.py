"""The command `session`: what happened to one session."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from ..inbox.session_record import SessionRecord
from ..monitoring.session_timeline import Arrival, HandlerOutcome, Timeline, read_timeline
from ..monitoring.unfetched import Unfetched, find_unfetched
from . import defaults, terminal
from .session_view import render

# Of a transition, what the log may have. Your own data are left out: `dead show` has them.
_SHOWN = (
    *("event_type", "previous", "current", "sequence", "epoch", "reversal", "expected"),
    *("origin", "endpoint", "account", "account_name", "livemode"),
    *("session_type", "last_error_code", "redaction_status", "report_id"),
)
_SHOWN_UNFETCHED = ("event_id", "event_type", "livemode", "context", "endpoint")
_UNKNOWN = (
    "no session record has this id: no event of it was admitted and no thin event of it waits, or "
    "its record has expired; the receivers' log has each event that came, and `backfill` reads "
    "from Stripe what never did"
)


@click.command()
@click.argument("session_id", metavar="vs_...")
@terminal.json_option
def session(session_id: str, *, as_json: bool) -> None:
    """Show the timeline of a session.

    It has every event that is remembered, in the order of arrival, and what became of each change
    at each handler; then the thin events that are not fetched. Times are local; JSON has them in
    UTC. Of old changes only the arrival is known, and that they are settled.
    """

    async def read() -> tuple[tuple[Unfetched, ...], Timeline | None]:
        configured = defaults.read_settings().handlers
        async with defaults.open_deployment() as (connections, keys):
            unfetched = await find_unfetched(connections, keys, session_id)
            return unfetched, await read_timeline(connections, keys, session_id, configured)

    try:
        unfetched, timeline = terminal.run_async(read)
    except ValueError:
        terminal.fail(["the stored session record cannot be read"], terminal.EXIT_FAILED)
    if timeline is None and not unfetched:
        terminal.fail([_UNKNOWN], terminal.EXIT_FAILED)
    if as_json:
        terminal.print_json(_describe(session_id, timeline, unfetched))
    else:
        terminal.print_view(render(session_id, timeline, unfetched, terminal.program()))


def _describe(
    session_id: str, timeline: Timeline | None, unfetched: Sequence[Unfetched]
) -> dict[str, Any]:
    """Return what is known of a session as builtin types; what its record would say may be null."""
    steps = [
        _describe_arrival(step.arrival) | {"handlers": [*map(_describe_outcome, step.outcomes)]}
        for step in (timeline.steps if timeline else ())
    ]
    record = timeline.record._asdict() if timeline else dict.fromkeys(SessionRecord._fields)
    del record["events"]
    waiting = [
        {name: getattr(one.notification, name) for name in _SHOWN_UNFETCHED}
        | {"created_at": one.created_at, "fetch": _describe_outcome(one.outcome)}
        for one in unfetched
    ]
    return record | {"session_id": session_id, "steps": steps, "unfetched": waiting}


def _describe_outcome(outcome: HandlerOutcome) -> dict[str, Any]:
    return outcome._asdict() | {"attempts": [one._asdict() for one in outcome.attempts]}


def _describe_arrival(arrival: Arrival) -> dict[str, Any]:
    transition = arrival.transition
    shown = {name: getattr(transition, name) for name in _SHOWN} if transition else None
    return arrival._asdict() | {"transition": shown}
