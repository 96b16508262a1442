"""The `log` handler: one structured log line per transition.

A log that cannot be written is an unreachable destination: the transition is delivered again. Of
the metadata only the keys in LOG_METADATA_KEYS are logged.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import structlog

from ..config import Settings
from ..errors import Unreachable
from ..telemetry import logs
from ..transitions.transition import StatusTransition
from . import Handler

log: structlog.stdlib.BoundLogger = structlog.get_logger()


@asynccontextmanager
async def open(environ: Mapping[str, str]) -> AsyncIterator[Handler]:  # noqa: A001 - the protocol's word
    """Yield the handler."""
    settings = Settings.from_environ(environ)
    metadata_keys = settings.log_metadata_keys
    # Below the time limit of an attempt, so that a stalled log counts no attempt.
    patience_s = settings.handler_timeout_s / 2

    async def handle(transition: StatusTransition) -> None:
        metadata = transition.metadata or {}
        write = log.warning if transition.reversal else log.info
        write(
            "transition",
            event_id=transition.event_id,
            event_type=transition.event_type,
            occurred_at=transition.occurred_at.isoformat(),
            session_id=transition.session_id,
            previous=transition.previous,
            current=transition.current,
            sequence=transition.sequence,
            epoch=transition.epoch,
            expected=transition.expected,
            reversal=transition.reversal,
            replay=transition.replay,
            stripe_status=transition.stripe_status,
            last_error_code=transition.last_error_code,
            redaction_status=transition.redaction_status,
            report_id=transition.report_id,
            livemode=transition.livemode,
            account=transition.account,
            account_name=transition.account_name,
            context=transition.context,
            origin=transition.origin,
            endpoint=transition.endpoint,
            **{f"metadata.{key}": metadata[key] for key in metadata_keys if key in metadata},
        )
        try:
            await logs.wait_until_written(patience_s)
        except ConnectionError:
            raise Unreachable("log_not_written") from None

    yield handle
