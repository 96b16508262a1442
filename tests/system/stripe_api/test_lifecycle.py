"""What happens to sessions, which events it makes, and that the service understands them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from service.secret import Secret
from service.stripe import VerificationReport, VerificationSession
from service.stripe.events import Event, ThinEvent, parse
from service.stripe.signatures import VerifiedPayload, sign, verify
from tests.support.programs import FIXTURES
from tests.support.stripe_api import (
    CANARY,
    CANARY_NUMBERS,
    Permission,
    StripeStandIn,
    all_types,
    client_of,
)
from tests.support.stripe_api.errors import ApiError

SECRET = Secret(b"whsec_tests")
SESSIONS = "/v1/identity/verification_sessions"
REPORT = "last_verification_report"


@pytest.fixture
def stand_in() -> StripeStandIn:
    """Return a stand-in with one endpoint, which names all six types and gets nothing."""
    made = StripeStandIn()
    made.subscribe(None)
    return made


def words(stand_in: StripeStandIn) -> list[str]:
    """Return the last words of the types of all events."""
    return [one.type.rpartition(".")[2] for one in stand_in.events.all]


def payload(event: dict[str, Any]) -> VerifiedPayload:
    """Return an event as the service has it after its signature was verified."""
    body, now = orjson.dumps(event), int(time.time())
    header = sign(body, SECRET, now)
    return verify(body, header.encode(), [SECRET], now=now, tolerance_s=300)


def test_a_session_goes_through_its_life(stand_in: StripeStandIn) -> None:
    """Declined, rejected, verified, overridden twice, redacted."""
    sessions = stand_in.sessions
    session_id = sessions.create().id
    sessions.reject(session_id, "consent_declined")
    sessions.submit(session_id)
    sessions.reject(session_id, "document_expired")
    sessions.submit(session_id)
    sessions.verify(session_id)
    sessions.override(session_id, "requires_input")
    sessions.override(session_id, "verified")
    sessions.redact(session_id)
    sessions.finish_redaction(session_id)
    assert words(stand_in) == [
        *("created", "requires_input", "processing", "requires_input", "processing", "verified"),
        *("requires_input", "verified", "redacted"),
    ]
    assert [one.error for one in sessions.find(session_id).reports] == ["document_expired", None]


def test_snapshots_have_the_fields_of_the_samples(stand_in: StripeStandIn) -> None:
    """Of all six types, in the same order."""
    sessions = stand_in.sessions
    rejected, canceled = (sessions.create().id for _ in range(2))
    sessions.submit(rejected)
    sessions.reject(rejected)
    sessions.submit(rejected)
    sessions.verify(rejected)
    sessions.redact(rejected)
    sessions.finish_redaction(rejected)
    sessions.cancel(canceled)
    assert len(set(words(stand_in))) == 6
    for event in stand_in.events.all:
        sample = orjson.loads((FIXTURES / f"{event.type}.json").read_bytes())
        snapshot = event.as_snapshot()
        assert list(snapshot) == list(sample)
        for part in ("request", "data"):
            assert list(snapshot[part]) == list(sample[part])
        shown, expected = snapshot["data"]["object"], sample["data"]["object"]
        assert list(shown) == list(expected)
        assert list(shown["options"]["document"]) == list(expected["options"]["document"])


def test_an_open_session_is_canceled_by_its_redaction(stand_in: StripeStandIn) -> None:
    """The event of the cancellation already shows the redaction."""
    session_id = stand_in.sessions.create(metadata={"user": "1"}).id
    stand_in.sessions.redact(session_id)
    stand_in.sessions.finish_redaction(session_id)
    assert words(stand_in) == ["created", "canceled", "redacted"]
    shown = [one.session or {} for one in stand_in.events.all]
    assert [one["redaction"] for one in shown] == [
        None,
        {"status": "processing"},
        {"status": "redacted"},
    ]
    assert [one["metadata"] for one in shown] == [{}, {}, {}]
    assert [one["client_secret"] for one in shown] == ["[redacted]", None, None]


def test_what_is_impossible_is_refused(stand_in: StripeStandIn) -> None:
    """And changes nothing."""
    sessions = stand_in.sessions
    session_id = sessions.create().id
    for change in (sessions.verify, sessions.reject, sessions.finish_redaction):
        with pytest.raises(ApiError, match="cannot be"):
            change(session_id)
    sessions.submit(session_id)
    for change in (sessions.submit, sessions.cancel, sessions.redact):
        with pytest.raises(ApiError, match="cannot be"):
            change(session_id)
    with pytest.raises(ApiError, match="cannot be"):
        sessions.override(session_id, "verified")
    with pytest.raises(ApiError, match="No such"):
        sessions.submit("vs_none")
    assert words(stand_in) == ["created", "processing"]


@pytest.mark.parametrize(
    ("selected", "is_made"),
    [(["*"], False), (all_types("snapshot"), True), (all_types("snapshot")[:3], False)],
)
def test_redacted_events_are_made_only_where_they_are_selected(
    selected: list[str], is_made: bool
) -> None:
    """By name: `*` does not select them."""
    stand_in = StripeStandIn()
    stand_in.subscribe(None, events=selected)
    session_id = stand_in.sessions.create().id
    stand_in.sessions.redact(session_id)
    stand_in.sessions.finish_redaction(session_id)
    assert ("redacted" in words(stand_in)) is is_made


def test_stripe_may_fail_to_make_an_event(stand_in: StripeStandIn) -> None:
    """Then only the session shows the change."""
    session = stand_in.sessions.create()
    stand_in.makes_events = False
    stand_in.sessions.submit(session.id)
    assert (words(stand_in), session.status) == (["created"], "processing")


async def test_the_service_reads_every_form(stand_in: StripeStandIn) -> None:
    """Snapshots, notifications, sessions and reports with everything expanded."""
    sessions, stand_in.expands_everything = stand_in.sessions, True
    session_id = sessions.create(provided_details={"email": "a", "phone": "b"}).id
    sessions.submit(session_id)
    sessions.verify(session_id)
    stand_in.expands_everything = False
    assert "dob" in ((stand_in.events.all[-1].session or {})["verified_outputs"])
    for event in stand_in.events.all:
        snapshot = parse(payload(event.as_snapshot()))
        assert isinstance(snapshot, Event)
        assert (snapshot.id, snapshot.session.id, snapshot.skipped_fields) == (
            event.id,
            session_id,
            (),
        )
        thin = parse(payload(event.as_notification()))
        assert isinstance(thin, ThinEvent)
        assert (thin.event_id, thin.event_type) == (event.thin_id, f"v1.{event.type}")
    key = stand_in.directory.add_key(permissions=list(Permission))
    expand = [
        *("provided_details", "verified_outputs.dob", "verified_outputs.id_number"),
        *("verified_outputs.sex", f"{REPORT}.document.number", f"{REPORT}.id_number.dob"),
    ]
    async with client_of(stand_in, key.secret) as client:
        answer = await client.get(f"{SESSIONS}/{session_id}", params={"expand[]": expand})
    session = VerificationSession.from_json(answer.content)
    assert session.verified_outputs
    assert session.verified_outputs.dob
    assert isinstance(session.last_verification_report, VerificationReport)
    assert session.last_verification_report.document
    assert session.last_verification_report.document.number


async def test_an_open_session_has_new_secrets_each_time(stand_in: StripeStandIn) -> None:
    """A session that is not open has none."""
    session_id = stand_in.sessions.create().id
    names = ("client_secret", "url")
    async with client_of(stand_in, stand_in.directory.add_key().secret) as client:
        answers = [(await client.get(f"{SESSIONS}/{session_id}")).json() for _ in range(3)]
        secrets = {answer[name] for answer in answers for name in names}
        assert len(secrets) == 6
        assert all(CANARY in secret for secret in secrets)
        stand_in.sessions.submit(session_id)
        shown = (await client.get(f"{SESSIONS}/{session_id}")).json()
        assert [shown[name] for name in names] == [None, None]


def leaves(found: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each text and number with its path."""
    if isinstance(found, dict):
        for name, value in found.items():
            yield from leaves(value, f"{path}.{name}" if path else name)
    elif isinstance(found, list):
        for value in found:
            yield from leaves(value, path)
    elif isinstance(found, (str, int)) and not isinstance(found, bool):
        yield path, found


# What is neither secret nor personal, or has no room for a canary.
PLAIN = {
    *("id", "object", "created", "status", "type", "options.document.allowed_types"),
    *("related_customer", "verified_outputs.address.country", "verified_outputs.sex"),
    "verified_outputs.id_number_type",
    *(
        f"{REPORT}.{name}"
        for name in (
            *("id", "object", "created", "type", "options.document.allowed_types"),
            *("verification_session", "document.address.country", "document.issuing_country"),
            *("document.sex", "document.status", "document.type", "email.status"),
            *("id_number.id_number_type", "id_number.status", "phone.status", "selfie.status"),
        )
    ),
}


async def test_everything_personal_has_a_canary(stand_in: StripeStandIn) -> None:
    """Until it is redacted, when nothing of it is left."""
    sessions = stand_in.sessions
    session_id = sessions.create().id
    sessions.submit(session_id)
    sessions.verify(session_id)
    key = stand_in.directory.add_key(permissions=list(Permission)).secret
    parts = ("dob", "expiration_date", "number", "sex", "unparsed_place_of_birth", "unparsed_sex")
    expand = [
        *("provided_details", "verified_outputs.dob", "verified_outputs.id_number"),
        *(f"verified_outputs.{name}" for name in (parts[3:])),
        *(f"{REPORT}.document.{name}" for name in parts),
        *(f"{REPORT}.id_number.{name}" for name in ("dob", "id_number")),
    ]
    async with client_of(stand_in, key) as client:

        async def read() -> Any:
            answer = await client.get(f"{SESSIONS}/{session_id}", params={"expand[]": expand})
            assert answer.status_code == 200, answer.text
            return answer.json()

        found = list(leaves(await read()))
        assert len(found) > 60
        for path, value in found:
            is_canary = value in CANARY_NUMBERS or CANARY in str(value)
            assert is_canary or path in PLAIN, path
        sessions.redact(session_id)
        sessions.finish_redaction(session_id)
        for path, value in leaves(await read()):
            assert value not in CANARY_NUMBERS, path
            assert CANARY not in str(value), path
