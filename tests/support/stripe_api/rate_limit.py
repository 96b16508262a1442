"""How many requests a second an account may make.

https://docs.stripe.com/rate-limits
"""

from __future__ import annotations

import time
from collections import defaultdict, deque

from .accounts import Scope
from .errors import rate_limited


class RateLimit:
    """A limit for each account and mode, over any second of the machine's time.

    Attributes:
        per_s: Requests a second; None for no limit.
        retry_after_s: The `Retry-After` of refusals, in whole seconds; None for none.
    """

    def __init__(self) -> None:
        self.per_s: int | None = None
        self.retry_after_s: int | None = None
        self._times: defaultdict[Scope, deque[float]] = defaultdict(deque)

    def count(self, scope: Scope) -> None:
        """Count a request.

        Raises:
            ApiError: 429, if the last second has seen too many.
        """
        if self.per_s is None:
            return
        times, now = self._times[scope], time.monotonic()
        while times and now - times[0] >= 1:
            times.popleft()
        if len(times) >= self.per_s:
            raise rate_limited("global-rate", self.retry_after_s)
        times.append(now)
