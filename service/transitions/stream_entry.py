"""The forms a transition takes outside the process, and their version.

`pack` and `unpack` are the form on our own streams. Which fields exist is decided in
`transitions`; who reads and writes the bytes is decided in `inbox` and `consumer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import msgspec
import orjson

from .lifecycle import is_expected, is_reversal
from .transition import SessionChange, StatusTransition

# The field that tells a copy made for one handler from what was admitted: the replay's name.
REPLAY = b"replay"

_encode = msgspec.json.Encoder().encode


def pack(change: SessionChange) -> bytes:
    """Return *change* as the JSON that stands on our streams."""
    return _encode(change)


def unpack(entry: Mapping[bytes, bytes]) -> StatusTransition:
    """Return the transition of a stream entry as the admission script wrote it.

    Args:
        entry: `change` (bytes of `pack`), `previous` (empty for none), `sequence`, `epoch`, and
            `replay` when an operator had it copied.

    Raises:
        ValueError: The entry is not one of ours.
    """
    with suppress(KeyError, ValueError):
        change = msgspec.convert(orjson.loads(entry[b"change"]), SessionChange)
        return _joined(change, entry)
    # Raised here, not in an `except`: the decoder's error holds its whole input.
    raise ValueError("unreadable")


def _joined(change: SessionChange, entry: Mapping[bytes, bytes]) -> StatusTransition:
    """Add to what the event said what only the ledger knew."""
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
