"""The state of a whole deployment in one value, for the page and for `status`."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import NamedTuple

from redis.exceptions import RedisError

from ..config import Settings
from ..errors import ConfigError, Unavailable, UnavailableReason
from ..findings import Finding, Severity
from ..storage import health
from ..storage.connections import Connections
from ..storage.keys import Keys
from ..storage.redis_errors import unavailable_reason
from ..stripe_api.watch_report import DestinationState
from .activity import Activity, read_activity
from .deployment_rules import Facts, judge
from .handler_state import HandlerState, read_handlers
from .reconciliation import Reconciliation, assess_report
from .verdict import Reason, Verdict, sum_up

COLLECT_TIMEOUT_S = 5.0

_NO_ANSWERS = {
    UnavailableReason.REDIS_SLOW: "does not answer in time",
    UnavailableReason.REDIS_UNTRUSTED: "and this process do not trust each other's certificate",
    UnavailableReason.REDIS_UNAUTHORIZED: "refuses the user, its password or its command",
    UnavailableReason.REDIS_FULL: "is full",
    UnavailableReason.REDIS_REFUSED: "answers with an error",
    UnavailableReason.NOT_DURABLE: "cannot keep writes as DURABILITY asks",
}


class Overview(NamedTuple):
    """The state of a deployment.

    Attributes:
        at: When it was collected.
        verdict: The worst of the reasons, in words.
        reasons: What someone should know or do, the worst first.
        is_available: Whether Redis answered; if not, all that follows is empty.
        activity: What the processes published.
        handlers: Each handler that is configured or has a consumer group.
        redis_findings: What the state of Redis means, fine findings included.
        endpoint_findings: What is wrong with what Stripe is set up to send here.
        destinations: What Stripe is set up to send here.
        reconciliation: None where no worker has a key of Stripe's API.
        took_s: How long the collection took.
    """

    at: datetime
    verdict: Verdict
    reasons: tuple[Reason, ...]
    is_available: bool = True
    activity: Activity = Activity()
    handlers: tuple[HandlerState, ...] = ()
    redis_findings: tuple[Finding, ...] = ()
    endpoint_findings: tuple[Finding, ...] = ()
    destinations: tuple[DestinationState, ...] = ()
    reconciliation: Reconciliation | None = None
    took_s: float = 0.0


async def collect(connections: Connections, keys: Keys, settings: Settings) -> Overview:
    """Return the present state. What it costs depends on handlers, partitions and processes only.

    Args:
        connections: Open clients.
        keys: The layout.
        settings: The handlers, the time to live of leases, and what Redis has to promise.

    Raises:
        Unavailable: Redis did not answer within a few seconds.
    """
    started_at = time.monotonic()
    try:
        async with asyncio.timeout(COLLECT_TIMEOUT_S):
            activity = await read_activity(connections, keys)
            handlers = await read_handlers(connections, keys, settings)
            redis_findings = tuple(await health.inspect(connections, settings))
    except (RedisError, OSError) as error:
        raise Unavailable(unavailable_reason(error)) from None
    now = time.time()
    report = activity.watch_report
    reconciliation = None
    if report:
        recovered = sum(day.recovered for day in activity.days)
        reconciliation = assess_report(report, now=now, recovered=recovered)
    at = datetime.fromtimestamp(now, UTC)
    endpoint_findings = report.findings if report else ()
    reasons = judge(
        Facts(at, activity, handlers, redis_findings, endpoint_findings, reconciliation)
    )
    return Overview(
        at,
        sum_up(reasons),
        reasons,
        activity=activity,
        handlers=handlers,
        redis_findings=redis_findings,
        endpoint_findings=endpoint_findings,
        destinations=report.destinations if report else (),
        reconciliation=reconciliation,
        took_s=time.monotonic() - started_at,
    )


def unavailable(reason: UnavailableReason) -> Overview:
    """Return the overview that says only that Redis does not answer, and why."""
    if reason is UnavailableReason.REDIS_UNAUTHORIZED:
        # Receivers and workers are other users: nothing is known of them.
        return _unknown(
            Reason(
                Severity.WARNING,
                "Redis",
                f"{describe_no_answer(reason)} ({reason}): the state of the deployment cannot be"
                " read from here",
                "look at the page of a worker, or speak as the user operator: a command by"
                " REDIS_URL, the page by ADMIN_REDIS_URL",
            )
        )
    return _unknown(
        Reason(
            Severity.FATAL,
            "Redis",
            f"{describe_no_answer(reason)} ({reason}): events get 503, and Stripe sends them again"
            " for three days",
            "look at Redis, at the network and at REDIS_URL",
        )
    )


def misconfigured(error: ConfigError) -> Overview:
    """Return the overview that says only which settings do not fit the deployment in Redis."""
    return _unknown(
        Reason(Severity.FATAL, "settings", str(error), "correct REDIS_URL and REDIS_PREFIX")
    )


def _unknown(reason: Reason) -> Overview:
    return Overview(datetime.now(UTC), sum_up([reason]), (reason,), is_available=False)


def describe_no_answer(reason: UnavailableReason) -> str:
    """Return what Redis does instead of answering, to be put behind its name."""
    return _NO_ANSWERS.get(reason, "does not answer")
