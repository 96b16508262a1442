"""What must hold for any bytes: the laws that fuzzing and `test_targets` try to break. No tests.

A law raises if it is broken.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable
from functools import cache

import msgspec
import orjson

from service.config import Settings, describe
from service.errors import ConfigError, Rejected
from service.secret import MASK, Secret
from service.stripe import events, verification_report, verification_session
from service.stripe.events import ApiPayload, Event, Ignored, ThinEvent, parse
from service.stripe.signatures import VerifiedPayload, verify
from service.stripe.verification_report import VerificationReport
from service.stripe.verification_session import VerificationSession
from service.transitions import cloudevents, stream_entry, thin_notification
from service.transitions.ordering import created_at, order_key, state_hash
from service.transitions.thin_notification import make_notification
from service.transitions.transition import SessionChange, make_change
from tests.support.programs import FIXTURES

KEY = b"whsec_tests"
NOW = 1_785_931_200
TOLERANCE_S = 300
# In a header these stand for the current time and the valid digest, which a search cannot guess.
TIME, DIGEST = b"@T", b"@D"
BETWEEN = b"\0\0"
EVENT_ID = r"evt_[A-Za-z0-9_]{1,250}"

NOWHERE = FIXTURES / "nowhere"
NAMES = [row.name for row in describe()]
FIRST_LETTER = ord(" ")
ALWAYS_TRUE = {
    "SESSION_RETENTION_DAYS: expected more than MAX_EVENT_AGE_DAYS",
    "RETRY_MAX_DELAY_S: expected at least RETRY_INITIAL_DELAY_S",
}
# A path into an event may consist of declared field names, and indices, only.
DECLARED = {
    name
    for module in (events, verification_session, verification_report)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
    for name in kind.__struct_fields__
}


def signature(found: bytes) -> None:
    """Check that a header and a body, separated by two zeros, are verified or rejected."""
    header, _, body = found.partition(BETWEEN)
    digest = hmac.new(KEY, b"%d.%b" % (NOW, body), hashlib.sha256).hexdigest().encode()
    header = header.replace(TIME, b"%d" % NOW).replace(DIGEST, digest)
    try:
        payload = verify(body, header, [Secret(KEY)], now=NOW, tolerance_s=TOLERANCE_S)
    except Rejected as error:
        _check_nothing_repeated(error)
        return
    assert payload.body == body
    # Any other time would need another digest, and only this test has the key.
    items = [item.removeprefix(b" ") for item in header.split(b",")]
    assert b"v1=" + digest in items
    assert b"t=%d" % NOW in items


def body(found: bytes) -> None:
    """Check that a signed body is parsed, ignored or rejected, and what follows from it."""
    for payload in (VerifiedPayload(found, "fingerprint"), ApiPayload(found)):
        try:
            event = parse(payload)
        except Rejected as error:
            _check_nothing_repeated(error)
        else:
            _check_event(event)


def _check_event(event: Event | ThinEvent | Ignored) -> None:
    repr(event)
    if isinstance(event, Ignored):
        assert event.event_id is None or re.fullmatch(EVENT_ID, event.event_id)
        return
    if isinstance(event, ThinEvent):
        _check_thin(event)
        return
    assert DECLARED.issuperset(name for path in event.skipped_fields for name in path.split("."))
    _check_delivered(event)


def _check_thin(event: ThinEvent) -> None:
    """Check that a thin event can be fetched, and is stored unchanged."""
    assert re.fullmatch(EVENT_ID, event.event_id)
    assert re.fullmatch(r"vs_[A-Za-z0-9_]{1,250}", event.session_id)
    assert event.context is None or re.fullmatch(r"[!-~]+", event.context)
    assert 0 <= event.created < 10**11
    notification = make_notification(event, received_at=1.5)
    stored = {b"notification": thin_notification.pack(notification)}
    assert thin_notification.unpack(stored) == notification


def _check_delivered(event: Event) -> None:
    """Check an event's order key, and that what it says reaches a handler unchanged."""
    change = make_change(event)
    key = order_key(change, event.created)
    assert 0 <= key < 2**53
    assert created_at(key) == event.created
    assert re.fullmatch("[0-9a-f]{16}", state_hash(change))
    stored = {
        b"change": stream_entry.pack(change),
        b"previous": b"",
        b"sequence": b"1",
        b"epoch": b"1",
    }
    transition = stream_entry.unpack(stored)
    names = SessionChange.__struct_fields__
    assert [getattr(transition, name) for name in names] == [getattr(change, n) for n in names]
    sent = orjson.loads(cloudevents.message(transition).body)
    assert sent["data"] == orjson.loads(msgspec.json.encode(transition))


def report(found: bytes) -> None:
    """Check that bytes are a report or a session, or the error repeats nothing of them."""
    for kind in (VerificationReport, VerificationSession):
        try:
            repr(kind.from_json(found))
        except ValueError as error:
            raised: BaseException | None = error
            while raised is not None:
                # These errors hold their whole input.
                assert not isinstance(raised, orjson.JSONDecodeError | UnicodeError)
                raised = raised.__context__


def environment(found: bytes) -> None:
    """Check that settings are accepted, or rejected in words that do not depend on the values.

    The bytes are one line for each variable, which begins with the letter for its name.
    """
    environ = {
        NAMES[(one[0] - FIRST_LETTER) % len(NAMES)]: one[1:].decode(errors="surrogateescape")
        for one in found.split(b"\n")
        if one
    }
    try:
        settings = Settings.from_environ(environ, run_secrets=NOWHERE)
    except ConfigError as error:
        words = ALWAYS_TRUE.union(*(_refused(name) for name in environ))
        assert words.issuperset(error.problems)  # noqa: PT017 (a fuzzer's law, not a test)
        assert error.__context__ is None  # noqa: PT017 (as above)
        return
    secrets = [secret for several in settings.secrets.values() for secret in several]
    assert {repr(secret) for secret in secrets} <= {MASK}


@cache
def _refused(name: str) -> frozenset[str]:
    """Return the problems reported for a value that no setting accepts."""
    try:
        Settings.from_environ({name: "canary-é7 \t"}, run_secrets=NOWHERE)
    except ConfigError as error:
        return frozenset(error.problems)
    return frozenset()


def _check_nothing_repeated(error: Rejected) -> None:
    """Check that an error carries nothing of the rejected input."""
    assert error.__context__ is None
    assert error.__cause__ is None
    path = re.sub(r"\[(\.\.\.|\d+)\]", "", error.field or "")
    assert not path or DECLARED.issuperset(path.split("."))


LAWS: dict[str, Callable[[bytes], None]] = {
    "signature": signature,
    "body": body,
    "report": report,
    "environment": environment,
}


def line(number: int, value: str) -> bytes:
    """Return the line with which `environment` sets the variable of that number."""
    return bytes([FIRST_LETTER + number]) + value.encode(errors="surrogateescape")


def corpus(name: str) -> list[bytes]:
    """Return the examples that the search of a law starts from."""
    if name == "signature":
        parts = (b"t=@T,v1=@D", b"v1=@D, t=@T", b"t=@T,v0=@D,v1=" + b"0" * 64, b"t=1,t=@T,v1=@D")
        return [part + BETWEEN + b"{}" for part in parts]
    if name == "environment":
        rows = [line(n, row.default) for n, row in enumerate(describe()) if row.default]
        more = [line(0, "whsec_a,whsec_b"), line(1, "rediss+cluster://a:1,b:2")]
        return [b"\n".join(rows), *rows, *more]
    bodies = [path.read_bytes() for path in sorted(FIXTURES.glob("*.json"))]
    if name == "body":
        return bodies
    found = [orjson.loads(one) for one in bodies]
    return [orjson.dumps(one["data"]["object"]) for one in found if "data" in one]
