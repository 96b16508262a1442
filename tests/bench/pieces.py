"""Measures the pieces of the way in by themselves: `python -m tests.bench.pieces`. Asserts no time.

In a loop each is warm in every cache; in its place among the others it costs more.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from timeit import repeat

import structlog

from service.config import LogFormat, LogLevel
from service.inbox.admission import Admission, Outcome
from service.inbox.receiver import Receipt
from service.inbox.request_log import Entry, RequestLog
from service.stripe.events import Event, parse
from service.stripe.signatures import VerifiedPayload, sign, verify
from service.telemetry import logs
from service.transitions.transition import make_change
from tests.bench.load import layouts
from tests.support.harness import SECRET

TIMES, ROUNDS = 5000, 9


def main() -> None:
    """Measure each piece, and print a table."""
    body = layouts()[0].body(0, 0)
    print(table(body))  # noqa: T201 - what it is for


def table(body: bytes) -> str:
    """Return the pieces' cost as a table."""
    now = int(time.time())
    header = sign(body, SECRET, now).encode()
    payload = VerifiedPayload(body, "01234567")
    checked = partial(verify, body, header, [SECRET], now=now, tolerance_s=300)
    rows = {
        f"verify a signature over {len(body):,} bytes": _cost_us(checked),
        f"parse {len(body):,} bytes into the typed session": _cost_us(partial(parse, payload)),
        "make of it what may leave the process": _cost_us(partial(make_change, _parsed(payload))),
        "one log line, written to a file": _line_us(),
        "the same with its metrics": _record_us(payload),
    }
    lines = [f"| {what} | {cost_us:.1f} us |" for what, cost_us in rows.items()]
    return "\n".join(["| piece | CPU |", "|---|---|", *lines])


def _cost_us(piece: Callable[[], object]) -> float:
    """Return the median CPU time of one call, in microseconds."""
    rounds = repeat(piece, timer=time.process_time, number=TIMES, repeat=ROUNDS)
    return statistics.median(rounds) / TIMES * 1e6


def _parsed(payload: VerifiedPayload) -> Event:
    event = parse(payload)
    assert isinstance(event, Event)
    return event


def _in_a_loop(make: Callable[[], Callable[[], object]], *, lines: int = 1) -> float:
    """Measure a line of what *make* makes where it writes: a loop that turns every 100 lines."""

    async def turns() -> float:
        piece = make()
        began = time.process_time()
        for _ in range(TIMES // 100):
            for _ in range(100 // lines):
                piece()
            await asyncio.sleep(0)
        logs.flush()
        return (time.process_time() - began) / TIMES * 1e6

    with tempfile.TemporaryFile() as out:
        logs.configure(LogLevel.INFO, LogFormat.JSON, out)
        return statistics.median(asyncio.run(turns()) for _ in range(ROUNDS))


def _line_us() -> float:
    """Measure the line of an admitted event, handed over as the request log does it."""
    fields = {
        "event_id": "evt_1NuN4zLkdIwHu7ix00000001",
        "event_type": "identity.verification_session.verified",
        "session_id": "vs_1NuN4zLkdIwHu7ix00000001",
        "previous": "processing",
        "current": "verified",
        "sequence": 3,
        "after_final": False,
        "last_error_code": None,
        "redaction_status": None,
        "report_id": "vr_1NuN4zLkdIwHu7ixleE6XvTz",
        "livemode": False,
        "account": None,
        "request_id": "0a1b2c3d00000001",
        "body_bytes": 2300,
        "duration_ms": 1.234,
        "secret_fingerprint": "01234567",
    }

    def writing() -> Callable[[], object]:
        log = structlog.get_logger().bind()
        return lambda: log.info("event.admitted", _fields={**fields})

    return _in_a_loop(writing)


def _record_us(payload: VerifiedPayload) -> float:
    event = _parsed(payload)
    admission = Admission(Outcome.ADMITTED, 1, None, after_final=False)
    receipt = Receipt(Outcome.ADMITTED, "01234567", event, make_change(event), admission)
    turn = [Entry(receipt, "0a1b2c3d00000001", len(payload.body), 0.001)] * 25
    return _in_a_loop(lambda: partial(RequestLog().record, turn), lines=25)


if __name__ == "__main__":
    main()
