"""The API as an ASGI application: which path does what, and which permission it needs."""

from __future__ import annotations

from typing import Final

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import v1_events, v1_identity, v1_webhook_endpoints, v2_core
from .accounts import Permission
from .calls import Handler, guarded, named_account, not_found
from .faults import FaultMiddleware
from .stand_in import Recorded, StripeStandIn

_EVENTS: Final = Permission.EVENTS_READ
_READ, _WRITE = Permission.IDENTITY_READ, Permission.IDENTITY_WRITE
_HOOKS_READ, _HOOKS_WRITE = Permission.WEBHOOKS_READ, Permission.WEBHOOKS_WRITE
_SESSION: Final = v1_identity.SESSIONS_URL + "/{id}"

ROUTES: Final[tuple[tuple[str, str, Handler, Permission], ...]] = (
    ("GET", "/v1/events", v1_events.list_events, _EVENTS),
    ("GET", "/v1/events/{id}", v1_events.retrieve_event, _EVENTS),
    ("POST", "/v1/events/{id}/retry", v1_events.retry_event, _EVENTS),
    ("GET", v1_identity.SESSIONS_URL, v1_identity.list_sessions, _READ),
    ("POST", v1_identity.SESSIONS_URL, v1_identity.create_session, _WRITE),
    ("GET", _SESSION, v1_identity.retrieve_session, _READ),
    ("POST", f"{_SESSION}/cancel", v1_identity.cancel_session, _WRITE),
    ("POST", f"{_SESSION}/redact", v1_identity.redact_session, _WRITE),
    ("GET", v1_webhook_endpoints.URL, v1_webhook_endpoints.list_endpoints, _HOOKS_READ),
    ("GET", v2_core.EVENTS_URL, v2_core.list_events, _EVENTS),
    ("GET", v2_core.EVENTS_URL + "/{id}", v2_core.retrieve_event, _EVENTS),
    ("GET", v2_core.DESTINATIONS_URL, v2_core.list_destinations, _HOOKS_READ),
    ("POST", v2_core.DESTINATIONS_URL + "/{id}/ping", v2_core.ping_destination, _HOOKS_WRITE),
)


def create_app(stand_in: StripeStandIn) -> Starlette:
    """Return the application over a stand-in, for a server or for a client in this process."""
    routes = [
        Route(path, guarded(stand_in, handler, permission), methods=[method])
        for method, path, handler, permission in ROUTES
    ]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(_RecordingMiddleware, stand_in=stand_in),
            Middleware(FaultMiddleware, faults=stand_in.faults),
        ],
        exception_handlers={404: not_found, 405: not_found},
    )


class _RecordingMiddleware:
    """Keeps a record of every request to the API, those that meet a fault included."""

    def __init__(self, app: ASGIApp, stand_in: StripeStandIn) -> None:
        self._app = app
        self._stand_in = stand_in

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: int | None = None

        async def watch(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            http = HttpRequest(scope)
            self._stand_in.requests.append(
                Recorded(http.method, http.url.path, http.url.query, named_account(http), status)
            )
