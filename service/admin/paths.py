"""The paths of the page, and how to make one that leads to a certain session or dead letter."""

from __future__ import annotations

from urllib.parse import quote, urlencode

from starlette.requests import Request

OVERVIEW = "/"
SESSIONS = "/sessions"
SESSION = "/sessions/{session_id}"
DEAD_LETTERS = "/dead-letters"
HANDLER_DEAD_LETTERS = "/dead-letters/{handler}"
DEAD_LETTER = "/dead-letters/{handler}/{letter_id}"
REPLAY = "/dead-letters/{handler}/replay"
DROP = "/dead-letters/{handler}/drop"
ACTION = "/actions/{action_id}"
HANDLERS = "/handlers"
HANDLER = "/handlers/{handler}"
ENDPOINTS = "/endpoints"
LOGIN = "/login"
LOGOUT = "/logout"
STATIC = "/static/{digest}/{name}"


def to(path: str, /, *, query: dict[str, str] | None = None, **values: str) -> str:
    """Return *path* with its parameters filled in, quoted, and with the query that is not empty."""
    filled = path.format(**{name: quote(value, safe="") for name, value in values.items()})
    wanted = {name: value for name, value in (query or {}).items() if value}
    return f"{filled}?{urlencode(wanted)}" if wanted else filled


def of(request: Request) -> str:
    """Return the path and the query that a request asked for."""
    return request.url.path + (f"?{request.url.query}" if request.url.query else "")
