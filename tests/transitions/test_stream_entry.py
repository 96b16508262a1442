"""Packed changes are unpacked unchanged and hold no secret; other entries are unreadable."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.stripe.events import Event, parse
from service.stripe.signatures import VerifiedPayload
from service.transitions.stream_entry import pack, unpack
from service.transitions.transition import SessionChange, StatusTransition, make_change
from tests.support.programs import FIXTURES
from tests.support.transitions import TEXT, change_fields

CANARY = "canary-66600666"

CHANGES = st.builds(SessionChange, **change_fields(TEXT))
CHANGE = SessionChange(
    event_id="evt_1",
    event_type="identity.verification_session.verified",
    occurred_at=datetime(2026, 8, 5, 12, tzinfo=UTC),
    session_id="vs_1",
    current="verified",
)


def entry(change: bytes = pack(CHANGE), **fields: bytes) -> dict[bytes, bytes]:
    """Return a stream entry as the admission script writes it."""
    found = {"change": change, "previous": b"processing", "sequence": b"3", "epoch": b"1000"}
    return {name.encode(): value for name, value in (found | fields).items()}


@given(
    change=CHANGES,
    previous=st.none() | st.text(min_size=1, max_size=20),
    sequence=st.integers(1, 2**53),
    epoch=st.integers(1, 2**53),
)
def test_round_trip(change: SessionChange, previous: str | None, sequence: int, epoch: int) -> None:
    """A packed change is unpacked field by field, with the fields of the session record."""
    transition = unpack(
        entry(
            pack(change),
            previous=(previous or "").encode(),
            sequence=str(sequence).encode(),
            epoch=str(epoch).encode(),
        )
    )

    found = msgspec.structs.asdict(transition)
    known = [found.pop(name) for name in ("previous", "sequence", "epoch", "replay")]
    del found["expected"], found["reversal"]
    assert isinstance(transition, StatusTransition)
    assert found == msgspec.structs.asdict(change)
    assert known == [previous, sequence, epoch, None]


def test_a_copied_entry_names_its_replay() -> None:
    """The transition of an entry that was copied for a replay has the name of the replay."""
    assert unpack(entry(replay=b"20260101T0000-ab")).replay == "20260101T0000-ab"


@pytest.mark.parametrize(
    ("previous", "expected", "reversal"),
    [
        (b"processing", True, False),
        (b"requires_input", False, False),
        (b"", False, False),
        (b"canceled", False, True),
        (b"verified", True, False),
    ],
)
def test_the_previous_status_decides_the_flags(
    previous: bytes, expected: bool, reversal: bool
) -> None:
    """`expected` and `reversal` follow from the previous status in the entry."""
    transition = unpack(entry(previous=previous))
    assert (transition.expected, transition.reversal) == (expected, reversal)


def test_packed_form() -> None:
    """A packed change is JSON with named fields, without those that have their default."""
    assert json.loads(pack(CHANGE)) == {
        "event_id": "evt_1",
        "event_type": "identity.verification_session.verified",
        "occurred_at": "2026-08-05T12:00:00Z",
        "session_id": "vs_1",
        "current": "verified",
    }
    assert json.loads(pack(msgspec.structs.replace(CHANGE, metadata={}))) == {
        **json.loads(pack(CHANGE)),
        "metadata": {},
    }


def test_entries_of_other_versions_are_read() -> None:
    """An unknown field is ignored; an optional field that is missing is None."""
    older = {name: value for name, value in json.loads(pack(CHANGE)).items() if value is not None}

    assert unpack(entry(json.dumps(older | {"new": 1}).encode())) == unpack(entry())


def broken(**fields: Any) -> bytes:
    """Return a packed change with some fields wrong."""
    return json.dumps(json.loads(pack(CHANGE)) | fields).encode()


UNREADABLE: dict[str, dict[bytes, bytes]] = {
    "nothing": {},
    **{
        f"no {absent.decode()}": {name: one for name, one in entry().items() if name != absent}
        for absent in entry()
    },
    "not JSON": entry(CANARY.encode()),
    "cut off": entry(b'{"event_id": "canary-66600666'),
    "not UTF-8": entry(b'{"event_id": "canary-66600666\xff"}'),
    "no object": entry(b'["canary-66600666"]'),
    "empty object": entry(b"{}"),
    "mistyped": entry(broken(event_id=[CANARY])),
    "no moment": entry(broken(occurred_at=CANARY)),
    "metadata mistyped": entry(broken(metadata={CANARY: 66600666})),
    "sequence no number": entry(sequence=CANARY.encode()),
    "epoch empty": entry(epoch=b""),
    "previous not UTF-8": entry(previous=b"canary-66600666\xff"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_entries(name: str) -> None:
    """An entry that is not ours raises an error that holds nothing of it."""
    with pytest.raises(ValueError, match=r"^unreadable$") as refused:
        unpack(UNREADABLE[name])

    assert (refused.value.__context__, refused.value.__cause__) == (None, None)


@given(st.dictionaries(st.sampled_from(list(entry())), st.binary(max_size=30)))
def test_any_entry_is_read_or_unreadable(fields: dict[bytes, bytes]) -> None:
    """Any entry is a transition or unreadable; no other error is raised."""
    try:
        assert isinstance(unpack(entry() | fields), StatusTransition)
    except ValueError as error:
        assert error.args == ("unreadable",)  # noqa: PT017 - either way is right


# The fields of a session that may be packed; every other text is a canary.
SHOWN = {
    *("id", "status", "type", "client_reference_id", "metadata", "related_customer"),
    *("related_customer_account", "related_person", "last_error.code", "redaction.status"),
    "last_verification_report.id",
}


def planted(value: Any, path: str = "") -> Any:
    """Return a session's JSON with a canary in every leaf that may not leave the process."""
    if path in SHOWN:
        return value
    if isinstance(value, dict):
        return {k: planted(v, f"{path}.{k}".removeprefix(".")) for k, v in value.items()}
    if isinstance(value, list):
        return [planted(each, path) for each in value]
    if isinstance(value, str):
        return CANARY
    return 66600666 if type(value) is int else value


def test_secrets_are_never_packed() -> None:
    """With a canary in every other field of a session and its report, none is packed."""
    path = FIXTURES / "expanded_report.identity.verification_session.verified.json"
    found = json.loads(path.read_bytes())
    session = planted(found["data"]["object"])
    session |= {"client_secret": CANARY, "url": CANARY}
    session["last_error"] = {"code": "abandoned", "reason": CANARY}
    session["provided_details"] = {"email": CANARY, "phone": CANARY}
    found["data"]["object"] = session
    found["request"] = {"id": CANARY, "idempotency_key": CANARY}
    event = parse(VerifiedPayload(json.dumps(found).encode(), ""))
    assert isinstance(event, Event)
    assert json.dumps(found).count("66600666") > 30

    packed = pack(make_change(event))

    assert b"66600666" not in packed
    assert json.loads(packed)["last_error_code"] == "abandoned"
