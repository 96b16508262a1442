"""The overview: whether all is well, what came in and went out, and the state of each part."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...errors import RejectionReason, UnavailableReason
from ...monitoring.activity import Minute, sum_calls, sum_received
from .. import paths
from ..charts import Chart, Series, draw
from ..page import Page

# Whether the event of a thin one changes anything is known only once it was fetched.
ACCEPTED, WITHOUT_CHANGE, REJECTED, UNAVAILABLE = (
    "admitted or queued",
    "without a change",
    "rejected",
    "answered with 503",
)
_REJECTIONS, _NO_DECISIONS = frozenset(RejectionReason), frozenset(UnavailableReason)
# A failed call is counted again as retried or dead_lettered.
_CALLS = {"delivered": "good", "retried": "warn", "dead_lettered": "bad"}


def routes(page: Page) -> list[Route]:
    """Return the routes of the overview."""

    async def show(request: Request) -> Response:
        overview = await page.overview()
        minutes = overview.activity.minutes
        return page.respond(
            request,
            "overview.html",
            overview=overview,
            received=chart_received(minutes),
            outcomes=dict(sum_received(minutes).most_common()),
            called=chart_calls(minutes),
            calls={
                handler: dict(counts.most_common())
                for handler, counts in sorted(sum_calls(minutes).items())
            },
        )

    return [Route(paths.OVERVIEW, show)]


def chart_received(minutes: Sequence[Minute]) -> Chart:
    """Return the chart of what came in, by what became of it."""
    kinds = {ACCEPTED: "good", WITHOUT_CHANGE: "quiet", REJECTED: "warn", UNAVAILABLE: "bad"}
    counts: dict[str, list[int]] = {name: [0] * len(minutes) for name in kinds}
    for index, minute in enumerate(minutes):
        for outcome, count in minute.received.items():
            counts[_group(outcome)][index] += count
    series = [Series(name, kinds[name], values) for name, values in counts.items()]
    return draw("In: requests on the webhook path", [each.at for each in minutes], series)


def chart_calls(minutes: Sequence[Minute]) -> Chart:
    """Return the chart of the calls of all handlers, by outcome."""
    series = [
        Series(
            outcome.replace("_", "-"),
            kind,
            [sum(each.get(outcome, 0) for each in minute.delivered.values()) for minute in minutes],
        )
        for outcome, kind in _CALLS.items()
    ]
    return draw("Out: calls of handlers", [each.at for each in minutes], series)


def _group(outcome: str) -> str:
    if outcome in {"admitted", "queued"}:
        return ACCEPTED
    if outcome in _REJECTIONS:
        return REJECTED
    return UNAVAILABLE if outcome in _NO_DECISIONS else WITHOUT_CHANGE
