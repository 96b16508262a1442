"""Renders log lines for people: one short line for each request and each hand-over. Pure.

    14:05:12.345 in vs_1QwErTyUiOpAsDfGhJkLzXcV requires_input → processing #2 3ms
    14:05:12.349 ok vs_1QwErTyUiOpAsDfGhJkLzXcV requires_input → processing #2 9ms nats
    14:05:12.353 in vs_1QwErTyUiOpAsDfGhJkLzXcV late requires_input (processing) 2ms
    14:05:13.120 !  rejected signature_mismatch <1ms request_id=afa2b988e87ae668
    14:05:13.377 !! circuit.opened connection_refused nats

From left to right, without what is null or usual:

* the local time;
* `in` an event came in, `ok` a transition was handed over, `!` a warning, `!!` an error;
* the id of the session, never cut: it is copied. An event without a session has its own id;
* of an event that changes its session, the previous and the current status; of any other, what
  became of it, the status that it reports, and in parentheses the status that the session keeps;
  of anything else, the name of the log event and the reason;
* the number of the transition, how long it took, the handler, every other field by its name, and
  at the end what may be long: the code of a failed verification, the place of an error.

A usual line fits into 80 columns. To fit, that of a hand-over leaves out the previous status, which
the line of the event has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeAlias

Fields: TypeAlias = dict[str, Any]
# A text, and its style: a parameter of ANSI's "select graphic rendition".
Part: TypeAlias = tuple[str, str]

WIDTH = 80
# The time and the mark, with the spaces after them.
_BEGIN = 16

_PLAIN, _BOLD, _DIM, _GREEN, _YELLOW, _RED, _CYAN = "", "1", "2", "32", "1;33", "1;31", "36"
# What warnings and errors have in place of the usual mark.
_MARKS = {"warning": ("! ", _YELLOW), "error": ("!!", _RED), "critical": ("!!", _RED)}
_RECEIVED = {
    f"event.{word}"
    for word in (
        *("admitted", "duplicate", "late", "unchanged", "expired", "queued", "ignored"),
        *("fetched", "reconciled", "recovered"),
    )
}
_HANDED_OVER = {"transition", "delivery.delivered"}
# Fields whose values need no names: why, and at the end of the line what may be long.
_WHY, _LONG = ("finding", "reason", "error"), ("last_error_code", "place", "meaning")
# What is in every line about an event or a transition, or of no use beside the session's id.
_USUAL = (
    *("body_bytes", "created", "epoch", "event_id", "event_type", "ignored_status"),
    *("notification_id", "occurred_at", "report_id", "request_id", "secret_fingerprint"),
    "stripe_status",
)
_REPORTED = {
    **dict.fromkeys(("late", "expired"), ("ignored_status",)),
    "queued": ("event_type",),
    "ignored": ("reason", "event_type"),
}
_OUR_TYPES = re.compile(r"^(v1\.)?identity\.verification_session\.")
_SECOND_MS = 1000
_ONE_WORD = re.compile(r'[^\s"=,]+')


def render(fields: Mapping[str, Any], *, colors: bool) -> str:
    """Return a line, followed by one for each place of its exception.

    Args:
        fields: The fields of a log line, sanitized.
        colors: Whether to color it.
    """
    rest = {name: value for name, value in fields.items() if value is not None}
    event, level, time = (str(rest.pop(name, "")) for name in ("event", "level", "timestamp"))
    if isinstance(found := fields.get("timestamp"), datetime):
        time = found.astimezone().time().isoformat("milliseconds")
    exception = rest.pop("exception") if isinstance(rest.get("exception"), list) else []
    if event in _RECEIVED:
        mark, parts = "in", _received(event, level, rest)
    elif event in _HANDED_OVER:
        mark, parts = "ok", _handed_over(level, rest)
    else:
        mark, parts = "  ", _noted(event, level, rest)
    line = [(time, _DIM), _MARKS.get(level, (mark, _GREEN)), *parts]
    texts = [_paint(*part) if colors else part[0] for part in line]
    return "\n".join([" ".join(texts), *_exception_lines(exception, "    ")])


def _received(event: str, level: str, rest: Fields) -> list[Part]:
    """Return the parts about an event that came in; they take their fields out of *rest*."""
    way = event.removeprefix("event.")
    outcome = str(rest.pop("outcome", way))
    session_id = str(rest.pop("session_id", rest.get("event_id", "")))
    rest["event_type"] = _OUR_TYPES.sub("", str(rest.get("event_type", "")))
    if "current" in rest:
        found = _change(rest)
    else:
        found = [(outcome, _CYAN), *_bare(rest, _REPORTED.get(outcome, ()), _PLAIN)]
        if kept := rest.pop("status", ""):
            found.append((f"({kept})", _DIM))
        rest.pop("sequence", None)
    if way not in {outcome, "admitted"}:
        found.append((way, _CYAN))
    return [(session_id, _PLAIN), *found, *_end(rest, level, _USUAL)]


def _handed_over(level: str, rest: Fields) -> list[Part]:
    """Return the parts about a call of a handler that returned."""
    session_id = str(rest.pop("session_id", ""))
    change = _change(rest)
    # The line of the `log` handler is the hand-over itself.
    rest = {"handler": "log", **rest}
    rest.pop("last_error_code", None)
    end = _end(rest, level, _USUAL)
    if sum(len(text) + 1 for text, _ in (*change, *end)) > WIDTH - _BEGIN - len(session_id):
        del change[0]
    return [(session_id, _PLAIN), *change, *end]


def _noted(event: str, level: str, rest: Fields) -> list[Part]:
    """Return the parts of any other line."""
    _, style = _MARKS.get(level, ("", _BOLD))
    # "rejected" and "unavailable" are outcomes like those of `_received`.
    parts = [(event.removeprefix("event."), style), *_bare(rest, _WHY, style)]
    if "session_id" in rest:
        rest.pop("event_id", None)
        parts.insert(0, (str(rest.pop("session_id")), _PLAIN))
    return [*parts, *_end(rest, level, ("body_bytes",))]


def _change(rest: Fields) -> list[Part]:
    previous, current = (str(rest.pop(name, "new")) for name in ("previous", "current"))
    if rest.get("redaction_status") == current:
        del rest["redaction_status"]
    return [(previous, _DIM), ("→", _DIM), (current, _BOLD)]


def _end(rest: Fields, level: str, usual: Sequence[str]) -> list[Part]:
    """Return the parts that end a line: how many, how long, who, and every field that is left."""
    parts = []
    if "sequence" in rest:
        parts.append((f"#{rest.pop('sequence')}", _PLAIN))
    if "duration_ms" in rest:
        parts.append((_duration(rest.pop("duration_ms")), _DIM))
    parts += _bare(rest, ("handler",), _CYAN)
    if rest.pop("expected", True) is False:
        parts.append(("unexpected", _YELLOW))
    if rest.get("origin") == "webhook":
        del rest["origin"]
    _, style = _MARKS.get(level, ("", _CYAN))
    last = _bare(rest, _LONG, style.removeprefix("1;"))
    for name, value in rest.items():
        if value is True:
            parts.append((name, style))
        elif value is not False and name not in usual:
            parts.append((f"{name}={_text(value)}", _PLAIN))
    return [*parts, *last]


def _bare(rest: Fields, names: Sequence[str], style: str) -> list[Part]:
    """Take fields out of *rest*, and return their values."""
    values = [rest.pop(name) for name in names if name in rest]
    return [(value if isinstance(value, str) else _text(value), style) for value in values]


def _text(value: Any) -> str:
    """Return a value on one line, in quotation marks if it is more than one word."""
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        texts = [_text(each) for each in value]
        return ",".join(texts)
    if isinstance(value, str) and _ONE_WORD.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _duration(value: Any) -> str:
    if not isinstance(value, int | float):
        return _text(value)
    if value < 1:
        return "<1ms"
    return f"{value:.0f}ms" if value < _SECOND_MS else f"{value / _SECOND_MS:.1f}s"


def _paint(text: str, style: str) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if style else text


def _exception_lines(chain: list[Any], indent: str) -> Iterator[str]:
    """Yield the lines about an exception and its causes, as `logs` describes them."""
    for described in chain:
        if not isinstance(described, dict):  # too deep for `sanitize`
            yield f"{indent}{described}"
            continue
        yield f"{indent}{described['class']}"
        yield from (f"{indent}  {frame}" for frame in described["frames"])
        yield from _exception_lines(described.get("exceptions", []), indent + "    ")
