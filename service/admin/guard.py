"""What every request for the page must pass, and the headers that every answer carries.

| a request                                      | gets                                     |
|------------------------------------------------|------------------------------------------|
| under a name that is not the page's            | 421, empty: DNS rebinding                |
| that is no GET, from another origin or none    | 403: forged by another site              |
| for data, without the login that reading needs | the login form; 403 if it is no GET      |

An address without a name cannot be rebound, so any IP address will do. Browsers send `Origin` with
each POST. Its scheme is not compared: behind a proxy that ends TLS we cannot know our own.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from ipaddress import ip_address

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import paths
from .page import Page, PageError

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self';"
        " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    # Not no-referrer: with that, browsers send forms with the origin "null".
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?")
_SAFE = frozenset({"GET", "HEAD"})
# What needs no login, so that one can log in.
_OPEN = (paths.LOGIN, paths.LOGOUT)


class Guard:
    """The page behind its rules, as an ASGI application."""

    def __init__(self, app: ASGIApp, page: Page) -> None:
        self._app = app
        self._page = page
        self._names = frozenset(name.lower() for name in page.settings.admin_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what breaks a rule; pass on everything else, with who asks."""
        request = Request(scope, receive)
        logins = self._page.logins
        request.state.viewer = logins.viewer(request.cookies.get(logins.cookie), time.time())
        app = self._refuse(request) or self._app

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await app(scope, receive, send_with_headers)

    def _refuse(self, request: Request) -> Response | None:
        """Return the answer to a request that breaks a rule, else None."""
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or not is_our_name(hosts[0], self._names):
            return Response(status_code=421)
        if request.method not in _SAFE and not _is_same_origin(request, hosts[0]):
            error = PageError(403, "This request was not sent by the page", "Do it on the page.")
            return self._page.respond_error(request, error)
        path = request.url.path
        needs_login = self._page.logins.reading and request.state.viewer.name is None
        if not needs_login or path in _OPEN or path.startswith("/static/"):
            return None
        if request.method in _SAFE:
            login = paths.to(paths.LOGIN, query={"next": paths.of(request)})
            return RedirectResponse(login, 303)
        return self._page.respond_error(request, PageError(403, "Log in first"))


def is_our_name(host: str, names: Collection[str]) -> bool:
    """Say whether a Host header names us: an IP address, localhost, or one of *names*."""
    if (parts := _HOST.fullmatch(host)) is None:
        return False
    name = parts[1].strip("[]").lower()
    if name == "localhost" or name in names:
        return True
    try:
        return bool(ip_address(name))
    except ValueError:
        return False


def _is_same_origin(request: Request, host: str) -> bool:
    origins = [origin.lower() for origin in request.headers.getlist("origin")]
    return len(origins) == 1 and origins[0] in {f"{s}://{host.lower()}" for s in ("http", "https")}
