"""Logging in with a token, and out."""

from __future__ import annotations

import re
import time

import structlog
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from ...telemetry import metrics
from .. import paths
from ..forms import read_form
from ..logins import LOGIN_S
from ..page import Page, PageError

# A path of our own; browsers take // and /\\ for the beginning of another host.
_PATH = re.compile(r"/(?![/\\])[!-~]{0,2000}")

log: structlog.stdlib.BoundLogger = structlog.get_logger()


def routes(page: Page) -> list[Route]:
    """Return the routes of the login form and of what it sends."""

    def respond(request: Request, asked: str, *, is_wrong: bool) -> Response:
        status = 403 if is_wrong else 200
        return page.respond(request, "login.html", status=status, asked=asked, is_wrong=is_wrong)

    async def show(request: Request) -> Response:
        if not request.state.viewer.can_log_in:
            raise PageError(404, "There are no logins", "To have some, set ADMIN_TOKENS.")
        return respond(request, _path(request.query_params.get("next", "")), is_wrong=False)

    async def log_in(request: Request) -> Response:
        form = await read_form(request)
        asked = _path(form.get("next", ""))
        found = page.logins.log_in(form.get("token", ""), time.time())
        metrics.ADMIN_LOGINS.labels("logged_in" if found else "failed").inc()
        if found is None:
            log.warning("admin.login_failed")
            await page.logins.delay_wrong_token()
            return respond(request, asked, is_wrong=True)
        name, cookie = found
        log.info("admin.logged_in", by=name)
        response = RedirectResponse(asked, 303)
        _set_cookie(response, page.logins.cookie, cookie, request.headers["origin"])
        return response

    async def log_out(request: Request) -> Response:
        response = RedirectResponse(paths.OVERVIEW, 303)
        response.delete_cookie(page.logins.cookie, httponly=True, samesite="strict")
        return response

    return [
        Route(paths.LOGIN, show),
        Route(paths.LOGIN, log_in, methods=["POST"]),
        Route(paths.LOGOUT, log_out, methods=["POST"]),
    ]


def _path(asked: str) -> str:
    """Return where to go after the login: a path of ours, whatever was asked for."""
    return asked if _PATH.fullmatch(asked) else paths.OVERVIEW


def _set_cookie(response: Response, name: str, value: str, origin: str) -> None:
    # The origin is how the browser sees us, also behind a proxy that ends TLS.
    is_https = origin.lower().startswith("https:")
    response.set_cookie(
        name, value, max_age=LOGIN_S, secure=is_https, httponly=True, samesite="strict"
    )
