"""States of a deployment and of a session as monitoring describes them, for pages. No tests."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from service.findings import Finding, Promise, Severity
from service.inbox.session_record import SessionRecord
from service.monitoring.activity import Activity, Day, Minute, Process, Reversal
from service.monitoring.finished_attempts import Attempt
from service.monitoring.handler_state import HandlerState
from service.monitoring.overview import Overview
from service.monitoring.reconciliation import AccountState, Reconciliation
from service.monitoring.session_timeline import (
    Arrival,
    HandlerOutcome,
    State,
    Step,
    Timeline,
)
from service.monitoring.verdict import Reason
from service.stripe_api.watch_report import DestinationState
from service.transitions.transition import StatusTransition

SESSION = "vs_1MgBxx2eZvKYlo2C9bYyQ4zB"
EPOCH = 1_785_500_000_000
TYPE = "identity.verification_session."


def activity(now: datetime) -> Activity:
    """Return an hour with a wave of events, some of them bad."""
    minutes = [
        Minute(
            now.replace(second=0, microsecond=0) - timedelta(minutes=59 - index),
            {} if index % 17 == 3 else {
                "admitted": 300 + (index * 37) % 190,
                "duplicate": (index * 7) % 41,
                "late": index % 5,
                **({"signature_mismatch": 44} if index in (31, 32) else {}),
                **({"redis_unreachable": 120} if index == 45 else {}),
            },
            {
                "rabbitmq": {"delivered": 290 + (index * 29) % 200, "failed": index % 3,
                             "retried": index % 3},
                "log": {"delivered": 300, **({"dead_lettered": 9} if index == 50 else {})},
            },
        )
        for index in range(60)
    ]  # fmt: skip
    processes = [
        Process(f"receiver-{number}-7d9f-{number}", "receiver", "0.1.0", now - timedelta(days=3),
                1.2, None if number == 1 else "redis_slow", (), now - timedelta(seconds=4))
        for number in (1, 2)
    ]  # fmt: skip
    worker = Process("worker-5c8d-9", "worker", "0.1.0", now - timedelta(hours=5), 2.1, None,
                     ("rabbitmq", "log", "fetch"), None)  # fmt: skip
    silent = worker._replace(name="worker-5c8d-8", seen_s=95.0)
    days = [Day((now - timedelta(days=6 - each)).date(), each % 2, each, 0) for each in range(7)]
    reversal = Reversal(now - timedelta(hours=2), SESSION, "verified", "requires_input", "evt_1Mg5")
    return Activity(
        (*processes, worker, silent), tuple(minutes), tuple(days), (reversal,),
        now - timedelta(seconds=4),
    )  # fmt: skip


def overview(**changes: Any) -> Overview:
    """Return the overview of a deployment that needs some attention."""
    now = datetime.now(UTC)
    handler = HandlerState("log", "transitions", True, 0, 0, 0.0, 0, False, 1,
                           ("worker-5c8d-9",) * 8, 0)  # fmt: skip
    state = Overview(
        at=now,
        verdict="failing",
        reasons=(
            Reason(Severity.FATAL, "handler rabbitmq", "its queue is unreachable and 1,204 "
                   "transitions wait, the oldest for 32 min",
                   "look at the queue; its worker probes until it answers", "/handlers/rabbitmq"),
            Reason(Severity.WARNING, "dead letters", "handler rabbitmq has 61 dead letters",
                   "look at them, mend the cause, and replay them", "/dead-letters/rabbitmq"),
            Reason(Severity.FINE, "Redis", "appendfsync is not always", "", ""),
        ),
        activity=activity(now),
        handlers=(
            handler,
            handler._replace(name="rabbitmq", lag=1204, oldest_s=1893.0, dead_letters=61,
                             is_circuit_open=True, failing=3),
            handler._replace(name="my_company.handlers:open_crm", lag=None, workers=0,
                             leases=(None,) * 8, is_configured=False, replays=2),
        ),
        redis_findings=(
            Finding("clock", Severity.FINE, (Promise.AUTHENTIC,), "clocks agree"),
            Finding("writes", Severity.FINE, (Promise.DURABLE,), "Redis takes writes"),
            Finding("replication", Severity.WARNING, (Promise.DURABLE,),
                    "no replica is connected: what is lost with this Redis and its disk is lost"),
        ),
        endpoint_findings=(
            Finding("redacted_not_selected", Severity.WARNING, (Promise.COMPLETE,),
                    "we_1NOP selects five types only; select the six types by name"),
        ),
        destinations=(
            DestinationState("we_1NOPxx2eZvKYlo2C", "live", "/webhooks/stripe", False, True,
                             False, 5),
            DestinationState("ed_test_61RM8ltWcTW4mbsxf16RJyfa2xSQLHJJh1sxm7H0KT", "test",
                             "/webhooks/stripe/connect", True, False, True, 6),
        ),
        reconciliation=Reconciliation(
            3.0, 71.0,
            (AccountState("live", 71.0, ""), AccountState("live acct_1MZ", None,
                                                            "api_forbidden")),
            4,
        ),
        took_s=0.012,
    )  # fmt: skip
    return state._replace(**changes)


def healthy() -> Overview:
    """Return the overview of a deployment that is well."""
    state = overview(verdict="all is well", reasons=(), endpoint_findings=())
    processes = tuple(one._replace(ready=None) for one in state.activity.processes if one.is_alive)
    handlers = tuple(
        one._replace(lag=index, oldest_s=0.2 * index, dead_letters=0, is_circuit_open=False,
                     failing=0)
        for index, one in enumerate(state.handlers[:2])
    )  # fmt: skip
    return state._replace(activity=state.activity._replace(processes=processes), handlers=handlers)


def transition(sequence: int, previous: str | None, current: str, **more: Any) -> StatusTransition:
    """Return one transition of the session."""
    return StatusTransition(
        event_id=f"evt_1MgBxx2eZvKYlo2C0000{sequence}",
        event_type=f"{TYPE}{current}",
        occurred_at=datetime(2026, 7, 31, 14, sequence, 5, tzinfo=UTC),
        session_id=SESSION,
        session_type="document",
        previous=previous,
        current=current,
        sequence=sequence,
        **{
            "epoch": EPOCH,
            "livemode": True,
            "expected": True,
            "report_id": "vr_1MgC0B2eZvKYlo2C",
            **more,
        },
    )


def step(
    change: StatusTransition | None, outcome: str = "admitted", outcomes: Any = (), late_s: int = 1
) -> Step:
    """Return a step of the timeline: what *change* became of."""
    made = change or transition(9, "verified", "processing")
    arrival = Arrival(
        event_id=made.event_id,
        outcome=outcome,
        sequence=made.sequence,
        created_at=made.occurred_at,
        arrived_at=made.occurred_at + timedelta(seconds=late_s, milliseconds=80),
        transition=change,
        entry_id="1-1" if change else None,
    )
    return Step(arrival, tuple(outcomes))


def timeline() -> Timeline:
    """Return the timeline of a session with a reversal, a late event and a dead letter."""
    at = datetime(2026, 7, 31, 14, 5, 9, tzinfo=UTC)
    attempts = tuple(
        Attempt(at + timedelta(minutes=each), "failed" if each < 3 else "dead_lettered", each,
                "TimeoutError", "my_handler.py:41 in post; client.py:210 in _send", False)
        for each in (1, 2, 3)
    )  # fmt: skip
    fine = HandlerOutcome("log", State.DELIVERED, (Attempt(at, "delivered", 1, "", "", False),),
                          None, 0)  # fmt: skip
    dead = HandlerOutcome("rabbitmq", State.DEAD_LETTER, attempts, "3-1785500000000-0", 3)
    retrying = dead._replace(state=State.RETRYING, attempts=attempts[:2], dead_letter_id=None,
                             failed=2)  # fmt: skip
    settled = HandlerOutcome("rabbitmq", State.SETTLED, (), None, 0)
    waiting = HandlerOutcome("my_company.handlers:open_crm", State.WAITING, (), None, 0)
    return Timeline(
        SessionRecord(
            session_id=SESSION, status="requires_input", previous="verified", sequence=4,
            epoch=EPOCH, latest_created=1_785_500_400, duplicates=2,
            expires_in_s=34_000_000, events=[],
        ),
        (
            step(transition(1, None, "requires_input", epoch=EPOCH - 1), outcomes=[fine, settled]),
            step(transition(2, "requires_input", "processing", origin="thin"),
                 outcomes=[fine, dead]),
            step(transition(3, "processing", "verified", endpoint="connect"),
                 outcomes=[fine, settled, waiting], late_s=4000),
            step(None, "late", late_s=300),
            step(None, "unchanged"),
            step(transition(4, "verified", "requires_input", reversal=True, expected=False,
                            origin="events_api", last_error_code="document_expired",
                            livemode=False, account="acct_1MZ"),
                 outcomes=[fine, retrying]),
            step(None, late_s=20),
        ),
    )  # fmt: skip
