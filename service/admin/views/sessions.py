"""Sessions: the search, and one session's timeline."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from ...monitoring.session_search import MAX_TEXT, Found, search
from ...monitoring.session_timeline import Timeline, read_timeline
from ...stripe.events import SESSION_ID
from ...transitions.transition import StatusTransition
from .. import paths
from ..forms import read_form
from ..page import Page, PageError

# More than any session has by itself: a page takes 0.1 ms of CPU for each.
MAX_STEPS = 200
_DASHBOARD = "https://dashboard.stripe.com"


def routes(page: Page) -> list[Route]:
    """Return the routes of the search and of one session."""

    async def show_search(request: Request) -> Response:
        return await _respond_search(page, request)

    async def find(request: Request) -> Response:
        form = await read_form(request)
        text = form.get("text", "").strip()
        if SESSION_ID.fullmatch(text):
            return RedirectResponse(paths.to(paths.SESSION, session_id=text), 303)
        try:
            async with page.searching():
                found = await search(page.connections, page.keys, text, form.get("cursor", ""))
        except ValueError:
            problem = f"Type 1 to {MAX_TEXT} printable characters."
            return await _respond_search(page, request, problem=problem)
        # An event belongs to one session, a reference may belong to many.
        is_whole = found.goes_on_at is None or text.startswith("evt_")
        if len(found.session_ids) == 1 and is_whole:
            return RedirectResponse(paths.to(paths.SESSION, session_id=found.session_ids[0]), 303)
        return await _respond_search(page, request, text=text, found=found)

    async def show(request: Request) -> Response:
        timeline = await _read(page, request.path_params["session_id"])
        return page.respond(request, "session.html", timeline=timeline, **_describe(timeline))

    return [
        Route(paths.SESSIONS, show_search),
        Route(paths.SESSIONS, find, methods=["POST"]),
        Route(paths.SESSION, show),
    ]


async def _respond_search(
    page: Page, request: Request, *, text: str = "", problem: str = "", found: Found | None = None
) -> Response:
    return page.respond(
        request,
        "sessions.html",
        status=400 if problem else 200,
        text=text,
        problem=problem,
        found=found,
        reversals=(await page.overview()).activity.reversals,
    )


async def _read(page: Page, session_id: str) -> Timeline:
    """Return the timeline of the session in a URL.

    Raises:
        PageError: It is no session id, or there is no record that can be read.
    """
    if not SESSION_ID.fullmatch(session_id):
        raise PageError(404, "This is no session id", "A session id is vs_… of letters and digits.")
    try:
        async with page.searching():
            timeline = await read_timeline(
                page.connections, page.keys, session_id, page.settings.handlers
            )
    except ValueError:
        raise PageError(404, "The record of this session cannot be read") from None
    if timeline is None:
        raise PageError(
            404,
            "No session has this id",
            "No event of it was admitted, or its record has expired.",
        )
    return timeline


def _describe(timeline: Timeline) -> dict[str, Any]:
    """Return what the page says besides the timeline itself."""
    known = [step.arrival.transition for step in timeline.steps if step.arrival.transition]
    latest = max(known, key=lambda one: (one.epoch, one.sequence), default=None)
    record = timeline.record
    return {
        "steps": timeline.steps[-MAX_STEPS:],
        "latest": latest,
        "dashboard": dashboard_address(record.session_id, latest),
        "epoch": datetime.fromtimestamp(record.epoch / 1000, UTC),
        "created": datetime.fromtimestamp(record.latest_created, UTC),
    }


def dashboard_address(session_id: str, latest: StatusTransition | None) -> str:
    """Return where Stripe's Dashboard shows a session."""
    account = f"/{latest.account}" if latest and latest.account else ""
    mode = "/test" if latest and latest.livemode is False else ""
    return f"{_DASHBOARD}{account}{mode}/identity/verification-sessions/{session_id}"
