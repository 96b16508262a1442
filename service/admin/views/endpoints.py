"""Endpoints: ours with their signing secrets, and what Stripe is set up to send here."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...config import WEBHOOK_PATH
from .. import paths
from ..page import Page


def routes(page: Page) -> list[Route]:
    """Return the route of the endpoints."""

    async def show(request: Request) -> Response:
        endpoints = {
            f"{WEBHOOK_PATH}/{name}" if name else WEBHOOK_PATH: secrets
            for name, secrets in sorted(page.loaded_secrets().items())
        }
        overview = await page.overview()
        return page.respond(request, "endpoints.html", endpoints=endpoints, overview=overview)

    return [Route(paths.ENDPOINTS, show)]
