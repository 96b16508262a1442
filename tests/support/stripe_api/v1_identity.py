"""Sessions under /v1/identity.

https://docs.stripe.com/api/identity/verification_sessions
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .calls import Call
from .errors import ApiError
from .expansion import SESSION_PATHS, prune, require_sensitive, wanted_paths
from .pages import page_by_id
from .sessions import Session, full_session_object

SESSIONS_URL: Final = "/v1/identity/verification_sessions"

_TEXTS: Final = (
    *("client_reference_id", "related_customer", "related_customer_account"),
    "verification_flow",
)
_MAPPINGS: Final = ("metadata", "provided_details", "related_person")


def list_sessions(call: Call) -> dict[str, Any]:
    """Return a page of sessions, the newest first."""
    wanted = _wanted(call, SESSION_PATHS, in_list=True)
    return page_by_id(
        call.parameters,
        [one for one in _newest_first(call) if one.scope == call.scope],
        url=SESSIONS_URL,
        kind="verification_session",
        id_of=lambda session: session.id,
        render=lambda session: _show(call, session, wanted),
    )


def retrieve_session(call: Call) -> Mapping[str, Any]:
    """Return a session as it is now; an open one with a new `client_secret` and `url`."""
    wanted = _wanted(call, SESSION_PATHS)
    call.parameters.finish()
    return _show(call, call.stand_in.sessions.find(call.id, call.scope), wanted)


def create_session(call: Call) -> Mapping[str, Any]:
    """Create a session of this account."""
    wanted = _wanted(call, SESSION_PATHS)
    kind = call.parameters.text("type")
    given = _given(call)
    if kind is None and "verification_flow" not in given:
        raise ApiError(400, "Missing required param: type.", code="parameter_missing", param="type")
    session = call.stand_in.sessions.create(
        scope=call.scope, type=kind or "verification_flow", request=call.request, **given
    )
    return _show(call, session, wanted)


def cancel_session(call: Call) -> Mapping[str, Any]:
    """Cancel an open session."""
    wanted = _wanted(call, SESSION_PATHS)
    call.parameters.finish()
    call.stand_in.sessions.find(call.id, call.scope)
    return _show(call, call.stand_in.sessions.cancel(call.id, call.request), wanted)


def redact_session(call: Call) -> Mapping[str, Any]:
    """Begin the redaction of a session; a test ends it."""
    wanted = _wanted(call, SESSION_PATHS)
    call.parameters.finish()
    call.stand_in.sessions.find(call.id, call.scope)
    return _show(call, call.stand_in.sessions.redact(call.id, call.request), wanted)


def _newest_first(call: Call) -> list[Session]:
    oldest_first = sorted(call.stand_in.sessions.all.values(), key=lambda one: one.created)
    return oldest_first[::-1]


def _wanted(call: Call, expandable: frozenset[str], *, in_list: bool = False) -> frozenset[str]:
    return wanted_paths(call.parameters.texts("expand"), expandable, in_list=in_list)


def _show(call: Call, session: Session, wanted: frozenset[str]) -> dict[str, Any]:
    require_sensitive(wanted, call.key, call.scope)
    full = full_session_object(session, call.stand_in.tokens)
    return full if call.stand_in.expands_everything else prune(full, wanted, SESSION_PATHS)


def _given(call: Call) -> dict[str, Any]:
    """Return what a request gives for a session; all its parameters are read then.

    Options do not take part in any proof: a session has the default ones.
    """
    parameters = call.parameters
    parameters.text("return_url")
    parameters.mapping("options")
    texts = {name: parameters.text(name) for name in _TEXTS}
    mappings = {name: parameters.mapping(name) for name in _MAPPINGS}
    parameters.finish()
    return {name: value for name, value in (texts | mappings).items() if value is not None}
