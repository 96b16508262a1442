"""A finding: one fact about a deployment, how bad it is, and the promises that it touches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple


class Severity(StrEnum):
    """How bad a finding is: `fatal` breaks a promise, or keeps every event from being admitted."""

    FINE = "fine"
    WARNING = "warning"
    FATAL = "fatal"


RANKS = {severity: rank for rank, severity in enumerate(Severity)}


def worst(severities: Iterable[Severity]) -> Severity:
    """Return the worst of some severities; `fine` for none."""
    return max(severities, key=RANKS.__getitem__, default=Severity.FINE)


class Promise(StrEnum):
    """A promise, in the words of the README."""

    AUTHENTIC = "authentic"
    DURABLE = "durable"
    COMPLETE = "nothing missed"
    ONCE = "once"
    FORWARD_ONLY = "forward only"
    ALONE = "each handler alone"
    SECRET = "secret"  # noqa: S105 - the promise's name


class Finding(NamedTuple):
    """One fact, and what it means for the promises it touches."""

    name: str
    severity: Severity
    promises: Sequence[Promise]
    meaning: str
