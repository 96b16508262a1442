"""How numbers are said, on the page and in the terminal alike."""

from __future__ import annotations

from ..config import DAY_S

MINUTE_S, HOUR_S = 60, 3600
# A duration is said in a unit of which there are at least two.
_UNITS = ((DAY_S, "days"), (HOUR_S, "h"), (MINUTE_S, "min"))


def duration(seconds: float) -> str:
    """Return a duration as a number and a unit: `45 s`, `12 min`, `3 h`, `5 days`."""
    for unit_s, name in _UNITS:
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f} {name}"
    return f"{seconds:.0f} s"


def counted(number: int, singular: str, plural: str = "") -> str:
    """Return a number of things: `1 receiver`, `2 receivers`, `12,000 events`."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"
