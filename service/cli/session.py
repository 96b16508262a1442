"""The command `session`: what happened to one session."""

from __future__ import annotations

from typing import Any

import click

from ..monitoring.session_timeline import Arrival, Timeline, read_timeline
from . import defaults, terminal
from .session_view import render

# Of a transition, what the log may have. Your own data are left out: `dead show` has them.
_SHOWN = (
    *("event_type", "previous", "current", "sequence", "epoch", "reversal", "expected"),
    *("origin", "endpoint", "account", "account_name", "livemode"),
    *("session_type", "last_error_code", "redaction_status", "report_id"),
)


@click.command()
@click.argument("session_id", metavar="vs_...")
@terminal.json_option
def session(session_id: str, *, as_json: bool) -> None:
    """Show the timeline of a session.

    It has every event that is remembered, in the order of arrival, and what became of each change
    at each handler. Times are local; JSON has them in UTC. Of old changes only the arrival is
    known, and that they are settled.
    """

    async def read() -> Timeline | None:
        configured = defaults.read_settings().handlers
        async with defaults.open_deployment() as (connections, keys):
            return await read_timeline(connections, keys, session_id, configured)

    try:
        timeline = terminal.run_async(read)
    except ValueError:
        terminal.fail(["the stored session record cannot be read"], terminal.EXIT_FAILED)
    if timeline is None:
        terminal.fail(["no session record has this id"], terminal.EXIT_FAILED)
    if as_json:
        terminal.print_json(_describe(timeline))
    else:
        terminal.print_view(render(timeline, terminal.program()))


def _describe(timeline: Timeline) -> dict[str, Any]:
    """Return a timeline as builtin types."""
    steps = [
        _describe_arrival(step.arrival)
        | {
            "handlers": [
                outcome._asdict() | {"attempts": [one._asdict() for one in outcome.attempts]}
                for outcome in step.outcomes
            ]
        }
        for step in timeline.steps
    ]
    record = timeline.record._asdict()
    del record["events"]
    return record | {"steps": steps}


def _describe_arrival(arrival: Arrival) -> dict[str, Any]:
    transition = arrival.transition
    shown = {name: getattr(transition, name) for name in _SHOWN} if transition else None
    return arrival._asdict() | {"transition": shown}
