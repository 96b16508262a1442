"""Looks at what Stripe is set up to send here, now and then, for the reconciler.

What is found is logged once and exported, and the types that are selected are those that the
reconciler reads. See `destinations` and `endpoints`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence

import structlog

from ..config import Settings
from ..findings import RANKS, Finding
from ..telemetry import metrics
from .client import Caller, StripeApi
from .destinations import ALL_TYPES, Survey, survey_all
from .endpoints import EndpointFinding, assess
from .rate_limit import Priority
from .watch_report import DestinationState

LOOK_EVERY_S = 300.0

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class EndpointWatch:
    """What was seen last.

    Args:
        settings: What the findings depend on.
        clock: Returns the time in seconds, from any beginning.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._surveys: dict[bool, Survey] = {}
        self._findings: list[Finding] = []
        self._due_at = -math.inf
        self._lock = asyncio.Lock()

    async def select_types(self, api: StripeApi, caller: Caller) -> Sequence[str]:
        """Return the types of events to read for an account; look again first, if it is time.

        Raises:
            Unavailable: Redis, where the budget of requests is, did not answer.
        """
        async with self._lock:
            if self._clock() >= self._due_at:
                await self._look(api)
        seen = self._surveys.get(caller.is_live)
        return seen.selected_types(connected=caller.account is not None) if seen else ALL_TYPES

    @property
    def findings(self) -> Sequence[Finding]:
        """What is wrong with what Stripe is set up to send here."""
        return self._findings

    @property
    def destinations(self) -> list[DestinationState]:
        """What Stripe is set up to send here."""
        return [
            DestinationState(
                one.id,
                seen.mode,
                one.path,
                is_thin=one.is_thin,
                is_enabled=one.is_enabled,
                is_for_connected=one.for_connected,
                types=len(one.types),
            )
            for seen in self._surveys.values()
            for one in seen.destinations
        ]

    def forget(self) -> None:
        """Report nothing any more: another process looks now."""
        self._note([])
        self._due_at = -math.inf

    async def _look(self, api: StripeApi) -> None:
        surveys = await survey_all(api, Priority.RECONCILE)
        # Where Stripe does not answer, what was seen before holds: else types that no destination
        # selects would be read, and delivered.
        self._surveys = {
            one.is_live: self._surveys.get(one.is_live, one) if one.failures else one
            for one in surveys
        }
        self._due_at = self._clock() + LOOK_EVERY_S
        self._note(assess(surveys, self._settings))

    def _note(self, found: list[Finding]) -> None:
        """Export *found*, and log what was not found before."""
        severities = dict.fromkeys(EndpointFinding, 0)
        for one in found:
            name = EndpointFinding(one.name)
            severities[name] = max(severities[name], RANKS[one.severity])
            if one not in self._findings:
                log.warning(
                    "stripe.finding", finding=name, severity=one.severity, meaning=one.meaning
                )
        for name, severity in severities.items():
            metrics.STRIPE_FINDING_SEVERITY.labels(name).set(severity)
        self._findings = found
