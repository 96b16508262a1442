"""CPU time, for comparing the cost of two ways; never for a limit in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable


def cost(call: Callable[[], object], *, times: int = 1) -> float:
    """Return the minimum CPU time of *call*, for comparison with that of another."""
    found = []
    for _ in range(7):
        began = time.thread_time()
        for _ in range(times):
            call()
        found.append(time.thread_time() - began)
    return min(found)
