"""What people see of the log: one short line for each request and each hand-over."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.telemetry.redaction import sanitize
from service.telemetry.terminal_log import WIDTH, render
from service.transitions.lifecycle import Status

AT = datetime(2026, 11, 29, 13, 5, 12, 345_678, UTC)
SESSION = "vs_1QwErTyUiOpAsDfGhJkLzXcV"
TIME = AT.astimezone().strftime("%H:%M:%S.345")
# What the lines about each request hold, of which nothing is worth a look.
USUAL: dict[str, Any] = {
    "event_id": "evt_1QwErTyUiOpAsDfGhJkLzXcV",
    "event_type": "identity.verification_session.processing",
    "session_id": SESSION,
    "livemode": False,
    "account": None,
    "endpoint": None,
    "report_id": "vr_1",
    "request_id": "7e2c",
    "body_bytes": 2048,
    "duration_ms": 3.141,
    "secret_fingerprint": "ab12",
    "after_final": False,
    "reversal": False,
}
CHANGED: dict[str, Any] = {"previous": "requires_input", "current": "processing", "sequence": 2}
KEPT: dict[str, Any] = {"status": "verified", "ignored_status": "processing", "sequence": 4}
FAILED: dict[str, Any] = {
    "handler": "mine:open",
    "event_id": "evt_1",
    "session_id": SESSION,
    "sequence": 2,
    "error": "LookupError",
    "place": "/app/mine.py:9 handle",
}


REQUEST: dict[str, Any] = {"request_id": "7e2c", "body_bytes": 9}


def line(event: str, level: str = "info", **fields: Any) -> str:
    """Return a line without colors and without its time."""
    found = render(
        sanitize({"timestamp": AT, "level": level, "event": event, **fields}), colors=False
    )
    assert found.startswith(f"{TIME} ")
    return found.removeprefix(f"{TIME} ")


# Each line, and the event and fields that make it.
OF_EVENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "in {} requires_input → processing #2 3ms": ("admitted", CHANGED),
    "in {} new → processing #1 3ms": ("admitted", {"current": "processing", "sequence": 1}),
    "!  {} requires_input → processing #2 3ms livemode account=acct_1 reversal": (
        "admitted",
        CHANGED | {"reversal": True, "account": "acct_1", "livemode": True},
    ),
    "in {} requires_input → processing #2 3ms document_expired": (
        "admitted",
        CHANGED | {"last_error_code": "document_expired"},
    ),
    "in {} late processing (verified) 3ms": ("late", KEPT),
    "!  {} late processing (verified) 3ms after_final": ("late", KEPT | {"after_final": True}),
    "in {} duplicate (verified) 3ms": ("duplicate", KEPT),
    "in {} unchanged (verified) 3ms": ("unchanged", {"status": "verified", "sequence": 4}),
    "in {} expired processing 3ms": ("expired", {"ignored_status": "processing"}),
    "in {} queued processing 3ms": ("queued", {"event_type": f"v1.{USUAL['event_type']}"}),
    "in {} requires_input → processing fetched #2 3ms": (
        "fetched",
        CHANGED | {"outcome": "admitted"},
    ),
    "in {} late processing (verified) fetched 3ms": ("fetched", KEPT | {"outcome": "late"}),
    "!  {} requires_input → processing recovered #2 3ms": (
        "recovered",
        CHANGED | {"outcome": "admitted"},
    ),
    "in evt_1QwErTyUiOpAsDfGhJkLzXcV ignored other_type charge.succeeded 3ms": (
        "ignored",
        {"session_id": None, "event_type": "charge.succeeded", "reason": "other_type"},
    ),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "!  rejected signature_mismatch <1ms request_id=7e2c": (
        "event.rejected",
        {"reason": "signature_mismatch", "field": None, "duration_ms": 0.2, **REQUEST},
    ),
    "!  {} delivery.retried LookupError #2 mine:open attempt=1 delay_s=2.1 /app/mine.py:9 handle": (
        "delivery.retried",
        FAILED | {"attempt": 1, "delay_s": 2.1},
    ),
    "!! {} delivery.dead_lettered exhausted LookupError #2 mine:open /app/mine.py:9 handle": (
        "delivery.dead_lettered",
        FAILED | {"reason": "exhausted"},
    ),
    "   process.started port=8000 works=log,mine:open": (
        "process.started",
        {"port": 8000, "works": ["log", "mine:open"]},
    ),
    "   slow.seen 61.2s on": ("slow.seen", {"duration_ms": 61_234, "on": True, "off": False}),
    """   odd.seen text="a=\\"b\\"" nested={"x": [1, null]}""": (
        "odd.seen",
        {"text": 'a="b"', "nested": {"x": [1, None]}},
    ),
}


@pytest.mark.parametrize("shown", OF_EVENTS)
def test_a_line_says_what_became_of_an_event(shown: str) -> None:
    """Each outcome has the same shape; what is null or usual is left out."""
    event, fields = OF_EVENTS[shown]
    level = "warning" if shown.startswith("!") else "info"

    assert line(f"event.{event}", level, **(USUAL | fields)) == shown.format(SESSION)


@pytest.mark.parametrize("shown", OTHERS)
def test_other_lines_say_why_and_then_everything_else(shown: str) -> None:
    """Warnings and errors stand out, with reason, class and place; other fields have names."""
    event, fields = OTHERS[shown]
    level = {"! ": "warning", "!!": "error"}.get(shown[:2], "info")

    assert line(event, level, **fields) == shown.replace("{}", SESSION)


def test_a_hand_over_has_the_shape_of_its_event() -> None:
    """The log handler's own line is its hand-over; nothing of either is null or usual."""
    own = {**USUAL, **CHANGED, "expected": True, "epoch": 7, "origin": "webhook", "replay": None}

    queue = line("delivery.delivered", **(own | {"handler": "sqs"}))
    assert queue == f"ok {SESSION} → processing #2 3ms sqs"
    own |= {"duration_ms": None, "last_error_code": "document_expired"}
    assert line("transition", **own) == f"ok {SESSION} requires_input → processing #2 log"
    own |= {"origin": "thin", "replay": "r1", "expected": False, "metadata.user": "u 1"}
    for word in ("origin=thin", "replay=r1", "unexpected", 'metadata.user="u 1"'):
        assert word in line("transition", **own)


@pytest.mark.parametrize(("previous", "current"), [*permutations([None, *Status], 2)])
def test_usual_lines_fit(previous: str | None, current: str | None) -> None:
    """80 columns suffice for an event with a real id, and for its hand-overs."""
    change = {"previous": previous, "current": current or "redacted", "sequence": 9}
    lines = [
        line("event.admitted", **{**USUAL, **change}),
        line("event.late", **{**USUAL, "status": current, "ignored_status": previous}),
        line("transition", **{**USUAL, **change, "duration_ms": None}),
        line("delivery.delivered", **{**USUAL, **change, "handler": "redis_stream"}),
    ]

    assert max(len(each) + len(TIME) + 1 for each in lines) <= WIDTH
    assert all(SESSION in each for each in lines)


def test_colors_change_nothing_else() -> None:
    """Without its colors, a colored line is the plain one."""
    fields = sanitize({**USUAL, **CHANGED, "timestamp": AT, "level": "info"})
    for event in ("event.admitted", "event.rejected", "delivery.delivered"):
        colored = render({**fields, "event": event}, colors=True)
        assert "\x1b[" in colored
        assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == render(
            {**fields, "event": event}, colors=False
        )


_NAMES = st.sampled_from([*USUAL, *CHANGED, *KEPT, *FAILED, "exception", "level", "timestamp"])
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)


@given(
    st.sampled_from(["event.admitted", "event.late", "transition", "delivery.retried"]) | st.text(),
    st.dictionaries(_NAMES | st.text(max_size=9), _VALUES, max_size=9),
)
def test_no_field_breaks_a_line(event: str, fields: dict[str, Any]) -> None:
    """Whatever fields hold, a line is one line without control characters."""
    found = render(sanitize({"event": event, **fields}), colors=False)

    first, *places = found.split("\n")
    assert bool(places) <= isinstance(fields.get("exception"), list)
    assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u202e]", first)
