"""How the overview of a deployment looks in a terminal of 80 columns or more.

The words are those of `monitoring`; here they are only arranged. What is shown consists of names
and numbers of our own processes, and is escaped all the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..findings import Severity
from ..monitoring.activity import Activity, Process, sum_calls, sum_received
from ..monitoring.handler_state import HandlerState
from ..monitoring.overview import Overview
from ..monitoring.reconciliation import Reconciliation
from ..monitoring.verdict import Reason
from ..monitoring.words import counted, duration
from .terminal import SEVERITY_STYLES, escape

BARS = "▁▂▃▄▅▆▇█"
MAX_REVERSALS = 3
_VERDICT_STYLES = {
    "all is well": "bold white on green",
    "attention": "bold black on yellow",
    "failing": "bold white on red",
}
_SEVERITIES = {Severity.FINE: "hint"}


def render(overview: Overview, where: str, *, has_charts: bool) -> RenderableType:
    """Return the overview as something that rich prints.

    Args:
        overview: The state of the deployment.
        where: Which deployment it is.
        has_charts: Whether to draw the last hour; a program that reads a table has no use for it.
    """
    parts: list[RenderableType] = [_headline(overview, where)]
    if overview.reasons:
        parts.append(_reasons(overview.reasons))
    if overview.is_available:
        activity = overview.activity
        parts.append(_titled("processes", _processes(activity.processes, overview.at)))
        parts.append(_titled("last hour", _last_hour(activity, overview.at, has_charts=has_charts)))
        parts.append(_titled("handlers", _handlers(overview.handlers)))
        parts.append(_titled("Stripe", _stripe(overview)))
    return Group(*parts)


def _headline(overview: Overview, where: str) -> Text:
    return Text.assemble(
        (f" {overview.verdict} ", _VERDICT_STYLES[overview.verdict]),
        (f"  {escape(where)}, {overview.at:%Y-%m-%d %H:%M:%S} UTC", "dim"),
    )


def _grid(*columns: str) -> Table:
    """Return a table without lines, in which only the columns called `fold` are folded."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for column in columns:
        justify = "right" if column == "number" else "left"
        table.add_column(no_wrap=column != "fold", overflow="fold", justify=justify)  # type: ignore[arg-type]
    return table


def _titled(title: str, body: RenderableType) -> RenderableType:
    return Group(Text(f"\n{title}", "bold"), Padding(body, (0, 0, 0, 2)))


def _reasons(reasons: Sequence[Reason]) -> RenderableType:
    table = _grid("severity", "fold")
    for one in reasons:
        word = _SEVERITIES.get(one.severity, one.severity.value)
        said = Text.assemble((escape(one.subject), "bold"), f": {escape(one.meaning)}")
        if one.help:
            said.append(f"\n-> {escape(one.help)}", "dim")
        table.add_row(Text(word, SEVERITY_STYLES[one.severity]), said)
    return Padding(table, (1, 0, 0, 2))


def _processes(processes: Sequence[Process], at: datetime) -> RenderableType:
    if not processes:
        return Text("none", "dim")
    table = _grid("kind", "name", "fold")
    for one in processes:
        state = (escape(one.ready), "red") if one.ready else ("ready", "green")
        if not one.is_alive:
            state = (f"silent for {duration(one.seen_s)}", "red")
        # The clocks of two machines may differ.
        age = f"up {duration(max(0.0, (at - one.started_at).total_seconds()))}"
        rest = ", ".join(["", age, escape(one.version), *map(escape, one.works)])
        table.add_row(Text(escape(one.kind)), Text(escape(one.name)), Text.assemble(state, rest))
    return table


def _last_hour(activity: Activity, at: datetime, *, has_charts: bool) -> RenderableType:
    minutes = activity.minutes
    calls = sum_calls(minutes)
    received = [sum(minute.received.values()) for minute in minutes]
    delivered = [
        sum(counts.get("delivered", 0) for counts in minute.delivered.values())
        for minute in minutes
    ]
    table = _grid("direction", "fold")
    for direction, numbers, counts in (
        ("in", received, sum_received(minutes)),
        ("out", delivered, _by_handler(calls, "delivered")),
    ):
        # The present minute is not over.
        latest = f"last minute {numbers[-2]:,}; in all " if numbers else ""
        if has_charts:
            table.add_row(direction, Text(sparkline(numbers), "cyan"))
        name = "" if has_charts else direction
        table.add_row(name, Text.assemble(latest, _positive_counts(counts) or ("nothing", "dim")))
    if failures := _positive_counts(_by_handler(calls, "failed")):
        table.add_row("", Text.assemble(("failed ", "yellow"), failures))
    table.add_row("", _last_event(activity, at))
    return table


def _by_handler(calls: Mapping[str, Counter[str]], outcome: str) -> Counter[str]:
    return Counter({handler: counts[outcome] for handler, counts in calls.items()})


def _positive_counts(counts: Counter[str]) -> Text:
    """Return each name that was counted, with its count, the greatest first."""
    texts = [f"{name} {count:,}" for name, count in counts.most_common() if count > 0]
    return Text(escape(", ".join(texts)))


def sparkline(numbers: Sequence[int]) -> str:
    """Return a chart of one line, in which the greatest number has the highest bar."""
    top = max(numbers, default=0)
    return "".join(
        BARS[-(-number * (len(BARS) - 1) // top)] if number else BARS[0] for number in numbers
    )


def _last_event(activity: Activity, at: datetime) -> Text:
    last = activity.last_event_at
    if last is None:
        return Text("no genuine event within 7 days")
    return Text(f"last genuine event {_ago(at, last)}")


def _ago(at: datetime, then: datetime) -> str:
    return f"{duration(max(0.0, (at - then).total_seconds()))} ago"


def _handlers(handlers: Sequence[HandlerState]) -> RenderableType:
    if not handlers:
        return Text("none: no worker has begun to deliver", "dim")
    table = _grid("fold", *["number"] * 7)
    heads = ("", "waiting", "oldest", "retried", "dead", "circuit", "workers", "leases")
    table.add_row(*(Text(head, "dim") for head in heads))
    for one in handlers:
        waiting = "?" if one.lag is None else f"{one.lag + one.replays:,}"
        held = sum(owner is not None for owner in one.leases)
        table.add_row(
            Text(escape(one.name)),
            waiting,
            duration(one.oldest_s) if one.oldest_s else "-",
            _number(one.failing, "yellow"),
            _number(one.dead_letters, "yellow"),
            Text("open", "red") if one.is_circuit_open else "closed",
            str(one.workers) if one.workers else Text("0", "red"),
            f"{held}/{len(one.leases)}",
        )
    return table


def _number(number: int, style: str) -> Text:
    return Text(f"{number:,}", style if number else "")


def _stripe(overview: Overview) -> RenderableType:
    return Group(
        Text(escape("; ".join(_reconciler(overview.reconciliation)))),
        *(Text(escape(line)) for line in _reversals(overview)),
    )


def _reconciler(found: Reconciliation | None) -> Iterator[str]:
    if found is None:
        yield "reconciler: none; without STRIPE_API_KEY, what Stripe does not send is missed"
        return
    yield f"reconciler: {counted(found.recovered, 'event')} recovered within 7 days"
    for one in found.accounts:
        behind = "not read yet" if one.lag_s is None else f"read up to {duration(one.lag_s)} ago"
        yield f"{one.name} {behind}" + (f" ({one.failure})" if one.failure else "")


def _reversals(overview: Overview) -> Iterator[str]:
    number = sum(day.reversals for day in overview.activity.days)
    yield (
        f"reversals: {counted(number, 'session')} within 7 days"
        if number
        else ("reversals: none within 7 days")
    )
    for one in overview.activity.reversals[:MAX_REVERSALS]:
        change = f"{one.previous} to {one.current}"
        yield f"  {one.session_id} {change}, {_ago(overview.at, one.at)}"
