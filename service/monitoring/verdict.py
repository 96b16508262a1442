"""The verdict on a deployment, and the reasons for it: what there is to know or to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple

from ..findings import Severity, worst

Verdict = Literal["all is well", "attention", "failing"]
_VERDICTS: Final[Mapping[Severity, Verdict]] = {
    Severity.FINE: "all is well",
    Severity.WARNING: "attention",
    Severity.FATAL: "failing",
}


class Reason(NamedTuple):
    """One thing to know or to do.

    Attributes:
        severity: `fatal`: events are not accepted or not delivered now. `warning`: something has to
            be done. `fine`: only a hint, which does not change the verdict.
        subject: What it is about, such as `receivers` or `handler rabbitmq`.
        meaning: What is the case, as a sentence without its full stop.
        help: What to do, in the same form; empty if nothing. Commands, and words of the log, stand
            between backticks.
        path: The path on the page that shows more; empty if none does.
    """

    severity: Severity
    subject: str
    meaning: str
    help: str = ""
    path: str = ""


def sum_up(reasons: Sequence[Reason]) -> Verdict:
    """Return what the worst of some reasons means."""
    return _VERDICTS[worst(one.severity for one in reasons)]
