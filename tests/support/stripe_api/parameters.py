"""Reads the parameters of a request: `created[gte]=1`, `types[]=a`, `expand[0]=b`.

A parameter that is read counts as known; `finish` rejects those that nothing has read, as Stripe
does. https://docs.stripe.com/api/events/list has most forms of parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from .errors import ApiError, invalid, unknown_parameter

_PART = re.compile(r"\[([^\]]*)\]")
_BOUNDS = ("gt", "gte", "lt", "lte")


def decode_form(text: str) -> dict[str, Any]:
    """Return the parameters in a query or a form, nested as their brackets say.

    Lists are written as `types[]=a`, `types[0]=a` or a repeated `types=a`; the last two become a
    mapping and a list, and `Parameters.texts` reads all three.
    """
    decoded: dict[str, Any] = {}
    for key, value in parse_qsl(text, keep_blank_values=True):
        name, _, brackets = key.partition("[")
        _put(decoded, [name, *_PART.findall(f"[{brackets}" if brackets else "")], value)
    return decoded


def _put(into: dict[str, Any], path: list[str], value: str) -> None:
    name, *inner = path
    if not inner:
        before = into.get(name)
        into[name] = value if before is None else [*_as_list(before), value]
    elif inner == [""]:
        into[name] = [*_as_list(into.get(name, [])), value]
    else:
        nested = into.setdefault(name, {})
        if not isinstance(nested, dict):
            raise invalid(name, f"Invalid {name}")
        _put(nested, inner, value)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


class Range(NamedTuple):
    """Which times a filter admits: a test for each bound that was given."""

    gt: float | None = None
    gte: float | None = None
    lt: float | None = None
    lte: float | None = None

    @property
    def start(self) -> float:
        """No time before it is admitted."""
        return max(self.gt or 0.0, self.gte or 0.0)

    def admits(self, at: float) -> bool:
        """Return whether a time lies between the bounds."""
        return (
            (self.gt is None or at > self.gt)
            and (self.gte is None or at >= self.gte)
            and (self.lt is None or at < self.lt)
            and (self.lte is None or at <= self.lte)
        )


class Parameters:
    """The parameters of one request, each read once.

    Every method takes a parameter's name and raises `ApiError` (400) for a value of another form.
    """

    def __init__(self, sent: Mapping[str, Any]) -> None:
        self._left = dict(sent)

    def text(self, name: str) -> str | None:
        """Return a text; None if it is not there."""
        value = self._left.pop(name, None)
        if value is None or isinstance(value, str):
            return value
        raise invalid(name, f"Invalid string: {name}")

    def texts(self, name: str, *, max_length: int = 100) -> list[str]:
        """Return a list of texts; an empty one if it is not there."""
        value = self._left.pop(name, [])
        found = list(value.values()) if isinstance(value, dict) else _as_list(value)
        if len(found) > max_length or not all(isinstance(one, str) for one in found):
            raise invalid(name, f"Invalid array: {name}")
        return found

    def integer(self, name: str, *, minimum: int, maximum: int, default: int) -> int:
        """Return an integer within bounds, or the default."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        number = _number(name, value)
        if not minimum <= number <= maximum:
            raise ApiError(
                400,
                f"This value must be between {minimum} and {maximum}.",
                code="parameter_invalid_integer",
                param=name,
            )
        return number

    def boolean(self, name: str) -> bool | None:
        """Return a boolean; None if it is not there."""
        value = self._left.pop(name, None)
        words = {"true": True, "false": False, True: True, False: False, None: None}
        if not isinstance(value, (str, bool, type(None))) or value not in words:
            raise invalid(name, f"Invalid boolean: {name}")
        return words[value]

    def mapping(self, name: str) -> dict[str, Any] | None:
        """Return nested parameters as they are; None if there are none. "" clears them."""
        value = self._left.pop(name, None)
        if value == "":
            return {}
        if value is None or isinstance(value, dict):
            return value
        raise invalid(name, f"Invalid object: {name}")

    def range(self, name: str, parse: Callable[[str], float] = int) -> Range:
        """Return a range of times; one time without bounds stands for itself only."""
        value = self._left.pop(name, {})
        bounds = value if isinstance(value, dict) else {"gte": value, "lte": value}
        if unknown := set(bounds).difference(_BOUNDS):
            raise unknown_parameter(f"{name}[{min(unknown)}]")
        try:
            return Range(**{bound: parse(text) for bound, text in bounds.items()})
        except (TypeError, ValueError):
            raise invalid(name, f"Invalid timestamp: {name}") from None

    def finish(self) -> None:
        """Raise `ApiError` if there are parameters that were not read."""
        if self._left:
            raise unknown_parameter(min(self._left))


def _number(name: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ApiError(
            400, f"Invalid integer: {name}", code="parameter_invalid_integer", param=name
        ) from None
