"""Decodes JSON leniently: fields that are unreadable and not needed are removed.

Why: Stripe may change any field at any time. If an unreadable field were an error, every event
would be rejected from that day on, even when nothing here uses the field.

The caller says which fields are needed. No error raised here holds any of the input.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

import msgspec
import orjson

from ..errors import Rejected, RejectionReason
from .stripe_object import decode_secret

T = TypeVar("T", bound=msgspec.Struct)

# Every escape in JSON text: a whole surrogate pair, a lone surrogate (the group), or another one.
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)
_REPLACEMENT = "\ufffd".encode()


class Decoded(NamedTuple):
    """A decoded JSON value.

    Attributes:
        value: The value.
        has_lone_surrogates: Whether U+FFFD replaces lone surrogates in its texts. JSON can escape
            half of a surrogate pair, but no text can hold it.
    """

    value: Any
    has_lone_surrogates: bool


def decode(body: bytes) -> Decoded | None:
    """Decode JSON; return None for anything else.

    The decoder's exception holds the whole input, so it must not leave this function, not even as
    the context of another exception.
    """
    with suppress(orjson.JSONDecodeError):
        return Decoded(orjson.loads(body), has_lone_surrogates=False)
    repaired = _ESCAPE.sub(lambda escape: rb"\ufffd" if escape[1] else escape[0], body)
    if repaired == body:
        return None
    with suppress(orjson.JSONDecodeError):
        return Decoded(orjson.loads(repaired), has_lone_surrogates=True)
    return None


def remove_value(found: dict[str, Any], value: str) -> None:
    """Remove the text *value* from everything in *found*: entries of mappings, items of lists."""
    waiting: list[Any] = [found]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            for key in [key for key, inner in each.items() if inner == value]:
                del each[key]
            waiting.extend(each.values())
        elif isinstance(each, list):
            each[:] = [inner for inner in each if inner != value]
            waiting.extend(each)


def convert(found: dict[str, Any], kind: type[T]) -> T | None:
    """Return *found* as a *kind*, with digits read as numbers; None if it does not fit."""
    try:
        return msgspec.convert(found, kind, strict=False, dec_hook=decode_secret)
    except msgspec.ValidationError:
        return None


def remove_unreadable(
    found: dict[str, Any],
    kind: type[msgspec.Struct],
    needed: Container[str],
    *,
    has_lone_surrogates: bool,
    prefix: str = "",
) -> Iterator[str]:
    """Remove everything from *found* that a *kind* cannot hold; yield the path of each field.

    Each field is tried once and by itself, so the work does not grow with the number of unreadable
    fields. From a mapping with arbitrary keys only the unreadable entries are removed; a list is
    removed as a whole.

    Args:
        found: A JSON object; it is changed.
        kind: The struct that it will be converted to.
        needed: Paths of fields that may not be removed.
        has_lone_surrogates: Whether a text with U+FFFD counts as unreadable.
        prefix: What the paths begin with.

    Raises:
        Rejected: With `field_missing` or `field_mistyped` and the path of a field that is needed.
    """
    for field in _fields(kind):
        path = prefix + field.name
        if field.name not in found:
            if field.is_required:
                raise Rejected(RejectionReason.FIELD_MISSING, path)
            continue
        value = found[field.name]
        if isinstance(value, dict) and field.struct is not None:
            yield from remove_unreadable(
                value,
                field.struct,
                needed,
                has_lone_surrogates=has_lone_surrogates,
                prefix=f"{path}.",
            )
        elif not _fits(value, field.kind, has_lone_surrogates=has_lone_surrogates):
            if path in needed:
                raise Rejected(RejectionReason.FIELD_MISTYPED, path)
            if isinstance(value, dict) and field.is_mapping:
                found[field.name] = _only_texts(value, has_lone_surrogates=has_lone_surrogates)
            else:
                del found[field.name]
            yield path


def _fits(value: Any, kind: Any, *, has_lone_surrogates: bool) -> bool:
    try:
        msgspec.convert(value, kind, strict=False, dec_hook=decode_secret)
    except msgspec.ValidationError:
        return False
    return not (has_lone_surrogates and _REPLACEMENT in orjson.dumps(value))


def _only_texts(found: dict[str, Any], *, has_lone_surrogates: bool) -> dict[str, str]:
    return {
        key: value
        for key, value in found.items()
        if isinstance(value, str)
        and not (has_lone_surrogates and _REPLACEMENT in orjson.dumps([key, value]))
    }


class _Field(NamedTuple):
    """One field of a struct.

    Attributes:
        name: The name of the field.
        kind: Its type.
        is_required: Whether it must be present.
        struct: The struct that it may hold, if any.
        is_mapping: Whether it may hold a mapping with arbitrary keys.
    """

    name: str
    kind: Any
    is_required: bool
    struct: type[msgspec.Struct] | None
    is_mapping: bool


@cache
def _fields(kind: type[msgspec.Struct]) -> tuple[_Field, ...]:
    return tuple(map(_field, msgspec.structs.fields(kind)))


def _field(found: msgspec.structs.FieldInfo) -> _Field:
    kinds = get_args(found.type) or (found.type,)
    structs = [
        each for each in kinds if isinstance(each, type) and issubclass(each, msgspec.Struct)
    ]
    return _Field(
        found.name,
        found.type,
        is_required=found.required,
        struct=structs[0] if structs else None,
        is_mapping=any(get_origin(each) is dict for each in kinds),
    )
