"""The laws of `transitions`: what is newer than what, what changed, what may leave the process."""

from __future__ import annotations

from datetime import UTC, datetime
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.secret import Secret
from service.stripe.events import EVENT_TYPE_PREFIX
from service.stripe.verification_session import LastError, Redaction, VerificationSession
from service.transitions.lifecycle import (
    NEXT_STATUSES,
    Status,
    created_at,
    current_status,
    is_expected,
    is_reversal,
    is_step,
    order_key,
    state_hash,
)
from service.transitions.transition import SessionChange, StatusTransition

CREATED = 1_785_931_200
STATUSES = ("requires_input", "processing", "verified", "canceled", "requires_action")
REDACTIONS = (None, "processing", "validated", "some_new_word", "redacted")
STEPS = ("created", "processing", "requires_input", "verified", "canceled", "redacted", "newer")
MOMENTS = st.integers(0, 10**11 - 1)


def session(status: str = "processing", redaction: str | None = None, **more: Any) -> Any:
    """Return a session that is just so far."""
    return VerificationSession(
        id="vs_1", status=status, redaction=Redaction(status=redaction), **more
    )


def key(step: str, status: str, *, created: int = CREATED, redaction: str | None = None) -> int:
    """Return the order key of an event."""
    return order_key(EVENT_TYPE_PREFIX + step, created, session(status, redaction))


def test_digits_of_an_order_key() -> None:
    """From the top: redaction rank, eleven digits of seconds, step rank."""
    assert key("created", "requires_input") == 1785931200_0
    assert key("processing", "processing") == 1785931200_1
    assert key("requires_input", "requires_input") == 1785931200_2
    assert key("newer", "newer") == 1785931200_2
    assert key("verified", "verified") == 1785931200_3
    assert key("canceled", "canceled") == 1785931200_3
    assert key("canceled", "canceled", redaction="processing") == 1_01785931200_3
    assert key("verified", "verified", redaction="validated") == 1785931200_3
    assert key("verified", "verified", redaction="new word") == 1785931200_3
    assert key("redacted", "verified", redaction="redacted") == 2_01785931200_4
    assert key("newer", "verified", redaction="redacted") == 2_01785931200_2
    assert key("redacted", "requires_input") == 2_01785931200_4


@given(
    *[st.sampled_from(each) for each in (STEPS, STATUSES, REDACTIONS)],
    MOMENTS,
)
def test_an_order_key_is_exact_in_lua(
    step: str, status: str, redaction: str | None, created: int
) -> None:
    """An order key stays below 2**53, and *created* can be read back from it."""
    found = key(step, status, created=created, redaction=redaction)

    assert 0 <= found < 2**53
    assert created_at(found) == created


@given(MOMENTS, MOMENTS, st.sampled_from(STATUSES), st.sampled_from(STATUSES))
def test_redaction_absorbs(first: int, second: int, status: str, other: str) -> None:
    """Redacted ranks above redaction under way, and that above none, whatever time and status."""
    ranks = [
        key("newer", status, created=first, redaction="redacted"),
        key("newer", other, created=second, redaction="processing"),
        key("newer", status, created=first, redaction=None),
    ]

    assert ranks == sorted(ranks, reverse=True)
    assert len(set(ranks)) == 3
    assert key("redacted", status, created=first) > ranks[1]


@given(*[st.tuples(st.sampled_from(STEPS[:-2]), st.sampled_from(STATUSES), MOMENTS)] * 2)
def test_the_rest_goes_by_time(one: tuple[str, str, int], other: tuple[str, str, int]) -> None:
    """The event that was created in a later second is the later one, whatever its status."""
    (step, status, first), (other_step, other_status, second) = one, other
    if first != second:
        later = key(step, status, created=first) > key(other_step, other_status, created=second)
        assert later is (first > second)


def test_steps_within_one_second() -> None:
    """Within one second what ends comes after what begins."""
    steps = ("created", "processing", "requires_input", "verified", "redacted")
    ranks = [key(step, "processing") for step in steps]

    assert ranks == sorted(set(ranks))


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("step", STEPS)
def test_steps_and_results(step: str, status: str) -> None:
    """The creation of a session and the start of a check are steps, all else is a result."""
    assert is_step(EVENT_TYPE_PREFIX + step, status) is (
        step == "created" or status == "processing"
    )


@pytest.mark.parametrize(
    ("previous", "current", "expected"),
    [
        ("verified", "requires_input", True),
        ("verified", "processing", True),
        ("verified", "canceled", True),
        ("canceled", "requires_input", True),
        ("canceled", "some_new_word", True),
        ("verified", "verified", False),
        ("verified", "redacted", False),
        ("canceled", "redacted", False),
        ("requires_input", "verified", False),
        ("redacted", "verified", False),
        (None, "verified", False),
    ],
)
def test_reversals(previous: str | None, current: str, expected: bool) -> None:
    """Whatever follows a final status, but itself and redaction, reverses it."""
    assert is_reversal(previous, current) is expected


@pytest.mark.parametrize("redaction", REDACTIONS)
@pytest.mark.parametrize("step", STEPS)
def test_current_status(step: str, redaction: str | None) -> None:
    """The status is Stripe's word, and `redacted` once that has finished, by word or by type."""
    done = redaction == "redacted" or step == "redacted"

    assert current_status(EVENT_TYPE_PREFIX + step, session("verified", redaction)) == (
        "redacted" if done else "verified"
    )


BASE = {"status": "processing", "redaction": None}
MATTERS: list[dict[str, Any]] = [
    {"status": "requires_input"},
    {"status": "some_new_word"},
    {"redaction": "processing"},
    {"redaction": "redacted"},
    {"last_error": LastError(code="document_expired")},
    {"last_error": LastError(code="abandoned")},
    {"last_verification_report": "vr_1"},
    {"last_verification_report": "vr_2"},
]
DOES_NOT_MATTER: list[dict[str, Any]] = [
    {"last_error": LastError(reason=Secret("worded anew"))},
    {"metadata": {"a": "b"}},
    {"url": Secret("https://verify.stripe.com/start/x")},
    {"client_secret": Secret("vs_1_secret_x")},
    {"client_reference_id": "user-1"},
    {"created": 1},
    {"type": "id_number"},
]


def hash_of(step: str = "processing", **changes: Any) -> str:
    """Return the state hash of a session that differs from BASE in *changes*."""
    return state_hash(EVENT_TYPE_PREFIX + step, session(**{**BASE, **changes}))


def test_a_state_hash_changes_with_what_matters() -> None:
    """Status, redaction, error code and report each change the hash, all differently."""
    hashes = [hash_of(), *(hash_of(**changes) for changes in MATTERS)]

    assert len(set(hashes)) == len(hashes)


def test_redacted_is_redacted_by_word_or_by_type() -> None:
    """An event that says so in its type alone is no other state than one that says so in both."""
    both = hash_of("redacted", redaction="redacted")

    assert hash_of("redacted") == hash_of("redacted", redaction="processing") == both
    assert hash_of("newer", redaction="redacted") == both
    assert hash_of() != both


@pytest.mark.parametrize("changes", DOES_NOT_MATTER, ids=lambda changes: next(iter(changes)))
def test_a_state_hash_holds_nothing_else(changes: dict[str, Any]) -> None:
    """What no handler would act upon, not even the event's type, leaves the hash alone."""
    assert hash_of(**changes) == hash_of()
    assert hash_of("newer", **changes) == hash_of()


def test_a_state_hash_is_the_same_for_ever() -> None:
    """A hash is stored for longer than any release: it must not change with the code."""
    assert hash_of() == "1aaffa1f8a7f087b"
    assert hash_of("redacted", status="verified", redaction="redacted") == "416fff3db45b1fc8"


def test_fields_cannot_run_together() -> None:
    """A word in one field is never mistaken for the same word in another."""
    error = LastError(code="vr_1")

    assert hash_of(last_error=error) != hash_of(last_verification_report="vr_1")


@pytest.mark.parametrize("previous", [*NEXT_STATUSES, "requires_action"])
@pytest.mark.parametrize("current", ["requires_action", "", "VERIFIED"])
def test_unknown_words_are_never_unexpected(previous: str | None, current: str) -> None:
    """A word the table does not know is never held against an event, on either side."""
    assert is_expected(previous, current)
    assert all(is_expected(current, known) for known in Status)


def test_expected_is_what_the_table_lists() -> None:
    """Between known words, exactly the steps of the table are expected."""
    steps = {
        (previous, current)
        for previous in NEXT_STATUSES
        for current in Status
        if is_expected(previous, current)
    }

    assert steps == {
        (previous, current) for previous, then in NEXT_STATUSES.items() for current in then
    }
    assert set(NEXT_STATUSES) == {None, *Status}


def types_in(annotation: Any) -> set[Any]:
    """Return every type that a value of *annotation* may hold, structs' fields included."""
    if get_origin(annotation) is not None or isinstance(annotation, UnionType):
        inner = [types_in(each) for each in get_args(annotation)]
        origin = get_origin(annotation)
        return set().union(*inner) | (set() if origin in {Union, UnionType} else {origin})
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        hints = get_type_hints(annotation)
        fields = [types_in(hints[name]) for name in annotation.__struct_fields__]
        return {annotation}.union(*fields)
    return {annotation}


@pytest.mark.parametrize("kind", [SessionChange, StatusTransition])
def test_what_leaves_has_no_place_for_a_secret(kind: type) -> None:
    """Nowhere inside what leaves the process is there a field that could hold a Secret."""
    leaves = {each for each in types_in(kind) if not issubclass(each, msgspec.Struct)}

    assert leaves == {str, int, bool, datetime, dict, type(None), msgspec.UnsetType} - (
        set() if kind is StatusTransition else {int}
    )
    assert Secret in types_in(VerificationSession), "the walk would find one"


def test_a_transition_keeps_to_itself_what_is_yours() -> None:
    """The repr of a transition tells ids and statuses, not metadata or your own reference."""
    transition = StatusTransition(
        event_id="evt_1",
        event_type="t",
        occurred_at=datetime(2026, 1, 1, tzinfo=UTC),
        session_id="vs_1",
        current="verified",
        client_reference_id="canary",
        metadata={"canary": "canary"},
        sequence=3,
        epoch=1,
        expected=True,
    )

    assert repr(transition) == (
        "StatusTransition(event_id='evt_1', event_type='t', session_id='vs_1', "
        "current='verified', previous=None, sequence=3, epoch=1, "
        "replay=None)"
    )
