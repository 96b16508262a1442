"""Events are parsed, ignored or rejected, and a rejection holds no input."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from service.errors import Rejected, RejectionReason
from service.stripe.decoding import _fields
from service.stripe.events import (
    ApiPayload,
    Event,
    EventRequest,
    Ignored,
    IgnoredReason,
    ThinEvent,
    parse,
)
from service.stripe.signatures import VerifiedPayload
from service.stripe.verification_session import LastError, VerificationSession
from tests.support.programs import FIXTURES

CANARY = "canary-66600666"
TYPE = "identity.verification_session.processing"
CREATED = 1_785_931_200
BARE: dict[str, Any] = {
    "id": "evt_1",
    "type": TYPE,
    "created": CREATED,
    "data": {"object": {"id": "vs_1", "status": "processing"}},
}


# In place of a value: the field is missing.
MISSING = object()


def placed(path: str, value: Any, event: dict[str, Any] = BARE) -> dict[str, Any]:
    """Return *event*, by default the smallest one, with *value* at *path*."""
    event = copy.deepcopy(event)
    *parents, last = path.split(".")
    at = event
    for name in parents:
        at = at[name]
    at[last] = value
    if value is MISSING:
        del at[last]
    return event


def parsed(found: Any) -> Event | ThinEvent | Ignored:
    """Parse *found*: bytes as they are, anything else as JSON."""
    body = found if isinstance(found, bytes) else json.dumps(found).encode()
    return parse(VerifiedPayload(body, "fingerprint"))


def event_of(found: Any) -> Event:
    """Parse *found* and expect an event."""
    event = parsed(found)
    assert isinstance(event, Event)
    return event


def rejection(found: Any) -> tuple[str, str | None]:
    """Expect a rejection whose error holds no input; return its reason and field."""
    with pytest.raises(Rejected) as rejected:
        parsed(found)
    error = rejected.value
    assert (error.__context__, error.__cause__) == (None, None)
    assert vars(error) == {"reason": error.reason, "field": error.field}
    assert error.args == (" ".join(filter(None, (error.reason, error.field))),)
    assert CANARY not in ascii((error.args, vars(error)))
    return error.reason, error.field


@pytest.mark.parametrize(
    "path", sorted(FIXTURES.glob("*identity.*.json")), ids=lambda path: path.stem
)
def test_recorded_events_are_parsed(path: Path) -> None:
    """The fields of a recorded event are parsed unchanged."""
    found = json.loads(path.read_bytes())

    event = event_of(path.read_bytes())

    plain = ("id", "type", "created", "livemode", "api_version", "pending_webhooks")
    assert {name: getattr(event, name) for name in plain} == {name: found[name] for name in plain}
    assert event.request == EventRequest(**found["request"])
    assert event.session is event.data.object
    assert event.session.id == found["data"]["object"]["id"]


def test_the_barest_event() -> None:
    """Five fields make an event; all others are optional and None if missing."""
    event = event_of(BARE)

    assert (event.id, event.type, event.created) == ("evt_1", TYPE, CREATED)
    assert (event.session.id, event.session.status) == ("vs_1", "processing")
    optional = ("livemode", "account", "context", "api_version", "pending_webhooks", "request")
    assert {getattr(event, name) for name in optional} == {None}


@pytest.mark.parametrize(
    "path",
    ["id", "type", "created", "data", "data.object", "data.object.id", "data.object.status"],
)
def test_required_fields(path: str) -> None:
    """An event without one of the required fields, or with null in it, is rejected."""
    assert rejection(placed(path, MISSING)) == (RejectionReason.FIELD_MISSING, path)
    assert rejection(placed(path, None)) == (RejectionReason.FIELD_MISTYPED, path)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (None, None),
        ("req_1", "req_1"),
        ({}, EventRequest()),
        ({"id": None, "idempotency_key": None}, EventRequest()),
        ({"id": "req_1", "new": 1}, EventRequest(id="req_1")),
    ],
    ids=["null", "bare", "empty", "nulls", "object"],
)
def test_requests(request_: Any, expected: object) -> None:
    """The request may be an object, null, or a bare id as in old API versions."""
    assert event_of(placed("request", request_)).request == expected


def test_connect_and_context() -> None:
    """The connected account and the authentication context are parsed."""
    event = event_of(BARE | {"account": "acct_1", "context": "acct_2/acct_1"})

    assert (event.account, event.context) == ("acct_1", "acct_2/acct_1")


@pytest.mark.parametrize("path", ["new", "data.new", "data.object.new", "data.previous_attributes"])
def test_unknown_fields_are_tolerated(path: str) -> None:
    """Undeclared fields, at any level, change nothing."""
    assert parsed(placed(path, {"deep": [CANARY]})) == parsed(BARE)


@pytest.mark.parametrize(
    "event_type",
    ["identity.verification_session.requires_action", "identity.verification_session."],
)
def test_new_event_types_of_sessions_are_parsed(event_type: str) -> None:
    """An event type with the prefix of session events is accepted, even an unknown one."""
    assert event_of(BARE | {"type": event_type}).type == event_type


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"type": "charge.succeeded"}, "other_type"),
        ({"type": "identity.verification_report.created"}, "other_type"),
        ({"type": "identity.verification_session"}, "other_type"),
        ({"type": "Identity.Verification_Session.created"}, "other_type"),
        ({"type": " identity.verification_session.created"}, "other_type"),
        ({"type": ""}, "other_type"),
        ({"type": "ping", "object": "event"}, "other_type"),
        ({"type": "v2.core.event_destination.ping", "object": "v2.core.event"}, "thin"),
        ({"type": "v1.identity.verification_report.created", "object": "v2.core.event"}, "thin"),
        ({"type": "v1.identity.verification_session.verified", "object": "event"}, "other_type"),
        ({"type": TYPE, "object": "v2.core.event"}, "thin"),
        ({"type": "charge.succeeded", "data": CANARY, "created": CANARY}, "other_type"),
    ],
    ids=str,
)
def test_other_events_are_ignored(found: dict[str, Any], reason: str) -> None:
    """Events of other types, pings and other thin events are ignored because of their type."""
    expected = Ignored(IgnoredReason(reason), "evt_1", found["type"])

    assert parsed({"id": "evt_1", **found}) == expected


def thin(word: str = "verified", **fields: Any) -> dict[str, Any]:
    """Return a thin event about a session, with other values for some fields."""
    return {
        "id": "evt_thin",
        "object": "v2.core.event",
        "type": f"v1.identity.verification_session.{word}",
        "created": "2026-10-05T12:00:00.123Z",
        "livemode": False,
        "context": None,
        "reason": {"type": "request", "request": {"id": CANARY, "idempotency_key": CANARY}},
        "related_object": {"id": "vs_1", "type": "identity.verification_session", "url": CANARY},
        **fields,
    }


@pytest.mark.parametrize("livemode", [True, False, None])
@pytest.mark.parametrize(
    "word", ["canceled", "created", "processing", "redacted", "requires_input", "verified", "new"]
)
def test_thin_events_of_sessions_are_recognized(word: str, livemode: bool | None) -> None:
    """A thin event about a session is returned as one, without its URL."""
    found = thin(word, livemode=livemode, context="acct_1", snapshot_event="evt_1")

    assert parsed(found) == ThinEvent(
        event_id="evt_thin",
        event_type=f"v1.identity.verification_session.{word}",
        created=1_791_201_600,
        is_live=livemode is not False,
        context="acct_1",
        session_id="vs_1",
        snapshot_event_id="evt_1",
    )


@pytest.mark.parametrize("name", ["livemode", "context", "reason", "snapshot_event"])
def test_optional_fields_of_thin_events(name: str) -> None:
    """A field that is missing or null has its default, and any `reason` is skipped."""
    whole = thin(snapshot_event="evt_1")
    missing = placed(name, MISSING, whole)

    assert parsed(missing) == parsed(placed(name, None, whole))
    assert isinstance(parsed(missing), ThinEvent)
    assert parsed(thin(reason=CANARY, snapshot_event=[CANARY])) == parsed(thin())


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("id", [MISSING, 1, None, CANARY, "evt_", f"evt_1 {CANARY}", "evt_1\n"]),
        ("livemode", [CANARY, 2, []]),
        ("context", [1, "", "a b", "a\r\nb: c", "é", "a" * 251]),
        ("created", [MISSING, 1, 1.5, True, None, "", CANARY, "1791201600"]),
        ("related_object", [MISSING, None, CANARY, []]),
        ("related_object.id", [MISSING, None, "pi_1", f"vs_1/{CANARY}", f"vs_1?{CANARY}"]),
        ("related_object.type", [None, "payment_intent"]),
    ],
)
def test_unreadable_thin_events(path: str, values: list[Any]) -> None:
    """Without a readable value in a field that is needed to fetch the event, it is rejected."""
    for value in values:
        is_missing = value is MISSING
        reason = RejectionReason.FIELD_MISSING if is_missing else RejectionReason.FIELD_MISTYPED
        assert rejection(placed(path, value, thin())) == (reason, path), value


@pytest.mark.parametrize(
    ("created", "expected"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("2026-10-05T12:00:00Z", 1_791_201_600),
        ("2026-10-05T12:00:00.999999999Z", 1_791_201_600),
        ("2026-10-05T14:00:00.5+02:00", 1_791_201_600),
        ("2026-10-05T06:30:00-05:30", 1_791_201_600),
        ("5138-11-16T09:46:39Z", 10**11 - 1),
        ("5138-11-16T09:46:40Z", None),
        ("1969-12-31T23:59:59Z", None),
        ("0001-01-01T00:00:00+23:59", None),
        ("9999-12-31T23:59:59-23:59", None),
        ("2026-10-05T12:00:00", None),
        ("2026-10-05", None),
        ("2026-02-30T12:00:00Z", None),
        ("2026-10-05T25:00:00Z", None),
        ("2026-10-05T12:00:00.Z", None),
        ("2026-10-05T12:00:00Z ", None),
        ("2026-10-05T12:00:00.1.1Z", None),
        ("٢026-10-05T12:00:00Z", None),
    ],
)
def test_created_of_thin_events(created: str, expected: int | None) -> None:
    """A time of RFC 3339 becomes its whole second, which is that of the snapshot event."""
    check_created(thin(created=created), expected)


def check_created(found: dict[str, Any], expected: int | None) -> None:
    """Check the second in which an event was created, or that it is rejected for that field."""
    if expected is None:
        assert rejection(found) == (RejectionReason.FIELD_MISTYPED, "created")
    else:
        event = parsed(found)
        assert not isinstance(event, Ignored)
        assert event.created == expected


def test_placeholders_in_answers_of_the_api_are_absent() -> None:
    """What Stripe has redacted is missing in its answer; in a webhook it is what was sent."""
    session = {
        "id": "vs_1",
        "status": "verified",
        "client_reference_id": "[redacted]",
        "metadata": {"a": "[redacted]", "b": "[redacted] it"},
        "last_error": {"code": "[redacted]"},
        "last_verification_report": "[redacted]",
        "related_person": "[redacted]",
    }
    body = json.dumps(placed("data.object", session)).replace('"[redacted]"', '"\\u005bredacted]"')

    event = parse(ApiPayload(body.encode()))

    assert isinstance(event, Event)
    assert event.session == msgspec.structs.replace(
        VerificationSession(id="vs_1", status="verified"),
        metadata={"b": "[redacted] it"},
        last_error=LastError(),
    )
    assert event.skipped_fields == ()
    assert event_of(body.encode()).session.client_reference_id == "[redacted]"


def test_answers_of_the_api_are_parsed_like_webhooks() -> None:
    """An answer gives the same event, and shows nothing of itself."""
    for name in FIXTURES.glob("*identity.*.json"):
        body = name.read_bytes()
        assert parse(ApiPayload(body)) == parse(VerifiedPayload(body, ""))
    assert repr(ApiPayload(CANARY.encode())) == "ApiPayload(15 bytes)"
    nested = b'{"type": "identity.verification_session.x", "a": ' + b"[" * 900 + b"]" * 900 + b"}"
    with pytest.raises(Rejected):
        parse(ApiPayload(nested))


@pytest.mark.parametrize(
    "event_id", [None, 1, [CANARY], CANARY, "evt_", f"evt_1 {CANARY}"], ids=str
)
def test_the_id_of_an_ignored_event_is_well_formed(event_id: object) -> None:
    """An ill-formed id is not passed on."""
    ignored = parsed({"type": "charge.succeeded", "id": event_id})

    assert ignored == Ignored(IgnoredReason.OTHER_TYPE, None, "charge.succeeded")


@pytest.mark.parametrize(
    ("created", "expected"),
    [
        (0, 0),
        (CREATED, CREATED),
        (10**11 - 1, 10**11 - 1),
        (str(CREATED), CREATED),
        (10**11, None),
        (-1, None),
        (2**64, None),
        (float(CREATED), None),
        (CREATED + 0.5, None),
        (1e300, None),
        (True, None),
        (False, None),
        ("", None),
        (" 1", None),
        ("1_0", None),
        ("-1", None),
        ("\u0661", None),
        ("2026-08-05T12:00:00Z", None),
        (CANARY, None),
        ([CREATED], None),
    ],
    ids=repr,
)
def test_created(created: object, expected: int | None) -> None:
    """`created` is whole seconds within bounds, as a number or digits; no float, no boolean."""
    check_created(placed("created", created), expected)


@pytest.mark.parametrize(
    "rest",
    ["", "a\n", "\n", "a b", "a-b", "a}", "a:b", "é", "a" * 251, "\x00", "٣", 66600666, None],
    ids=repr,
)
@pytest.mark.parametrize(("path", "prefix"), [("id", "evt_"), ("data.object.id", "vs_")])
def test_ids_match_their_pattern(path: str, prefix: str, rest: object) -> None:
    """Ids become part of Redis keys: an ill-formed one is rejected with its path."""
    found = placed(path, prefix + rest if isinstance(rest, str) else rest)

    assert rejection(found) == (RejectionReason.FIELD_MISTYPED, path)


@pytest.mark.parametrize(("path", "prefix"), [("id", "evt_"), ("data.object.id", "vs_")])
def test_ids_have_their_own_prefix(path: str, prefix: str) -> None:
    """An id begins with its prefix, followed by up to 250 characters."""
    for wrong in ("abc", prefix.upper() + "abc", f"\n{prefix}abc", f"x{prefix}abc"):
        assert rejection(placed(path, wrong)) == (RejectionReason.FIELD_MISTYPED, path)
    assert isinstance(parsed(placed(path, prefix + "aZ09_" * 50)), Event)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *[("type", wrong) for wrong in (1, True, [CANARY], {CANARY: CANARY}, 1.5)],
        ("livemode", CANARY),
        ("account", {CANARY: CANARY}),
        ("data", CANARY),
        ("data.object", [CANARY]),
        ("data.object.status", 66600666),
        ("data.object.status", ""),
        ("data.object.livemode", [CANARY]),
        ("data.object.redaction", CANARY),
        ("data.object.redaction.status", [CANARY]),
    ],
)
def test_needed_fields_must_be_readable(path: str, value: object) -> None:
    """An unreadable field that is needed is rejected with its path and without its value."""
    found = placed(path, value, placed("data.object.redaction", {}))

    assert rejection(found) == (RejectionReason.FIELD_MISTYPED, path)


@pytest.mark.parametrize(
    ("path", "value", "inner"),
    [
        ("api_version", [CANARY], ""),
        ("request", 66600666, ""),
        ("request", {"id": [CANARY]}, ".id"),
        ("data.object.client_secret", [CANARY], ""),
        ("data.object.url", {CANARY: CANARY}, ""),
        ("data.object.metadata", {CANARY: 66600666}, ""),
        ("data.object.last_error", {"reason": 66600666}, ".reason"),
        ("data.object.verified_outputs", {"address": {"line1": [CANARY]}}, ".address.line1"),
        (
            "data.object.options",
            {"document": {"allowed_types": ["passport", {CANARY: CANARY}]}},
            ".document.allowed_types",
        ),
        ("data.object.last_verification_report", 66600666, ""),
        ("data.object.last_verification_report", {"document": {"dob": CANARY}}, ".document.dob"),
    ],
)
def test_unneeded_unreadable_fields_are_skipped(path: str, value: object, inner: str) -> None:
    """An unreadable field that is not needed becomes None, and its path is reported."""
    event = event_of(placed(path, value))

    assert event.skipped_fields == (path + inner,)
    assert (event.id, event.created, event.session.status) == ("evt_1", CREATED, "processing")
    assert CANARY not in repr(event)


def test_the_other_fields_are_read() -> None:
    """Readable fields next to skipped ones are parsed, at every level."""
    session = dict(BARE["data"]["object"])
    session |= {"type": "document", "url": 1, "metadata": [], "options": CANARY}
    session |= {"last_error": {"code": "abandoned", "reason": {}}, "client_reference_id": "user"}

    event = event_of(BARE | {"pending_webhooks": CANARY, "data": {"object": session}})

    assert sorted(event.skipped_fields) == [
        "data.object.last_error.reason",
        "data.object.metadata",
        "data.object.options",
        "data.object.url",
        "pending_webhooks",
    ]
    assert event.session.last_error_code == "abandoned"
    assert (event.session.type, event.session.client_reference_id) == ("document", "user")
    assert (event.session.metadata, event.session.options, event.pending_webhooks) == (None,) * 3


HALVES = (r"\ud800", r"\uDBFF", r"\udc00x", r"\uDfff\ud83d", r"\ud83d\ud83d\ude00", r"\\\ud800")


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(
    ("path", "value", "inner"),
    [
        ("api_version", "?", ""),
        ("request", {"id": "?", "idempotency_key": "key"}, ".id"),
        ("data.object.client_reference_id", "a?b", ""),
        ("data.object.client_secret", "?", ""),
        ("data.object.metadata", {"a": "?", "b": "kept"}, ""),
        ("data.object.metadata", {"a?": "x", "b": "kept"}, ""),
        (
            "data.object.options",
            {"document": {"allowed_types": ["passport", "?"]}},
            ".document.allowed_types",
        ),
        ("data.object.last_error", {"code": "abandoned", "reason": "?"}, ".reason"),
        ("data.object.unheard_of", {"?": ["?"]}, None),
        ("unheard_of", "?", None),
    ],
)
def test_fields_with_lone_surrogates_are_skipped(
    half: str, path: str, value: Any, inner: str | None
) -> None:
    """A field with a lone surrogate, which no text can hold, is skipped; the others are read."""
    found = placed(path, value)
    found["data"]["object"] |= {"type": "document", "related_person": {"person": "\U0001f600"}}
    event = event_of(json.dumps(found).replace("?", half).encode())

    assert event.skipped_fields == (() if inner is None else (path + inner,))
    session = event.session
    assert (session.type, session.client_reference_id) == ("document", None)
    assert session.related_person is not None
    assert session.related_person.person == "\U0001f600"
    assert session.metadata in (None, {"b": "kept"})


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("path", ["id", "type", "account", "data.object.id", "data.object.status"])
def test_needed_fields_have_no_lone_surrogates(half: str, path: str) -> None:
    """A needed field with a lone surrogate is rejected with its path."""
    value = {"id": "evt_?", "type": f"{TYPE}?"}.get(path, "vs_?")
    body = json.dumps(placed(path, value)).replace("?", half).encode()

    assert rejection(body) == (RejectionReason.FIELD_MISTYPED, path)


@pytest.mark.parametrize("text", ["\U0001f600", "\ufffd", r"\ud800", "\\", "\u2028"])
def test_texts_similar_to_lone_surrogates_are_read(text: str) -> None:
    """Whole pairs, the replacement character, and a backslash before a u are ordinary text."""
    event = event_of(placed("data.object.client_reference_id", text))

    assert (event.session.client_reference_id, event.skipped_fields) == (text, ())


@pytest.mark.parametrize("value", [66600666, None, True, [CANARY], {CANARY: CANARY}, 1.5])
def test_only_unreadable_metadata_values_are_skipped(value: object) -> None:
    """An unreadable metadata value does not affect the others; the mapping's path is reported."""
    metadata = {"user": "7", CANARY: value, "tenant": "é"}
    event = event_of(placed("data.object.metadata", metadata))

    assert event.skipped_fields == ("data.object.metadata",)
    assert event.session.metadata == {"user": "7", "tenant": "é"}


def unreadable(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Return an object in which every field is unreadable."""
    return {
        field.name: unreadable(field.struct) if field.struct else [{CANARY: 66600666}]
        for field in _fields(kind)
        if field.name not in {"livemode", "redaction", "skipped_fields"}
    }


def test_the_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With any number of unreadable fields, the event is converted twice and each field once."""
    found = unreadable(Event) | {"id": "evt_1", "type": TYPE, "created": CREATED}
    del found["account"]
    found["data"]["object"] |= {"id": "vs_1", "status": "processing"}
    converted = []

    def counting(source: Any, kind: Any, **options: Any) -> Any:
        converted.append(kind)
        return convert(source, kind, **options)

    convert = msgspec.convert
    monkeypatch.setattr(msgspec, "convert", counting)
    event = event_of(found)

    assert len(event.skipped_fields) > 90
    assert converted.count(Event) == 2
    assert len(converted) < 3 * len(event.skipped_fields)


@pytest.mark.parametrize("sent", [[CANARY], ["data.object.id"]])
def test_a_sender_cannot_set_skipped_fields(sent: list[str]) -> None:
    """A `skipped_fields` in the body is ignored by both parsers."""
    assert parsed(BARE | {"skipped_fields": sent}) == parsed(BARE)


BODIES = {
    "empty": (b"", "body_not_json"),
    "cut off": (b'{"id": "canary-66600666', "body_not_json"),
    "not UTF-8": (b'{"id": "canary-66600666\xff"}', "body_not_json"),
    "not UTF-8 in an unneeded field": (
        json.dumps(BARE).encode().replace(b"{", b'{"new": "canary-66600666\xff", ', 1),
        "body_not_json",
    ),
    "UTF-16": ('{"id": "canary-66600666"}'.encode("utf-16"), "body_not_json"),
    "byte order mark": (b"\xef\xbb\xbf{}", "body_not_json"),
    "two documents": (b"{}{}", "body_not_json"),
    "comment": (b"{} // canary-66600666", "body_not_json"),
    "single quotes": (b"{'canary-66600666': 1}", "body_not_json"),
    "NaN": (b'{"created": NaN}', "body_not_json"),
    "Infinity": (b'{"created": -Infinity}', "body_not_json"),
    "400 digits": (b'{"created": %b}' % (b"9" * 400), "body_not_json"),
    "400 digits after the point": (b'{"created": 1e400}', "body_not_json"),
    "half a pair, not JSON": (rb'{"id": "canary-66600666\ud800}', "body_not_json"),
    "half a pair, out of a text": (rb'{"id": \ud800}', "body_not_json"),
    "half a pair, not escaped": (b'{"id": "canary-66600666\xed\xa0\x80"}', "body_not_json"),
    "2,000 arrays": (b"[" * 2000 + b"]" * 2000, "body_not_json"),
    "2,000 objects": (b'{"a":' * 2000 + b"1" + b"}" * 2000, "body_not_json"),
    "list": (b"[]", "body_not_an_event"),
    "null": (b"null", "body_not_an_event"),
    "text": (b'"canary-66600666"', "body_not_an_event"),
    "number": (b"66600666", "body_not_an_event"),
    "false": (b"false", "body_not_an_event"),
}


@pytest.mark.parametrize(("body", "reason"), BODIES.values(), ids=BODIES)
def test_bodies_that_are_no_json_object_are_rejected(body: bytes, reason: str) -> None:
    """A body that is not a JSON object in UTF-8 is rejected without the decoder's error."""
    assert rejection(body) == (reason, None)


def test_the_last_of_duplicate_keys_counts() -> None:
    """If a key is repeated, even escaped, the last one counts."""
    body = json.dumps(BARE)[:-1] + r', "created": 1, "cr\u0065ated": 2}'

    assert event_of(body.encode()).created == 2


def test_deep_nesting_is_tolerated() -> None:
    """Deep nesting that the decoder accepts causes no error, in known and unknown fields."""
    deep: Any = CANARY
    for _ in range(900):
        deep = [deep]

    assert parsed(placed("data.object.new", deep)) == parsed(BARE)
    assert event_of(placed("data.object.url", deep)).skipped_fields == ("data.object.url",)
