"""The codec of the entries in our own Redis streams.

Which fields a transition has is decided in `transition`. The message for other queues is in
`cloudevents`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import msgspec
import orjson

from .lifecycle import is_expected, is_reversal
from .transition import SessionChange, StatusTransition

# The field of entries that were copied for a replay: the name of the replay.
REPLAY = b"replay"

_encode = msgspec.json.Encoder().encode


def pack(change: SessionChange) -> bytes:
    """Encode *change* as the JSON in the field `change` of a stream entry."""
    return _encode(change)


def unpack(entry: Mapping[bytes, bytes]) -> StatusTransition:
    """Decode the transition in a stream entry that the admission script wrote.

    Args:
        entry: The fields `change` (see `pack`), `previous` (empty for none), `sequence`, `epoch`,
            and `replay` if the entry was copied for a replay.

    Raises:
        ValueError: The entry is not one of ours.
    """
    with suppress(KeyError, ValueError):
        change = msgspec.convert(orjson.loads(entry[b"change"]), SessionChange)
        return _transition(change, entry)
    # Not raised inside `except`: the decoder's exception holds its whole input.
    raise ValueError("unreadable")


def _transition(change: SessionChange, entry: Mapping[bytes, bytes]) -> StatusTransition:
    """Combine the change, which comes from the event, with what the session record added."""
    previous = entry[b"previous"].decode() or None
    return StatusTransition(
        **msgspec.structs.asdict(change),
        previous=previous,
        sequence=int(entry[b"sequence"]),
        epoch=int(entry[b"epoch"]),
        replay=entry[REPLAY].decode() if REPLAY in entry else None,
        expected=is_expected(previous, change.current),
        reversal=is_reversal(previous, change.current),
    )
