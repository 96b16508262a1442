"""The `log` handler: which fields a log line has."""

from __future__ import annotations

import msgspec
import structlog.testing

from service.handlers import log
from tests.support.transitions import TRANSITION

PRIVATE = msgspec.structs.replace(
    TRANSITION,
    last_error_code="consent_declined",
    report_id="vr_1",
    client_reference_id="canary_reference",
    related_customer="cus_canary",
    metadata={"tenant": "acme", "order": "canary_metadata"},
)


async def test_a_line_has_exactly_the_listed_fields() -> None:
    """A transition is one line, without `client_reference_id` and metadata."""
    async with log.open({}) as handle:
        with structlog.testing.capture_logs() as lines:
            await handle(PRIVATE)

    assert lines == [
        {
            "event": "transition",
            "log_level": "info",
            "event_id": "evt_1",
            "event_type": "identity.verification_session.verified",
            "occurred_at": "2026-08-05T12:00:00+00:00",
            "session_id": "vs_1",
            "previous": "processing",
            "current": "verified",
            "sequence": 3,
            "epoch": 1_790_000_000_000,
            "expected": True,
            "reversal": False,
            "replay": None,
            "stripe_status": "verified",
            "last_error_code": "consent_declined",
            "redaction_status": None,
            "report_id": "vr_1",
            "livemode": True,
            "account": "acct_1",
            "account_name": None,
            "context": None,
            "origin": "webhook",
            "endpoint": "acme",
        }
    ]


async def test_a_reversal_is_a_warning_and_a_replay_is_named() -> None:
    """A changed final status has severity warning; a replayed transition names its replay."""
    changed = {"previous": "verified", "reversal": True, "replay": "again"}
    async with log.open({}) as handle:
        with structlog.testing.capture_logs() as lines:
            await handle(msgspec.structs.replace(PRIVATE, **changed))

    [line] = lines
    assert line["log_level"] == "warning"
    assert line.items() >= changed.items()


async def test_named_metadata_is_added() -> None:
    """Only the metadata keys in LOG_METADATA_KEYS are written."""
    async with log.open({"LOG_METADATA_KEYS": "tenant,absent"}) as handle:
        with structlog.testing.capture_logs() as lines:
            await handle(PRIVATE)

    [line] = lines
    assert {key: line[key] for key in line if key.startswith("metadata")} == {
        "metadata.tenant": "acme"
    }
    assert "canary" not in str(line)
