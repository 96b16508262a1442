"""Sessions: the search, and one session's timeline."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from ...monitoring.session_search import MAX_TEXT, Found, search
from ...monitoring.session_timeline import Timeline, read_timeline
from ...monitoring.unfetched import Unfetched, find_unfetched
from ...stripe.events import SESSION_ID
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
        session_id = request.path_params["session_id"]
        timeline, unfetched = await _read(page, session_id)
        return page.respond(
            request,
            "session.html",
            session_id=session_id,
            unfetched=unfetched,
            **_describe(session_id, timeline, unfetched),
        )

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


async def _read(page: Page, session_id: str) -> tuple[Timeline | None, tuple[Unfetched, ...]]:
    """Return the timeline of the session in a URL, and its thin events that are not fetched.

    Raises:
        PageError: It is no session id, its record cannot be read, or there is neither.
    """
    if not SESSION_ID.fullmatch(session_id):
        raise PageError(404, "This is no session id", "A session id is vs_… of letters and digits.")
    try:
        async with page.searching():
            unfetched = await find_unfetched(page.connections, page.keys, session_id)
            timeline = await read_timeline(
                page.connections, page.keys, session_id, page.settings.handlers
            )
    except ValueError:
        raise PageError(404, "The record of this session cannot be read") from None
    if timeline is None and not unfetched:
        raise PageError(
            404,
            "No session has this id",
            "No event of it was admitted and no thin event of it waits, or its record has expired. "
            "The receivers' log has each event that came; the command backfill reads from Stripe "
            "what never did.",
        )
    return timeline, unfetched


def _describe(
    session_id: str, timeline: Timeline | None, unfetched: Sequence[Unfetched]
) -> dict[str, Any]:
    """Return what the page says of a timeline, or of a session without one."""
    steps = timeline.steps if timeline else ()
    latest = timeline.latest if timeline else None
    # A session is of one mode.
    modes = {one.notification.livemode for one in unfetched}
    is_test = False in modes or (latest is not None and latest.livemode is False)
    account = latest.account if latest else None
    said: dict[str, Any] = {
        "record": timeline and timeline.record,
        "steps": steps[-MAX_STEPS:],
        "arrivals": len(steps),
        "latest": latest,
        "is_test": is_test,
        "dashboard": dashboard_address(session_id, account, is_test=is_test),
    }
    if timeline:
        said["epoch"] = datetime.fromtimestamp(timeline.record.epoch / 1000, UTC)
        said["created"] = datetime.fromtimestamp(timeline.record.latest_created, UTC)
    return said


def dashboard_address(session_id: str, account: str | None, *, is_test: bool) -> str:
    """Return where Stripe's Dashboard shows a session."""
    place = f"/{account}" if account else ""
    mode = "/test" if is_test else ""
    return f"{_DASHBOARD}{place}{mode}/identity/verification-sessions/{session_id}"
