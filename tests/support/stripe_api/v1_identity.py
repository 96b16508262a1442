"""Sessions and reports under /v1/identity.

https://docs.stripe.com/api/identity/verification_sessions and …/verification_reports
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .calls import Call
from .errors import ApiError
from .expansion import REPORT_PATHS, SESSION_PATHS, prune, require_sensitive, wanted_paths
from .pages import page_by_id
from .sessions import DEFAULT_OPTIONS, Report, Session, full_report_object, full_session_object

SESSIONS_URL: Final = "/v1/identity/verification_sessions"
REPORTS_URL: Final = "/v1/identity/verification_reports"

_TEXTS: Final = (
    *("client_reference_id", "related_customer", "related_customer_account"),
    "verification_flow",
)
_MAPPINGS: Final = ("metadata", "provided_details", "related_person")


def list_sessions(call: Call) -> dict[str, Any]:
    """Return a page of sessions, the newest first."""
    wanted = _wanted(call, SESSION_PATHS, in_list=True)
    parameters = call.parameters
    created, status = parameters.range("created"), parameters.text("status")
    asked = {name: parameters.text(name) for name in _TEXTS[:3]}

    def admits(session: Session) -> bool:
        given = all(value in {None, session.given.get(name)} for name, value in asked.items())
        return given and status in {None, session.status} and created.admits(int(session.created))

    return page_by_id(
        parameters,
        [one for one in _newest_first(call) if one.scope == call.scope],
        url=SESSIONS_URL,
        kind="verification_session",
        id_of=lambda session: session.id,
        admits=admits,
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


def update_session(call: Call) -> Mapping[str, Any]:
    """Change what was given for an open session; there is no event for it."""
    wanted = _wanted(call, SESSION_PATHS)
    session = call.stand_in.sessions.find(call.id, call.scope)
    call.parameters.text("type")
    given = _given(call)
    if not session.is_open:
        raise ApiError(400, "Only an open VerificationSession can be updated.")
    session.given |= given
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


def list_reports(call: Call) -> dict[str, Any]:
    """Return a page of reports, the newest first."""
    wanted = _wanted(call, REPORT_PATHS, in_list=True)
    parameters = call.parameters
    created, kind = parameters.range("created"), parameters.text("type")
    named, reference = parameters.text("verification_session"), parameters.text(_TEXTS[0])

    def admits(found: tuple[Session, Report]) -> bool:
        session, report = found
        return (
            kind in {None, session.type}
            and named in {None, session.id}
            and reference in {None, session.given.get(_TEXTS[0])}
            and created.admits(int(report.created))
        )

    reports = [
        (session, report)
        for session in _newest_first(call)
        for report in session.reports
        if session.scope == call.scope
    ]
    return page_by_id(
        parameters,
        sorted(reports, key=lambda found: found[1].created, reverse=True),
        url=REPORTS_URL,
        kind="verification_report",
        id_of=lambda found: found[1].id,
        admits=admits,
        render=lambda found: _show_report(call, *found, wanted),
    )


def retrieve_report(call: Call) -> Mapping[str, Any]:
    """Return a report."""
    wanted = _wanted(call, REPORT_PATHS)
    call.parameters.finish()
    session, report = call.stand_in.sessions.find_report(call.id, call.scope)
    return _show_report(call, session, report, wanted)


def _newest_first(call: Call) -> list[Session]:
    oldest_first = sorted(call.stand_in.sessions.all.values(), key=lambda one: one.created)
    return oldest_first[::-1]


def _wanted(call: Call, expandable: frozenset[str], *, in_list: bool = False) -> frozenset[str]:
    return wanted_paths(call.parameters.texts("expand"), expandable, in_list=in_list)


def _show(call: Call, session: Session, wanted: frozenset[str]) -> dict[str, Any]:
    _require(call, session.report, wanted)
    return prune(full_session_object(session, call.stand_in.tokens), wanted, SESSION_PATHS)


def _show_report(
    call: Call, session: Session, report: Report, wanted: frozenset[str]
) -> dict[str, Any]:
    _require(call, report, wanted)
    return prune(full_report_object(session, report), wanted, REPORT_PATHS)


def _require(call: Call, report: Report | None, wanted: frozenset[str]) -> None:
    require_sensitive(
        wanted,
        call.key,
        call.scope,
        verified_at=report.created if report else None,
        now=call.stand_in.clock.time(),
    )


def _given(call: Call) -> dict[str, Any]:
    """Return what a request gives for a session; all its parameters are read then."""
    parameters = call.parameters
    parameters.text("return_url")
    texts = {name: parameters.text(name) for name in _TEXTS}
    mappings = {name: parameters.mapping(name) for name in _MAPPINGS}
    options = parameters.mapping("options")
    parameters.finish()
    given = {name: value for name, value in (texts | mappings).items() if value is not None}
    if options is not None:
        given["options"] = _options(options)
    return given


def _options(sent: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the document check; booleans come as words, lists by index."""
    document = dict(DEFAULT_OPTIONS["document"])
    for name, value in (sent.get("document") or {}).items():
        if name == "allowed_types":
            document[name] = list(value.values()) if isinstance(value, dict) else list(value)
        else:
            document[name] = value == "true"
    return {"document": document}
