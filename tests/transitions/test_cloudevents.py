"""A message is a valid CloudEvent that holds the transition and nothing else."""

from __future__ import annotations

import json
import re
from urllib.parse import unquote, urlsplit

import msgspec
import pytest
from cloudevents.core.formats.json import JSONFormat
from hypothesis import given
from hypothesis import strategies as st

from service.secret import Secret
from service.transitions import cloudevents
from service.transitions.transition import StatusTransition
from tests.support.transitions import TRANSITION, TRANSITIONS, WORD


def test_the_message_is_exactly_this() -> None:
    """The body, the key and the headers of one transition, with every field."""
    message = cloudevents.message(TRANSITION)

    assert json.loads(message.body) == {
        "specversion": "1.0",
        "id": "evt_1",
        "source": "/stripe/identity/live/acct_1",
        "type": "com.stripe.identity.verification_session.verified",
        "subject": "vs_1",
        "time": "2026-08-05T12:00:00Z",
        "datacontenttype": "application/json",
        "dataschema": "urn:identity-webhooks:status-transition:2",
        "partitionkey": "vs_1",
        "sessionepoch": "1790000000000",
        "sessionsequence": "3",
        "data": {
            "event_id": "evt_1",
            "event_type": "identity.verification_session.verified",
            "occurred_at": "2026-08-05T12:00:00Z",
            "livemode": True,
            "account": "acct_1",
            "account_name": None,
            "context": None,
            "origin": "webhook",
            "endpoint": "acme",
            "session_id": "vs_1",
            "session_type": "document",
            "current": "verified",
            "stripe_status": "verified",
            "last_error_code": None,
            "redaction_status": None,
            "report_id": None,
            "client_reference_id": None,
            "related_customer": None,
            "related_customer_account": None,
            "related_person": None,
            "metadata": {"order": "6735"},
            "previous": "processing",
            "sequence": 3,
            "epoch": 1_790_000_000_000,
            "expected": True,
            "reversal": False,
            "replay": None,
        },
    }
    assert message.id == message.deduplication_id == "evt_1"
    assert message.key == "vs_1"
    assert message.content_type == "application/cloudevents+json"
    assert message.headers == {
        "content-type": "application/cloudevents+json",
        "id": "evt_1",
        "type": "com.stripe.identity.verification_session.verified",
        "subject": "vs_1",
        "sessionepoch": "1790000000000",
        "sessionsequence": "3",
    }


def test_a_replay_is_named() -> None:
    """A replayed message keeps its id, names its replay and has its own deduplication id."""
    message = cloudevents.message(msgspec.structs.replace(TRANSITION, replay="20260101T0000-ab"))
    found = json.loads(message.body)

    assert message.id == found["id"] == "evt_1"
    assert found["replay"] == found["data"]["replay"] == "20260101T0000-ab"
    assert message.deduplication_id == "evt_1.20260101T0000-ab"


@given(transition=TRANSITIONS)
def test_an_independent_reader_accepts_every_message(transition: StatusTransition) -> None:
    """The library of the CloudEvents project reads each message without loss."""
    message = cloudevents.message(transition)
    found = JSONFormat().read(None, message.body)

    assert found.get_specversion() == "1.0"
    assert found.get_id() == transition.event_id
    assert found.get_type() == message.type == f"com.stripe.{transition.event_type}"
    assert found.get_subject() == transition.session_id
    assert found.get_time() == transition.occurred_at
    assert found.get_datacontenttype() == "application/json"
    assert found.get_dataschema() == cloudevents.SCHEMA
    assert found.get_extension("partitionkey") == transition.session_id
    assert found.get_extension("sessionsequence") == str(transition.sequence)
    assert found.get_extension("sessionepoch") == str(transition.epoch)
    assert "sequence" not in found.get_attributes()
    assert msgspec.convert(found.get_data(), StatusTransition) == transition


@given(transition=TRANSITIONS)
def test_headers_repeat_the_body(transition: StatusTransition) -> None:
    """The headers have the same values as the attributes in the body."""
    message = cloudevents.message(transition)
    found = json.loads(message.body)
    repeated = {name: found[name] for name in message.headers if name != "content-type"}

    assert message.headers == {"content-type": cloudevents.CONTENT_TYPE, **repeated}
    assert (message.id, message.type, message.key) == (
        found["id"],
        found["type"],
        found["partitionkey"],
    )


@given(
    transition=TRANSITIONS, replays=st.lists(st.none() | WORD, min_size=2, max_size=2, unique=True)
)
def test_each_replay_has_its_own_deduplication_id(
    transition: StatusTransition, replays: list[str | None]
) -> None:
    """A replay of an event is not dropped as a repeat of it or of another replay."""
    one, other = (
        cloudevents.message(msgspec.structs.replace(transition, replay=replay))
        for replay in replays
    )

    assert one.id == other.id
    assert one.deduplication_id != other.deduplication_id


@given(transition=TRANSITIONS)
def test_source_is_a_valid_reference_that_names_the_account(transition: StatusTransition) -> None:
    """For any account name, `source` is a URI reference that contains the name, quoted."""
    source = json.loads(cloudevents.message(transition).body)["source"]

    assert re.fullmatch(r"(/([A-Za-z0-9._~-]|%[0-9A-F]{2})+)+", source)
    assert urlsplit(source).path == source
    _, stripe, identity, mode, *account = source.split("/")
    assert (stripe, identity) == ("stripe", "identity")
    assert mode == ("test" if transition.livemode is False else "live")
    name = transition.account or transition.account_name
    assert [unquote(part) for part in account] == ([name] if name else [])


def test_a_secret_is_refused() -> None:
    """A `Secret` in a transition raises a TypeError that does not hold its value."""
    smuggled = msgspec.structs.replace(TRANSITION, current=Secret("canary"))

    with pytest.raises(TypeError) as raised:
        cloudevents.message(smuggled)
    assert "canary" not in str(raised.value)
