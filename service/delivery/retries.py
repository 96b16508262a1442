"""How patient we are with a handler: numbers only, no clock.

Who waits, and for what, is in `dispatch`.
"""

from __future__ import annotations

import random
from typing import NamedTuple


class RetryPolicy(NamedTuple):
    """How patient we are with a handler.

    Attributes:
        concurrency: Calls at the same time, each for another session.
        timeout_s: Seconds one call may take.
        first_s: The first retry comes within this many seconds, each later one within twice that.
        ceiling_s: The longest pause in seconds.
        attempts: Failed calls before the delivery is buried.
    """

    concurrency: int
    timeout_s: float
    first_s: float
    ceiling_s: float
    attempts: int

    def pause_s(self, failed: int) -> float:
        """Return a full-jitter pause in seconds after the *failed*-th failure, from 1."""
        doublings = min(failed - 1, 32)
        return random.uniform(0, min(self.ceiling_s, self.first_s * 2**doublings))  # noqa: S311 - jitter
