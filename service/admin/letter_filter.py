"""The filter of dead letters as a form has it: four texts, read strictly, and shown again."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from ..delivery.dead_letters import EntryFilter
from ..stripe.events import SESSION_ID
from .page import PageError

_REASON = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


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
        argument, parse, expected = _FIELDS[name]
        try:
            values[argument] = parse(text)
        except (ValueError, OverflowError, OSError):
            raise PageError(400, "This filter cannot be used", f"Expected {expected}.") from None
    return LetterFilter(EntryFilter(**values), fields)


def _matching(pattern: re.Pattern[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if pattern.fullmatch(text) is None:
            raise ValueError
        return text

    return parse


def _time(text: str) -> datetime:
    """Return a time, in the server's zone where the text names none."""
    return datetime.fromisoformat(text).astimezone()


_WHEN = "a time such as 2026-07-31T14:05, in the server's time zone"
# For each field of the form: the argument of the filter, how it is read, and what it may be.
_FIELDS: Mapping[str, tuple[str, Callable[[str], Any], str]] = {
    "reason": ("reason", _matching(_REASON), "a reason of one word"),
    "session": ("session_id", _matching(SESSION_ID), "a session id, vs_…"),
    "since": ("since", _time, _WHEN),
    "until": ("until", _time, _WHEN),
}
