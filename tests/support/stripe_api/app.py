"""The API as an ASGI application: which path does what, and which permission it needs.

It has what the service asks of Stripe, and nothing else.
"""

from __future__ import annotations

from typing import Final

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import answers
from .accounts import Permission
from .calls import Handler, guarded, named_account
from .faults import FaultMiddleware
from .stand_in import Recorded, StripeStandIn

ROUTES: Final[tuple[tuple[str, Handler, Permission], ...]] = (
    ("/v1/events", answers.list_events, Permission.EVENTS_READ),
    ("/v1/events/{id}", answers.retrieve_event, Permission.EVENTS_READ),
    (
        "/v1/identity/verification_sessions/{id}",
        answers.retrieve_session,
        Permission.IDENTITY_READ,
    ),
    ("/v1/webhook_endpoints", answers.list_endpoints, Permission.WEBHOOKS_READ),
    ("/v2/core/events/{id}", answers.retrieve_thin_event, Permission.EVENTS_READ),
    ("/v2/core/event_destinations", answers.list_destinations, Permission.WEBHOOKS_READ),
)


def create_app(stand_in: StripeStandIn) -> Starlette:
    """Return the application over a stand-in, for a server or for a client in this process."""
    return Starlette(
        routes=[
            Route(path, guarded(stand_in, handler, permission), methods=["GET"])
            for path, handler, permission in ROUTES
        ],
        middleware=[
            Middleware(_RecordingMiddleware, stand_in=stand_in),
            Middleware(FaultMiddleware, faults=stand_in.faults),
        ],
    )


class _RecordingMiddleware:
    """Keeps a record of every request to the API, those that meet a fault included."""

    def __init__(self, app: ASGIApp, stand_in: StripeStandIn) -> None:
        self._app = app
        self._stand_in = stand_in

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status: int | None = None

        async def watch(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            http = HttpRequest(scope)
            self._stand_in.requests.append(Recorded(http.url.path, named_account(http), status))
