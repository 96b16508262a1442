"""What the state of a deployment means: whether all is well, and if not why, and what to do. Pure.

The rules and their thresholds are those of the alerts in deploy/prometheus/rules.yml, of the same
names, as far as they can be seen at one moment: an alert also waits for some minutes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Final, NamedTuple

from ..config import DAY_S
from ..errors import ApiErrorReason, UnavailableReason
from ..findings import RANKS, Finding, Severity
from ..inbox.admission import Outcome
from ..storage.health import DRAINING
from .activity import Activity, Process, sum_received
from .handler_rules import NO_FETCHER, NO_WORKER, judge_handler
from .handler_state import HandlerState
from .reconciliation import Reconciliation
from .verdict import Reason
from .words import counted, duration

# ReconcilerBehind.
MAX_RECONCILE_LAG_S: Final = 900.0
# NoEvents.
MAX_SILENCE_S: Final = DAY_S
# NoSignatureMatches: more in the last hour, and none that matches.
MAX_MISMATCHES: Final = 2
# SignaturesRejected. A self-test stays below it.
MAX_MISMATCHES_SHARE: Final = 0.05
# EventsUnavailable: the balancers in deploy/ try two receivers.
MAX_UNAVAILABLE_SHARE: Final = 0.01 * 2
UNAVAILABLE_MINUTES: Final = 5

# RedisAtRisk leaves these out: they are choices, so their warnings may be permanent.
_CHOICES: Final = {"fsync", "replication"}
# Findings that keep processes from writing that they live.
_REFUSES_WRITES: Final = {"writes", "role", "version"}
# Outcomes of requests whose signature matched.
GENUINE: Final = frozenset(
    {"admitted", "duplicate", "late", "unchanged", "expired", "queued", "ignored"}
)
_MISMATCHES: Final = ("signature_mismatch", "signature_of_other_endpoint")
_REFUSED: Final = {ApiErrorReason.UNAUTHORIZED, ApiErrorReason.FORBIDDEN}


class Facts(NamedTuple):
    """All that the rules look at."""

    at: datetime
    activity: Activity
    handlers: Sequence[HandlerState]
    redis_findings: Sequence[Finding]
    endpoint_findings: Sequence[Finding]
    reconciliation: Reconciliation | None


def judge(facts: Facts) -> tuple[Reason, ...]:
    """Return all that someone should know or do, the worst first."""
    # Without writes no sign of life and no report arrives: that one is missing says nothing then.
    can_report = not any(
        one.name in _REFUSES_WRITES and one.severity is Severity.FATAL
        for one in facts.redis_findings
    )
    reasons = [
        *_redis(facts.redis_findings),
        *(_processes(facts) if can_report else ()),
        *_events(facts),
        *_without_group(facts),
        *_handlers(facts.handlers, can_report=can_report),
        *_endpoints(facts.endpoint_findings),
        *(_reconciliation(facts.reconciliation) if can_report else ()),
    ]
    return tuple(sorted(reasons, key=lambda one: -RANKS[one.severity]))


def is_choice(finding: Finding) -> bool:
    """Return whether a finding warns of a choice: no alert fires, so it is only shown as a hint."""
    return finding.name in _CHOICES and finding.severity is Severity.WARNING


def _redis(findings: Sequence[Finding]) -> Iterator[Reason]:
    for one in findings:
        if one.severity is not Severity.FINE and not is_choice(one):
            yield Reason(
                one.severity,
                f"Redis: {one.name}",
                one.meaning,
                "type `check`: it says which promise is endangered",
            )


def _processes(facts: Facts) -> Iterator[Reason]:
    yield from _receivers([one for one in facts.activity.receivers if one.is_alive])
    if not any(one.is_alive for one in facts.activity.workers) and not facts.handlers:
        yield Reason(
            Severity.FATAL, "workers", "no worker has ever started here", "start workers (`work`)"
        )
    for one in facts.activity.processes:
        if not one.is_alive:
            yield Reason(
                Severity.WARNING,
                f"{one.kind} {one.name}",
                f"no sign of life for {duration(one.seen_s)}: it was killed, or it hangs",
                "see its log; one that is gone is shown here for ten minutes",
            )
        elif one.ready not in (None, DRAINING):
            yield Reason(
                Severity.WARNING,
                f"{one.kind} {one.name}",
                f"not ready: {one.ready}",
                "`redis.lost`, `layout.differs` or `redis.finding` in its log say more",
            )


def _receivers(alive: Sequence[Process]) -> Iterator[Reason]:
    waits = "Stripe sends again for three days"
    if not alive:
        yield Reason(
            Severity.FATAL,
            "receivers",
            f"no receiver is alive: Stripe gets no answer; {waits}",
            "start receivers (`serve`); if they run, see `activity.not_published` in their log",
        )
    elif all(one.ready for one in alive):
        words = ", ".join(sorted({str(one.ready) for one in alive}))
        yield Reason(
            Severity.FATAL,
            "receivers",
            f"no receiver is ready ({words}): Stripe gets 503; {waits}",
            "see their log",
        )


def _events(facts: Facts) -> Iterator[Reason]:
    """Yield what the outcomes of the last hour mean."""
    hour = sum_received(facts.activity.minutes)
    yield from _signatures(hour)
    if missing := hour[UnavailableReason.API_KEY_MISSING]:
        yield Reason(
            Severity.FATAL,
            "thin events",
            f"{counted(missing, 'thin event')} got 503 in the last hour: no API key of their mode",
            "set STRIPE_API_KEY for receivers and workers",
            "/endpoints",
        )
    yield from _unavailable(sum_received(facts.activity.minutes[-UNAVAILABLE_MINUTES:]))
    if expired := hour[Outcome.EXPIRED]:
        yield Reason(
            Severity.WARNING,
            "events",
            f"{counted(expired, 'event')} of the last hour came too late to be delivered",
            "`event.expired` in the log names the sessions: read their state at Stripe",
        )
    yield from _silence(facts)


def _signatures(hour: Counter[str]) -> Iterator[Reason]:
    mismatches = sum(hour[word] for word in _MISMATCHES)
    if mismatches <= MAX_MISMATCHES:
        return
    if not any(hour[word] for word in GENUINE):
        yield Reason(
            Severity.FATAL,
            "signatures",
            f"none of {mismatches:,} signatures matched in the last hour",
            "put the endpoint's signing secret into STRIPE_WEBHOOK_SECRETS",
            "/endpoints",
        )
    elif mismatches > MAX_MISMATCHES_SHARE * hour.total():
        yield Reason(
            Severity.WARNING,
            "signatures",
            f"{mismatches:,} of {hour.total():,} requests of the last hour had a wrong signature",
            "`event.rejected` in the log names the endpoint: compare its secret with Stripe's",
            "/endpoints",
        )


def _unavailable(recent: Counter[str]) -> Iterator[Reason]:
    reasons = {*UnavailableReason} - {UnavailableReason.API_KEY_MISSING}
    unavailable = {reason: recent[reason] for reason in reasons if recent[reason]}
    number, of = sum(unavailable.values()), sum(recent.values())
    if number > MAX_UNAVAILABLE_SHARE * of:
        yield Reason(
            Severity.FATAL,
            "receivers",
            f"{number:,} of {of:,} requests got 503 in the last five minutes"
            f" ({', '.join(sorted(unavailable))})",
            "the runbook's entry EventsUnavailable explains each word",
        )


def _silence(facts: Facts) -> Iterator[Reason]:
    last = facts.activity.last_event_at
    if last is None:
        yield Reason(
            Severity.FINE,
            "events",
            "no genuine event has come within seven days",
            "for a new installation: create an endpoint at Stripe; `selftest` works without one",
            "/endpoints",
        )
    elif (silence_s := (facts.at - last).total_seconds()) > MAX_SILENCE_S:
        yield Reason(
            Severity.WARNING,
            "events",
            f"no genuine event has come for {duration(silence_s)}",
            "see in Stripe's Dashboard whether the endpoint is enabled and what its deliveries say",
            "/endpoints",
        )


def _without_group(facts: Facts) -> Iterator[Reason]:
    """Yield the handlers of live workers that have not begun: `facts.handlers` lacks them."""
    called = {name for one in facts.activity.workers if one.is_alive for name in one.works}
    for name in sorted(called - {state.name for state in facts.handlers}):
        yield Reason(
            Severity.FATAL,
            f"handler {name}",
            "has no consumer group yet, so it gets nothing",
            "the log of its worker says what that waits for, such as `handler.stuck`",
        )


def _handlers(states: Sequence[HandlerState], *, can_report: bool) -> Iterator[Reason]:
    reasons = [reason for state in states for reason in judge_handler(state)]
    if not can_report:
        reasons = [one for one in reasons if one.meaning not in {NO_WORKER, NO_FETCHER}]
    idle = [one for one in reasons if one.meaning == NO_WORKER]
    if len(idle) > 1:
        names = ", ".join(one.subject.removeprefix("handler ") for one in idle)
        yield idle[0]._replace(subject="workers", meaning=f"no worker calls {names}")
        reasons = [one for one in reasons if one not in idle]
    yield from reasons


def _endpoints(findings: Sequence[Finding]) -> Iterator[Reason]:
    for one in findings:
        yield Reason(one.severity, "Stripe's endpoints", one.meaning, path="/endpoints")


def _reconciliation(found: Reconciliation | None) -> Iterator[Reason]:
    if found is None:
        return
    subject, path = "reconciler", "/endpoints"
    if found.seen_s > MAX_RECONCILE_LAG_S:
        yield Reason(
            Severity.WARNING,
            subject,
            f"no worker has compared events with Stripe's list for {duration(found.seen_s)}",
            "start workers with STRIPE_API_KEY",
            path,
        )
        return
    for one in found.accounts:
        if one.failure in _REFUSED:
            yield Reason(
                Severity.FATAL,
                subject,
                f"Stripe refuses to show events of {one.name} ({one.failure})",
                "put a key with the right permissions into STRIPE_API_KEY",
                path,
            )
        elif (one.lag_s or 0) > MAX_RECONCILE_LAG_S:
            yield Reason(
                Severity.WARNING,
                subject,
                f"events of {one.name} are compared only up to {duration(one.lag_s or 0)} ago"
                f" ({one.failure or 'it reads what was missed'})",
                "`reconcile.failed` in the worker's log says why"
                if one.failure
                else "STRIPE_API_RATE limits how fast it reads",
                path,
            )
