"""The page of handlers."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .. import paths
from ..page import Page


def routes(page: Page) -> list[Route]:
    """Return the routes of the page of handlers."""

    async def show(request: Request) -> Response:
        return page.respond(request, "handlers.html")

    return [Route(paths.HANDLERS, show)]
