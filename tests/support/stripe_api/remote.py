"""Gives another process what a test in this process can do, as JSON over HTTP.

`POST /_stand_in/sessions.verify` with `{"id": "vs_…"}` calls that method with these arguments;
`GET /_stand_in/state` returns all sessions and events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from . import faults
from .errors import ApiError
from .events import Event
from .pushes import divide, lose_share
from .sessions import Session
from .stand_in import StripeStandIn

PREFIX: Final = "/_stand_in"
SETTINGS: Final = frozenset({"list_lag_s", "list_names_twin", "makes_events", "makes_twins"})
PUSH_SETTINGS: Final = frozenset({"duplicate_share", "max_delay_s", "retry_delays_s", "names_twin"})


def mounted(stand_in: StripeStandIn) -> Mount:
    """Return the routes; no fault applies to them."""
    calls = _calls(stand_in)

    async def call(request: Request) -> Response:
        arguments = orjson.loads(await request.body() or b"{}")
        name = request.path_params["name"]
        if name not in calls:
            return _response({"error": f"no such call: {name}"}, 404)
        try:
            result = calls[name](**arguments)
        except ApiError as error:
            return _response({"error": error.message}, error.status)
        return _response(_described(result))

    async def state(_: Request) -> Response:
        return _response(
            {
                "sessions": [_described(one) for one in stand_in.sessions.all.values()],
                "events": [_described(one) for one in stand_in.events.all],
            }
        )

    return Mount(PREFIX, routes=[Route("/state", state), Route("/{name}", call, methods=["POST"])])


def _calls(stand_in: StripeStandIn) -> Mapping[str, Callable[..., Any]]:
    sessions, clock, directory = stand_in.sessions, stand_in.clock, stand_in.directory
    changes = ("submit", "verify", "reject", "cancel", "override", "redact", "finish_redaction")
    return {
        **{f"sessions.{name}": getattr(sessions, name) for name in changes},
        "sessions.create": lambda account=None, livemode=False, **given: sessions.create(
            scope=stand_in.scope(account, livemode=livemode), **given
        ),
        "clock.advance": clock.advance,
        "clock.stop": clock.stop,
        "clock.run": clock.run,
        "accounts.connect": directory.connect,
        "accounts.deauthorize": directory.deauthorize,
        "keys.add": directory.add_key,
        "subscribe": lambda url, account=None, livemode=False, **fields: stand_in.subscribe(
            url, scope=stand_in.scope(account, livemode=livemode), **fields
        ),
        "faults.add": lambda **rule: stand_in.faults.add(faults.Fault(**rule)),
        "faults.too_many_requests": lambda **rule: stand_in.faults.add(
            faults.too_many_requests(**rule)
        ),
        "faults.broken": lambda **rule: stand_in.faults.add(faults.broken(**rule)),
        "faults.clear": stand_in.faults.clear,
        "rate_limit": lambda **values: _set(stand_in.rate_limit, values),
        "pushes.lose_share": lambda **how: _set(stand_in.pushes, {"loses": lose_share(**how)}),
        "pushes.divide": lambda **how: _set(stand_in.pushes, {"loses": divide(**how)}),
        "pushes.set": lambda **values: _set(stand_in.pushes, values, PUSH_SETTINGS),
        "set": lambda **values: _set(stand_in, values, SETTINGS),
    }


def _set(on: object, values: Mapping[str, Any], allowed: frozenset[str] | None = None) -> None:
    for name, value in values.items():
        if allowed is not None and name not in allowed:
            raise KeyError(name)
        setattr(on, name, value)


def _described(found: Any) -> Any:
    """Return what a process that checks needs to know of an object."""
    if isinstance(found, Session):
        report = found.report
        return {
            "id": found.id,
            "account": found.scope.account,
            "livemode": found.scope.livemode,
            "status": found.status,
            "last_error": found.error,
            "redaction": found.redaction,
            "report": report and report.id,
        }
    if isinstance(found, Event):
        return {
            "id": found.id,
            "thin_id": found.thin_id,
            "type": found.type,
            "account": found.scope.account,
            "session": found.related.id,
            "created": found.created,
            "is_delivered": found.is_delivered,
        }
    names = ("id", "secret")
    return {name: getattr(found, name) for name in names if hasattr(found, name)}


def _response(body: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status_code=status, media_type="application/json")
