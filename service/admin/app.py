"""The application of the admin port: probes and metrics, and the page.

The page is an application of its own, so that what guards it leaves probes and metrics alone.
"""

from __future__ import annotations

from typing import Any

from redis.exceptions import RedisError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import Unavailable
from ..monitoring.overview import describe_no_answer
from ..storage.redis_errors import unavailable_reason
from ..telemetry import metrics
from ..web.app import QuietApplication, Readiness, probes
from . import static_files
from .guard import Guard
from .page import Page, PageError
from .views import dead_letters, endpoints, handlers, letter_actions, login, overview, sessions

HOW_TO_GET_IT = (
    "The page for operators needs Jinja2: pip install 'identity-webhooks[page]'\n"
    "Metrics are at /metrics, probes at /livez and /readyz.\n"
)
# A request for a page may wait for Redis. The other connections of the port are left to probes and
# to Prometheus: a process must not look dead because many pages are open.
MAX_AT_ONCE = 32
BUSY = "Too many pages are asked for at once. Try again in a moment.\n"
_TITLES = {404: "There is no such page", 405: "This page does not take such requests"}


class AdminApp(QuietApplication):
    """The application of the admin port: metrics, the probes, and the page if given.

    Paths of metrics and probes are never the page's, whatever the method.
    """

    def __init__(self, readiness: Readiness, page: Page | None = None) -> None:
        routes = [Route("/metrics", _metrics), *probes(readiness)]
        self._page = None if page is None else _PageApp(page)
        self._own_paths = {route.path for route in routes}
        super().__init__(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let the page answer it."""
        if self._page is None or scope["path"] in self._own_paths:
            await super().__call__(scope, receive, send)
        else:
            await self._page(scope, receive, send)


async def _metrics(request: Request) -> Response:
    return Response(metrics.exposition(), media_type=metrics.CONTENT_TYPE)


class _PageApp:
    """The page, once its templates are loaded; without Jinja2, a text that says how to get it."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._app: ASGIApp = _routed(page)
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, unless too many are being answered."""
        if self._running >= MAX_AT_ONCE:
            await PlainTextResponse(BUSY, 503)(scope, receive, send)
            return
        self._running += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self._running -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        try:
            await self._page.load()
        except ImportError:
            app = PlainTextResponse(HOW_TO_GET_IT, 200 if scope["path"] == "/" else 404)
        await app(scope, receive, send)


def _routed(page: Page) -> ASGIApp:
    """Return the application of all pages, and of what is answered in their place, guarded."""
    views = (login, letter_actions, overview, sessions, dead_letters, handlers, endpoints)
    routes = [static_files.route(), *(route for view in views for route in view.routes(page))]

    async def mistake(request: Request, error: Any) -> Response:
        return page.respond_error(request, error)

    async def http_error(request: Request, error: Any) -> Response:
        title = _TITLES.get(error.status_code, "This request cannot be answered")
        return page.respond_error(request, PageError(error.status_code, title))

    async def unavailable(request: Request, error: Any) -> Response:
        is_ours = isinstance(error, Unavailable)
        reason = error.reason if is_ours else unavailable_reason(error)
        title, text = f"Redis {describe_no_answer(reason)}", f"The reason is {reason}."
        return page.respond_error(request, PageError(503, title, text))

    app = Starlette(
        routes=routes,
        exception_handlers={
            PageError: mistake,
            HTTPException: http_error,
            Unavailable: unavailable,
            RedisError: unavailable,
            OSError: unavailable,
        },
    )
    app.router.redirect_slashes = False
    return Guard(app, page)
