"""Reads the parameters of a request: `created[gte]=1`, `types[]=a`, `include[0]=b`.

A parameter that is read counts as known; `finish` rejects those that nothing has read, as Stripe
does. https://docs.stripe.com/api/events/list has most forms of parameters.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple
from urllib.parse import parse_qsl

from .errors import ApiError, invalid, unknown_parameter

_NAME = re.compile(r"([^\[\]]+)(?:\[([^\]]*)\])?")


class Range(NamedTuple):
    """From when until when a filter admits times, in Unix seconds."""

    gte: float = 0.0
    lte: float = math.inf


class Parameters:
    """The parameters of one query, each read once.

    Every method takes a parameter's name and raises `ApiError` (400) for a value of another form.
    """

    def __init__(self, query: str) -> None:
        self._left: dict[str, list[tuple[str, str]]] = {}
        for written, value in parse_qsl(query, keep_blank_values=True):
            found = _NAME.fullmatch(written)
            name, key = (found[1], found[2] or "") if found else (written, "")
            self._left.setdefault(name, []).append((key, value))

    def text(self, name: str) -> str | None:
        """Return a text; None if it is not there."""
        match self._left.pop(name, []):
            case []:
                return None
            case [("", value)]:
                return value
        raise invalid(name, f"Invalid string: {name}")

    def texts(self, name: str, *, max_length: int = 100) -> list[str]:
        """Return a list of texts; an empty one if it is not there."""
        found = [value for _, value in self._left.pop(name, [])]
        if len(found) > max_length:
            raise invalid(name, f"Invalid array: {name}")
        return found

    def integer(self, name: str, *, minimum: int, maximum: int, default: int) -> int:
        """Return an integer within bounds, or the default."""
        text = self.text(name)
        if text is None:
            return default
        if not text.isdecimal() or not minimum <= int(text) <= maximum:
            raise ApiError(
                400,
                f"This value must be between {minimum} and {maximum}.",
                code="parameter_invalid_integer",
                param=name,
            )
        return int(text)

    def range(self, name: str) -> Range:
        """Return a range of times."""
        bounds = dict(self._left.pop(name, []))
        if unknown := bounds.keys() - {*Range._fields}:
            raise unknown_parameter(f"{name}[{min(unknown)}]")
        try:
            return Range(**{bound: int(text) for bound, text in bounds.items()})
        except ValueError:
            raise invalid(name, f"Invalid timestamp: {name}") from None

    def finish(self) -> None:
        """Raise `ApiError` if there are parameters that were not read."""
        if self._left:
            raise unknown_parameter(min(self._left))
