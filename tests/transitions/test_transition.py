"""Transitions hold no secret, show no personal data and cannot be changed."""

from __future__ import annotations

import copy
import json
from datetime import datetime
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest

from service.secret import Secret
from service.stripe.verification_session import VerificationSession
from service.transitions.transition import SessionChange, StatusTransition
from tests.support.transitions import TRANSITION

PRIVATE = msgspec.structs.replace(
    TRANSITION, client_reference_id="canary", metadata={"canary": "canary"}
)


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
def test_no_field_can_hold_a_secret(kind: type) -> None:
    """No field of the data that leaves the process, at any depth, has the type `Secret`."""
    leaves = {each for each in types_in(kind) if not issubclass(each, msgspec.Struct)}

    assert leaves == {str, int, bool, datetime, dict, type(None), msgspec.UnsetType} - (
        set() if kind is StatusTransition else {int}
    )
    assert Secret in types_in(VerificationSession), "the walk would find one"


def test_repr_shows_ids_and_statuses_only() -> None:
    """The repr of a transition does not show metadata or your own reference."""
    assert repr(PRIVATE) == (
        "StatusTransition(event_id='evt_1', event_type='identity.verification_session.verified', "
        "session_id='vs_1', current='verified', previous='processing', sequence=3, "
        "epoch=1790000000000, replay=None)"
    )


CHANGES_OF_METADATA: dict[str, tuple[Any, ...]] = {
    "__setitem__": ("order", "2"),
    "__delitem__": ("order",),
    "__ior__": ({"order": "2"},),
    "update": ({"order": "2"},),
    "setdefault": ("new", "1"),
    "pop": ("order",),
    "popitem": (),
    "clear": (),
}


@pytest.mark.parametrize("change", CHANGES_OF_METADATA)
def test_metadata_cannot_be_changed(change: str) -> None:
    """Every way to change metadata raises a TypeError; a copy of it is an ordinary dict."""
    metadata = msgspec.structs.replace(TRANSITION, metadata={"order": "1"}).metadata

    assert metadata is not None
    with pytest.raises(TypeError, match="cannot be changed"):
        getattr(metadata, change)(*CHANGES_OF_METADATA[change])
    assert metadata == {"order": "1"}
    for copied in (dict(metadata), copy.copy(metadata), copy.deepcopy(metadata)):
        copied["order"] = "2"
    assert json.loads(msgspec.json.encode(metadata)) == {"order": "1"}
