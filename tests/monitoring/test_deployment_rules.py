"""What each state of a deployment means: one table for all rules."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from service.findings import Finding, Severity
from service.monitoring.activity import Activity, Minute, Process
from service.monitoring.deployment_rules import Facts, judge
from service.monitoring.handler_state import HandlerState
from service.monitoring.reconciliation import AccountState, Reconciliation
from service.monitoring.verdict import sum_up

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
FINE, WARNING, FATAL = Severity
DAY_S = 86_400


def process(name: str = "r-1", kind: str = "receiver", **changes: Any) -> Process:
    """Return a process that is well."""
    works = () if kind == "receiver" else ("log",)
    fields = {"seen_s": 1.0, "ready": None, "last_event_at": None, "works": works, **changes}
    return Process(name=name, kind=kind, version="1", started_at=NOW, **fields)


WORKER = process("w-1", "worker")


def handler(name: str = "log", **changes: Any) -> HandlerState:
    """Return a handler that is well."""
    fields = {"is_configured": True, "lag": 0, "replays": 0, "oldest_s": 0.0, "dead_letters": 0}
    more = {"is_circuit_open": False, "workers": 1, "leases": ("w-1",), "failing": 0}
    return HandlerState(name, "transitions", **{**fields, **more, **changes})


def minutes(ago: int, **received: int) -> tuple[Minute, ...]:
    """Return an hour in which requests came so many minutes ago."""
    return tuple(
        Minute(NOW - timedelta(minutes=each), received if each == ago else {}, {})
        for each in reversed(range(60))
    )


def facts(
    *,
    processes: tuple[Process, ...] = (process(), WORKER),
    handlers: tuple[HandlerState, ...] = (handler(),),
    hour: tuple[Minute, ...] = (),
    silence_s: float | None = 5.0,
    redis: Mapping[str, Severity] | None = None,
    endpoints: Mapping[str, Severity] | None = None,
    reconciliation: Reconciliation | None = None,
) -> Facts:
    """Return facts that are well, but for what is named."""
    last_event_at = None if silence_s is None else NOW - timedelta(seconds=silence_s)
    return Facts(
        NOW,
        Activity(processes, hour, (), (), last_event_at),
        handlers,
        [Finding(name, severity, (), "…") for name, severity in (redis or {}).items()],
        [Finding(name, severity, (), "…") for name, severity in (endpoints or {}).items()],
        reconciliation,
    )


def accounts(failure: str = "", lag_s: float = 70.0, seen_s: float = 1.0) -> Reconciliation:
    """Return a reconciler with one account."""
    return Reconciliation(seen_s, lag_s, (AccountState("live", lag_s, failure),), 0)


@pytest.mark.parametrize(
    "well",
    [
        facts(),
        facts(processes=(process("d-1", "dev"),)),
        facts(processes=(process(), process("r-2", ready="draining"), WORKER)),
        facts(handlers=(handler(), handler("fetch", workers=0))),
        facts(handlers=(handler(oldest_s=299, lag=9),)),
        facts(redis={"clock": FINE, "fsync": WARNING, "replication": WARNING}),
        facts(hour=minutes(1, admitted=95, signature_mismatch=5)),
        facts(hour=minutes(1, signature_mismatch=2)),
        facts(hour=minutes(1, admitted=99, redis_slow=2)),
        facts(hour=minutes(6, admitted=1, redis_slow=99)),
        facts(silence_s=DAY_S - 1),
        facts(reconciliation=accounts(lag_s=900, seen_s=900)),
        facts(reconciliation=accounts("api_unreachable")),
    ],
)
def test_all_is_well(well: Facts) -> None:
    """Nothing is said while nothing has to be done: what is usual is no reason."""
    assert judge(well) == ()
    assert sum_up(judge(well)) == "all is well"


@pytest.mark.parametrize(
    ("wrong", "severity", "subject", "words"),
    [
        (facts(processes=(WORKER,)), FATAL, "receivers", "no receiver is alive"),
        (facts(processes=(process(seen_s=16), WORKER)), FATAL, "receivers", "no receiver is alive"),
        (facts(processes=(process(ready="draining"), WORKER)), FATAL, "receivers", "(draining)"),
        (facts(processes=(process(ready="redis_slow"),)), FATAL, "receivers", "(redis_slow)"),
        (facts(processes=(process(),), handlers=()), FATAL, "workers", "no worker has ever"),
        (facts(handlers=()), FATAL, "handler log", "no consumer group"),
        (facts(handlers=(handler(workers=0),)), FATAL, "handler log", "no worker calls it"),
        (facts(handlers=(handler("fetch", workers=0, lag=1),)), FATAL, "handler fetch", "fetches"),
        (facts(handlers=(handler("fetch", oldest_s=3 * DAY_S + 1),)), FATAL, "handler fetch", "30"),
        (facts(redis={"writes": FATAL}), FATAL, "Redis: writes", "…"),
        (facts(hour=minutes(59, signature_mismatch=3)), FATAL, "signatures", "none of 3"),
        (facts(hour=minutes(9, late=56, signature_mismatch=3)), WARNING, "signatures", "3 of 59"),
        (facts(hour=minutes(2, api_key_missing=1)), FATAL, "thin events", "1 thin event got 503"),
        (facts(hour=minutes(4, late=98, busy=3)), FATAL, "receivers", "3 of 101 requests"),
        (facts(endpoints={"x": FATAL}), FATAL, "Stripe's endpoints", "…"),
        (facts(reconciliation=accounts("api_forbidden")), FATAL, "reconciler", "refuses"),
        (
            facts(processes=(process(), process("r-2", ready="clocks_differ"), WORKER)),
            *(WARNING, "receiver r-2", "not ready: clocks_differ"),
        ),
        (
            facts(processes=(process(), process("r-2", seen_s=45.0), WORKER)),
            *(WARNING, "receiver r-2", "no sign of life for 45 s"),
        ),
        (
            facts(handlers=(handler(oldest_s=301, lag=9),)),
            WARNING,
            "handler log",
            "waits for 5 min",
        ),
        (facts(handlers=(handler(is_circuit_open=True),)), WARNING, "handler log", "unreachable"),
        (facts(handlers=(handler(failing=2),)), WARNING, "handler log", "2 of its transitions"),
        (facts(handlers=(handler(dead_letters=1),)), WARNING, "handler log", "1 dead letter:"),
        (
            facts(handlers=(handler(is_configured=False, workers=0),)),
            *(WARNING, "handler log", "not among HANDLERS"),
        ),
        (facts(redis={"memory": WARNING}), WARNING, "Redis: memory", "…"),
        (facts(hour=minutes(9, expired=2)), WARNING, "events", "2 events of the last hour"),
        (facts(silence_s=2 * DAY_S), WARNING, "events", "for 2 days"),
        (facts(endpoints={"x": WARNING}), WARNING, "Stripe's endpoints", "…"),
        (
            facts(reconciliation=accounts("api_unreachable", lag_s=901)),
            *(WARNING, "reconciler", "15 min ago (api_unreachable)"),
        ),
        (
            facts(reconciliation=accounts(lag_s=901)),
            *(WARNING, "reconciler", "15 min ago (it reads what was missed)"),
        ),
        (facts(reconciliation=accounts(seen_s=901)), WARNING, "reconciler", "no worker"),
        (facts(silence_s=None), FINE, "events", "no genuine event"),
        (facts(redis={"fsync": FATAL}), FATAL, "Redis: fsync", "…"),
    ],
)
def test_what_is_wrong(wrong: Facts, severity: Severity, subject: str, words: str) -> None:
    """Each trouble is one reason, which says what is the case, and what to do about it."""
    found = [each for each in judge(wrong) if each.subject == subject]
    [reason] = found
    assert reason.severity is severity
    assert words in reason.meaning
    assert reason.help or reason.meaning == "…"
    assert not reason.meaning.endswith(".")


def test_the_worst_comes_first() -> None:
    """The verdict is the worst reason, and hints do not change it."""
    many = facts(
        handlers=(handler(dead_letters=2), handler("own", workers=0)),
        silence_s=None,
    )
    assert [each.severity for each in judge(many)] == [FATAL, WARNING, FINE]
    assert sum_up(judge(many)) == "failing"
    assert sum_up(judge(many)[1:]) == "attention"
    assert sum_up(judge(many)[2:]) == "all is well"


def test_a_redis_without_writes_says_nothing_about_processes() -> None:
    """Nothing can be published while it takes no writes: that is the one reason."""
    silent = handler(workers=0), handler("fetch", workers=0, lag=1)
    stale = accounts(seen_s=901)
    found = judge(facts(processes=(), handlers=silent, redis={"role": FATAL}, reconciliation=stale))
    assert [each.subject for each in found] == ["Redis: role"]


def test_that_no_worker_runs_is_said_once() -> None:
    """Where several handlers have none, one reason names them all."""
    idle = (handler(workers=0), handler("own", workers=0, dead_letters=1), handler("third"))
    assert [(each.subject, each.meaning) for each in judge(facts(handlers=idle))] == [
        ("workers", "no worker calls log, own"),
        ("handler own", "1 dead letter: given up until replayed or dropped"),
    ]


def test_a_handler_in_trouble_is_not_late_besides() -> None:
    """Why it is late is said once."""
    down = facts(handlers=(handler(is_circuit_open=True, oldest_s=999),))
    assert len(judge(down)) == 1
