"""What holds for all connections of one listener. Each connection by itself is `protocol`'s."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from ..errors import UnavailableReason
from ..telemetry import metrics

log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(kw_only=True)
class ListenerState:
    """What holds for all connections of one listener.

    Attributes:
        receive_timeout_s: Seconds a client has for a whole request.
        most_connections: How many may be open at once.
        available_slots: Says how many more requests can be taken in hand.
        draining: Whether each answer is its connection's last.
        lingering: How many have been answered for the last time, and wait to be closed.
        shed: How many requests were answered 503 unread, and are not counted and logged yet.
        come: How many have come whole in this loop turn, and are taken in hand only after it.
    """

    receive_timeout_s: float
    most_connections: int
    available_slots: Callable[[], float]
    draining: bool = False
    lingering: int = 0
    shed: int = 0
    come: int = 0

    def is_busy(self) -> bool:
        """Say whether all places are taken, or will be when this loop turn is over."""
        return self.come >= self.available_slots()

    def end_turn(self) -> None:
        """Count from nothing again: whoever has come is in hand by now, or answered."""
        self.come = 0

    def report(self) -> None:
        """Count and log the requests that were shed of late: one by one they would cost more."""
        count, self.shed = self.shed, 0
        if count:
            metrics.events(UnavailableReason.BUSY, metrics.OTHER_TYPE).inc(count)
            log.error("requests.shed", reason=UnavailableReason.BUSY, requests=count)
