"""What all connections of one listener share. One connection by itself is `closing`'s."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from ..errors import UnavailableReason
from ..telemetry import metrics

log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(kw_only=True)
class ListenerState:
    """What all connections of one listener share.

    Attributes:
        receive_timeout_s: Seconds a client has to send a whole request, and to take a response.
        max_connections: How many may be open at once.
        available_slots: Returns how many more requests the application can take.
        draining: Whether each response is its connection's last.
        lingering: How many connections linger after their final response.
        shed: How many requests were answered 503 unread since the last report.
        requests_this_turn: How many requests were completed in this turn of the event loop. The
            application takes its slots for them only when their tasks run, in the next turn.
    """

    receive_timeout_s: float
    max_connections: int
    available_slots: Callable[[], float]
    draining: bool = False
    lingering: int = 0
    shed: int = 0
    requests_this_turn: int = 0

    def is_overloaded(self) -> bool:
        """Say whether all slots are taken, or will be when this loop turn is over."""
        return self.requests_this_turn >= self.available_slots()

    def end_turn(self) -> None:
        """Start counting again: the requests of the last turn have taken their slots."""
        self.requests_this_turn = 0

    def report_shed(self) -> None:
        """Count and log the shed requests together: one by one they would cost more."""
        count, self.shed = self.shed, 0
        if count:
            metrics.EVENTS.labels(UnavailableReason.BUSY, metrics.OTHER_TYPE).inc(count)
            log.error("requests.shed", reason=UnavailableReason.BUSY, requests=count)
