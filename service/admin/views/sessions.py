"""Sessions: the search."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .. import paths
from ..page import Page


def routes(page: Page) -> list[Route]:
    """Return the route of the search."""

    async def show(request: Request) -> Response:
        overview = await page.overview()
        return page.respond(
            request,
            "sessions.html",
            text="",
            problem="",
            found=None,
            reversals=overview.reversals,
        )

    return [Route(paths.SESSIONS, show)]
