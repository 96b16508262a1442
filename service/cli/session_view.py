"""How the timeline of a session looks in a terminal of 80 columns or more.

What is shown may hold text from requests, and is escaped. No id is cut: each is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.styled import Styled
from rich.table import Table
from rich.text import Text

from ..monitoring.finished_attempts import Attempt
from ..monitoring.session_timeline import Arrival, HandlerOutcome, State, Step, Timeline
from ..monitoring.unfetched import Unfetched
from ..monitoring.words import counted, duration
from ..stripe.events import EVENT_TYPE_PREFIX
from ..transitions.transition import StatusTransition
from .terminal import escape

# From which on it is said how old an event was when it arrived: Stripe sent it again.
LONG_DELAY_S = 60
_STATUS_STYLES = {
    "requires_input": "yellow",
    "processing": "cyan",
    "verified": "green",
    "canceled": "magenta",
    "redacted": "blue",
}
_STATE_STYLES = {
    State.WAITING: "cyan",
    State.CIRCUIT_OPEN: "yellow",
    State.IN_PROGRESS: "cyan",
    State.RETRYING: "yellow",
    State.DELIVERED: "green",
    State.DEAD_LETTER: "bold red",
    State.SETTLED: "dim",
    State.UNKNOWN: "dim",
}
_MEANINGS = {
    State.CIRCUIT_OPEN: "it waits: a destination of the handler cannot be reached",
    State.SETTLED: "acknowledged, or older than the handler; no more is kept",
    State.UNKNOWN: "no worker has created its group",
}
_ORIGINS = {"thin": "thin event", "events_api": "Stripe's list of events"}
_CHANGED_NOTHING = {
    "late": "late: an older event, it changed nothing",
    "unchanged": "unchanged: it said nothing new",
}


def render(
    session_id: str, timeline: Timeline | None, unfetched: Sequence[Unfetched], program: str
) -> RenderableType:
    """Return what is known of a session as something that rich prints.

    Args:
        session_id: `vs_…`.
        timeline: Its timeline; None if it has no record.
        unfetched: Its thin events that are not fetched.
        program: What to type to call this program again.
    """
    parts: list[RenderableType] = []
    if timeline:
        parts += _timeline(timeline, program)
    else:
        parts.append(Text.assemble((escape(session_id), "bold"), "  no session record"))
    if unfetched:
        parts.append(
            Text("\nThin events that are not fetched: what they say may not be known", "bold")
        )
    parts += [_unfetched(one, program) for one in unfetched]
    return Group(*parts)


def _timeline(timeline: Timeline, program: str) -> Iterator[RenderableType]:
    yield _header(timeline)
    day = None
    for step in timeline.steps:
        at = step.arrival.arrived_at.astimezone()
        if at.date() != day:
            day = at.date()
            yield Text(f"\n{at:%A, %Y-%m-%d (times: UTC%z)}", "bold")
        yield _step(step, timeline.record.epoch, program)
    if not timeline.steps:
        yield Text("\nno event of this session is remembered", "dim")


def _header(timeline: Timeline) -> RenderableType:
    record = timeline.record
    latest = datetime.fromtimestamp(record.latest_created, UTC)
    epoch = datetime.fromtimestamp(record.epoch / 1000, UTC)
    facts = [
        *_mode_and_account(timeline.latest),
        f"{counted(record.sequence, 'transition')} in the epoch of {_moment(epoch)}",
        f"latest event created {_moment(latest)}",
    ]
    if record.duplicates:
        facts.append(f"{counted(record.duplicates, 'duplicate')} answered")
    if record.expires_in_s >= 0:
        expires_at = datetime.now(UTC) + timedelta(seconds=record.expires_in_s)
        left = duration(record.expires_in_s)
        facts.append(f"forgotten {_moment(expires_at)}, in {left}, if no further event comes")
    before = _change(record.previous, record.status)
    return Group(
        Text.assemble((escape(record.session_id), "bold"), "  ", before),
        *(Padding(Text(fact, "dim"), (0, 0, 0, 2)) for fact in facts),
    )


def _mode_and_account(latest: StatusTransition | None) -> Iterator[str]:
    """Yield that a session is of test mode or of a connected account, if it is."""
    if latest and latest.livemode is False:
        yield "test mode"
    if latest and latest.account:
        yield escape(f"account {latest.account}")


def _step(step: Step, epoch: int, program: str) -> RenderableType:
    """Return an arrival and what became of it; *epoch* is the session's present one."""
    arrival, transition = step.arrival, step.arrival.transition
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(_clock(arrival.arrived_at), _headline(arrival, epoch))
    table.add_row("", _cause(arrival, transition))
    if step.outcomes:
        table.add_row("", _outcomes(step.outcomes, program))
    return Styled(table, "" if arrival.outcome == "admitted" else "dim")


def _unfetched(one: Unfetched, program: str) -> RenderableType:
    """Return a thin event and how far it is, one below the other."""
    event = one.notification
    kind = event.event_type.removeprefix(EVENT_TYPE_PREFIX)
    mode = "" if event.livemode else "test mode, "
    words = f"  {kind}, {mode}created {_moment(one.created_at)}"
    headline = Text.assemble(escape(event.event_id), (escape(words), "dim"))
    return Group(headline, Padding(_outcomes([one.outcome], program), (0, 0, 0, 2)))


def _outcomes(outcomes: Sequence[HandlerOutcome], program: str) -> RenderableType:
    handlers = Table.grid(padding=(0, 2, 0, 0))
    handlers.add_column(no_wrap=True)
    handlers.add_column(overflow="fold")
    for outcome in outcomes:
        handlers.add_row(Text(escape(outcome.handler)), _outcome(outcome, program))
    return handlers


def _headline(arrival: Arrival, epoch: int) -> Text:
    if arrival.outcome != "admitted":
        return Text(_CHANGED_NOTHING[arrival.outcome])
    number = f"#{arrival.sequence} "
    if arrival.transition is None:
        reason = "the stream no longer holds" if arrival.is_looked_up else "was not looked up"
        return Text.assemble(number, (f"a change that {reason}", "dim"))
    line = Text.assemble(number, _change(arrival.transition.previous, arrival.transition.current))
    if arrival.transition.reversal:
        line.append("  reversal", "bold red")
    elif not arrival.transition.expected:
        line.append("  unexpected step", "yellow")
    if arrival.transition.epoch != epoch:
        line.append("  earlier epoch", "dim")
    return line


def _cause(arrival: Arrival, transition: StatusTransition | None) -> Text:
    """Return which event it was, how it came, and when it was created."""
    words = []
    if transition:
        words.append(transition.event_type.removeprefix(EVENT_TYPE_PREFIX))
        words.append(_ORIGINS.get(transition.origin, transition.origin))
        words += [transition.last_error_code] if transition.last_error_code else []
    delay_s = (arrival.arrived_at - arrival.created_at).total_seconds()
    if transition is None:
        words.append(f"created {_moment(arrival.created_at)}")
    elif delay_s >= LONG_DELAY_S:
        words.append(f"{duration(delay_s)} old")
    return Text.assemble(escape(arrival.event_id), (escape("  " + ", ".join(words)), "dim"))


def _outcome(outcome: HandlerOutcome, program: str) -> RenderableType:
    line = Text.assemble((outcome.state.value, _STATE_STYLES[outcome.state]))
    last = outcome.attempts[-1] if outcome.attempts else None
    if outcome.dead_letter_id:
        line.append(f" {outcome.dead_letter_id}", "bold")
    if last and outcome.state is State.DELIVERED:
        line.append(f" {_clock(last.at)}")
    if meaning := _MEANINGS.get(outcome.state):
        line.append(f" ({meaning})", "dim")
    if outcome.failed:
        line.append(f", {counted(outcome.failed, 'attempt')} failed")
    lines: list[RenderableType] = [line, *_earlier(outcome)]
    if outcome.dead_letter_id:
        name = escape(outcome.handler)
        lines.append(Text(f"-> {program} dead show {name} {outcome.dead_letter_id}", "cyan"))
    return Group(*lines)


def _earlier(outcome: HandlerOutcome) -> Iterator[Text]:
    """Yield a line for the last failure, and for what each earlier delivery ended with."""
    failures = [one for one in outcome.attempts if one.outcome != "delivered"]
    for one in outcome.attempts:
        has_ended = one.outcome != "failed" and one is not outcome.attempts[-1]
        if has_ended or (failures and one is failures[-1]):
            yield _describe_attempt(one)


def _describe_attempt(attempt: Attempt) -> Text:
    words = attempt.outcome.replace("_", "-")
    replay = " (replay)" if attempt.is_replay else ""
    line = Text(f"{words}{replay} {_clock(attempt.at)}", "dim")
    if attempt.error:
        line.append(f" {escape(attempt.error)}")
    if attempt.place:
        line.append(f" in {escape(attempt.place)}")
    return line


def _change(previous: str | None, current: str) -> Text:
    change = Text()
    if previous is not None:
        change.append(escape(previous), _STATUS_STYLES.get(previous, ""))
        change.append(" ")
    change.append("→ ", "dim")
    change.append(escape(current), _STATUS_STYLES.get(current, ""))
    return change


def _clock(at: datetime) -> str:
    return at.astimezone().time().isoformat("milliseconds")


def _moment(at: datetime) -> str:
    return f"{at.astimezone():%Y-%m-%d %H:%M:%S}"
