"""The filter of dead letters as a form has it: four texts, read strictly, and shown again."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

from ..delivery.dead_letters import EntryFilter
from ..environment import Parser, matching
from ..errors import REASON_WORD
from ..stripe.events import SESSION_ID
from .page import PageError


class LetterFilter(NamedTuple):
    """What was asked for.

    Attributes:
        wanted: What is looked for.
        fields: The texts of the form that are not empty, by the names of their fields.
    """

    wanted: EntryFilter
    fields: Mapping[str, str]


def read_filter(form: Mapping[str, str]) -> LetterFilter:
    """Return the filter in a query or a form; other fields are not looked at.

    Raises:
        PageError: A field holds what it cannot mean.
    """
    fields = {name: text for name in _FIELDS if (text := form.get(name, "").strip())}
    values: dict[str, Any] = {}
    for name, text in fields.items():
        argument, parser = _FIELDS[name]
        try:
            values[argument] = parser.parse(text)
        except (ValueError, OverflowError, OSError):
            expected = f"Expected {parser.expected}."
            raise PageError(400, "This filter cannot be used", expected) from None
    return LetterFilter(EntryFilter(**values), fields)


def _parse_time(text: str) -> datetime:
    """Return a time, in the server's zone where the text names none."""
    return datetime.fromisoformat(text).astimezone()


_REASON = matching(REASON_WORD.pattern, "a reason of one word")
_SESSION = matching(SESSION_ID.pattern, "a session id, vs_…")
_WHEN = Parser(
    expected="a time such as 2026-07-31T14:05, in the server's time zone", parse=_parse_time
)
# For each field of the form: the argument of the filter, and how it is read.
_FIELDS: Mapping[str, tuple[str, Parser[Any]]] = {
    "reason": ("reason", _REASON),
    "session": ("session_id", _SESSION),
    "since": ("since", _WHEN),
    "until": ("until", _WHEN),
}
