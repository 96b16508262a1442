"""From bytes to a typed struct, leniently: what cannot be read and is not needed is left out.

The caller says which fields are needed. No error here holds anything of what was read.
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
from .verification_report import secret_hook

T = TypeVar("T", bound=msgspec.Struct)

# Each escape in a text of JSON: a whole surrogate pair, half of one (the group), or another.
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)
_REPLACED = "\ufffd".encode()


class Decoded(NamedTuple):
    """A value in JSON.

    Attributes:
        value: The value.
        has_half_pairs: Whether U+FFFD stands in its texts for half a surrogate pair: JSON may
            escape one, but no text can hold it.
    """

    value: Any
    has_half_pairs: bool


def decode(body: bytes) -> Decoded | None:
    """Decode JSON; return None for anything else.

    The decoder's error holds the whole input, so it ends here, context and all.
    """
    with suppress(orjson.JSONDecodeError):
        return Decoded(orjson.loads(body), has_half_pairs=False)
    mended = _ESCAPE.sub(lambda escape: rb"\ufffd" if escape[1] else escape[0], body)
    if mended == body:
        return None
    with suppress(orjson.JSONDecodeError):
        return Decoded(orjson.loads(mended), has_half_pairs=True)
    return None


def convert(found: dict[str, Any], kind: type[T]) -> T | None:
    """Return *found* as a *kind*, digits read as numbers; None where it does not fit."""
    try:
        return msgspec.convert(found, kind, strict=False, dec_hook=secret_hook)
    except msgspec.ValidationError:
        return None


def leave_out(
    found: dict[str, Any],
    kind: type[msgspec.Struct],
    needed: Container[str],
    *,
    has_half_pairs: bool,
    at: str = "",
) -> Iterator[str]:
    """Take everything out of *found* that a *kind* cannot hold; yield the path of each.

    Each field is tried once and by itself, so the work does not grow with what does not fit. Of a
    mapping with keys of its sender's, only what does not fit is taken out; of a list, all.

    Args:
        found: An object of JSON; it is changed.
        kind: What is to be made of it.
        needed: Paths of fields that may not be left out.
        has_half_pairs: Whether U+FFFD makes a text unreadable.
        at: What the paths begin with.

    Raises:
        Rejected: With `field_missing` or `field_mistyped` and the path of a field that is needed.
    """
    for field in _fields(kind):
        path = at + field.name
        if field.name not in found:
            if field.is_required:
                raise Rejected(RejectionReason.FIELD_MISSING, path)
            continue
        value = found[field.name]
        if isinstance(value, dict) and field.struct is not None:
            yield from leave_out(
                value, field.struct, needed, has_half_pairs=has_half_pairs, at=f"{path}."
            )
        elif not _fits(value, field.kind, has_half_pairs=has_half_pairs):
            if path in needed:
                raise Rejected(RejectionReason.FIELD_MISTYPED, path)
            if isinstance(value, dict) and field.is_mapping:
                found[field.name] = _texts(value, has_half_pairs=has_half_pairs)
            else:
                del found[field.name]
            yield path


def _fits(value: Any, kind: Any, *, has_half_pairs: bool) -> bool:
    try:
        msgspec.convert(value, kind, strict=False, dec_hook=secret_hook)
    except msgspec.ValidationError:
        return False
    return not (has_half_pairs and _REPLACED in orjson.dumps(value))


def _texts(found: dict[str, Any], *, has_half_pairs: bool) -> dict[str, str]:
    return {
        key: value
        for key, value in found.items()
        if isinstance(value, str)
        and not (has_half_pairs and _REPLACED in orjson.dumps([key, value]))
    }


class _Field(NamedTuple):
    """One field of a struct.

    Attributes:
        name: Its name.
        kind: What it may hold.
        is_required: Whether it may not be missing.
        struct: The struct it may hold, if any.
        is_mapping: Whether it may hold texts by name.
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
    structs = [one for one in kinds if isinstance(one, type) and issubclass(one, msgspec.Struct)]
    return _Field(
        found.name,
        found.type,
        is_required=found.required,
        struct=structs[0] if structs else None,
        is_mapping=any(get_origin(one) is dict for one in kinds),
    )
